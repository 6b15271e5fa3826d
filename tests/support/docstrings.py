"""Docstrings of the packages, and what is wrong with how they begin."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_BEGINNING = re.compile(r"[A-Z0-9`'\"(\[]|vLLM|reasoning-gym")
"""A capital letter, a literal, or a name that is written small."""
_LEANING = re.compile(
    r"(Of|Its|Their|That|These|Nor|Or|And|But|Such)\b|Those\.|As (those|that|it)\b|As `"
    r"|There (is|are)\.|The same\b|So often\b"
)
"""A sentence that begins so leans on a line before it, which the reader may not have seen."""


def docstrings(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, name, docstring) of the module and of all that is public in it, fields too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if text := ast.get_docstring(tree):
        yield 1, "module", text
    yield from _inside(tree, "")


def _inside(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[int, str, str]]:
    field = ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            text = ast.get_docstring(child)
            if text and not child.name.startswith("_"):
                yield child.lineno, name, text
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from _inside(child, f"{name}.")
        elif field and (text := _text(child)):
            yield child.lineno, f"{prefix}{field}", text
        field = _assigned(child)


def _text(node: ast.stmt) -> str:
    """The docstring of a field, which stands below it; empty where `node` is something else."""
    value = node.value if isinstance(node, ast.Expr) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def _assigned(node: ast.stmt) -> str:
    """The public name that `node` assigns to; empty where there is none."""
    target = node.target if isinstance(node, ast.AnnAssign) else None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    name = target.id if isinstance(target, ast.Name) else ""
    return "" if name.startswith("_") else name


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    words = " ".join(text.strip().split("\n\n")[0].split())
    found = re.match(r".*?[.:](?= [A-Z`\[(]|$)", words)
    return found[0] if found else words


def complaint(text: str) -> str | None:
    """What is wrong with how a docstring begins; None where it stands alone."""
    sentence = first_sentence(text)
    if not _BEGINNING.match(sentence):
        return f"begins with a small letter: {sentence}"
    if _LEANING.match(sentence):
        return f"leans on what stands before it: {sentence}"
    return None
