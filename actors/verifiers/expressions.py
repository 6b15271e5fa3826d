"""Text of a completion as an expression, where a library would run it as Python.

sympy reads a text by evaluating it: `parse_expr("__import__('os')...")` runs it. The scorers of
reasoning-gym do so with answers, in the process that knows the right one. `read_safely` has sympy
read names of mathematics, numbers and operators, and nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.UnaryOp, ast.BinOp),
    *(ast.operator, ast.unaryop, ast.Compare, ast.cmpop, ast.Tuple, ast.List),
)
_TAKE_TEXT = frozenset({"Symbol", "Function", "Float", "Integer", "Rational"})
"""What sympy puts around the words and numbers that it reads. Any other would evaluate a text."""
_FUNCTIONS = frozenset({"sqrt", "cbrt", "root", "abs", "min", "max"})
"""Names of functions of sympy that are no class, and of Python's that do no harm."""


def read_safely() -> None:
    """From now on sympy, in this process, evaluates mathematics and no other Python."""
    from sympy.parsing import sympy_parser

    sympy_parser.eval_expr = _evaluate


def _evaluate(code: Any, local_dict: Mapping[str, Any], global_dict: Mapping[str, Any]) -> Any:
    """What sympy's own `eval_expr` does, with code that was looked at.

    Raises: `ValueError` for anything but mathematics; `TypeError` for what is no text.
    """
    if not isinstance(code, str):
        raise TypeError("an expression is read from text")
    known = {**global_dict, **local_dict}
    tree = ast.parse(code.strip(), mode="eval")
    may_be_text = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _TAKE_TEXT
        for argument in node.args
    }
    names = {}
    for node in ast.walk(tree):
        if not isinstance(node, _NODES) or (isinstance(node, ast.Call) and node.keywords):
            raise ValueError(f"a {type(node).__name__} is no mathematics")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in may_be_text:
                raise ValueError("a text is no mathematics")
        elif isinstance(node, ast.Name):
            names[node.id] = _mathematical(node.id, known)
    return eval(compile(tree, "expression", "eval"), {"__builtins__": {}}, names)


def _mathematical(name: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for. Raises: `ValueError` for what is no mathematics."""
    from sympy import Basic

    found = known.get(name)
    plain = isinstance(found, Basic) or (isinstance(found, type) and issubclass(found, Basic))
    if not plain and not (name in _FUNCTIONS and callable(found)):
        raise ValueError(f"{name} is no mathematics")
    return found
