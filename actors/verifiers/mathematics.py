"""Two expressions as mathematics, by math-verify where it reads all of them.

`same_mathematics` asks math-verify for the trees of both and compares values, equations and
inequalities itself: fast, and where math-verify's own rules let different ones pass. Sets,
intervals and matrices are math-verify's. An expression of which it would drop a letter, a word or
a sign is not read: it equals its own spelling alone.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from actors.verifiers.braces import depth
from actors.verifiers.numeric import Values, same_values
from actors.verifiers.quantity import without_unit
from actors.verifiers.relations import is_relation, same_relation, union_of

LONGEST = 2000
"""Characters of the longest expression that is read as mathematics."""

_OR = re.compile(r"\s+or\s+|\s*\\(?:lor|vee)(?![A-Za-z])\s*")
_DEEPEST = 40
"""Braces in each other that its grammar is given."""

_MACRO = re.compile(r"\\([A-Za-z]+)")
_FUNCTIONS = (
    r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|max|min|gcd|lcm"
)
_KNOWN = re.compile(
    rf"{_FUNCTIONS}|frac|cdot|times|div|pi|infty|le|ge|ne|lt|gt|in|cup|cap|setminus|pm|mp|to"
    r"|approx|lg|sum|prod|int|lim|binom|alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|theta"
    r"|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta"
    r"|Lambda|Xi|Sigma|Phi|Psi|Omega|emptyset|mathbb|begin|end|[lr]floor|[lr]ceil|det|circ|mid"
    r"|[lr]angle|prime"
)
"""Macros that math-verify reads, and no others."""
_ENVIRONMENT = re.compile(
    r"\\(?:begin|end)\{[pbBvV]?(?:matrix|array|smallmatrix)\}(?:\{[lcr|]*\})?"
)
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))[A-Za-z]{{3,}}")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_OF_ITS_OWN = frozenset("eidCRZNQ")
"""Letters that are no symbol in a tree: constants, the d of an integral, the sets of numbers."""


def same_mathematics(stored: str, given: str) -> bool:
    """Whether two `spelled` expressions are the same to mathematics."""
    stored, given = without_unit(stored), without_unit(given)
    if max(len(stored), len(given)) > LONGEST or _clash(stored, given):
        return False
    gold, answer = _tree(stored), _tree(given)
    if gold is None or answer is None:
        return False
    if is_relation(gold) and is_relation(answer):
        return same_relation(gold, answer)
    verdict = same_values(gold, answer)
    if verdict is Values.UNKNOWN:
        return _verified(gold, answer)
    return verdict is Values.EQUAL


def _tree(expression: str) -> Any:
    """The tree of an expression, a set where relations stand beside each other with `or`."""
    parts = _OR.split(expression)
    return parsed(expression) if len(parts) == 1 else union_of([parsed(part) for part in parts])


def has_words(expression: str) -> bool:
    """Whether it holds words of a language, which are no mathematics."""
    plain = _MACRO.sub(" ", _ENVIRONMENT.sub(" ", expression))
    return bool(_WORD.search(plain))


@lru_cache(maxsize=256)
def parsed(expression: str) -> Any:
    """The tree of an expression, unevaluated; None where math-verify cannot read all of it."""
    quiet()
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    if has_words(expression) or not all(map(_KNOWN.fullmatch, _MACRO.findall(expression))):
        return None
    deep = depth(expression)
    if deep is None or deep > _DEEPEST:
        return None
    try:
        found = parse(
            f"\\boxed{{{expression}}}",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
    except Exception:  # its grammar raises of every kind: what it cannot read is text
        return None
    tree = found[0] if found else None
    return tree if tree is not None and not _lost(expression, tree) else None


def _lost(expression: str, tree: Any) -> bool:
    """Whether letters of the expression are not in its tree: math-verify drops what may be a unit
    (`2\\pi a b` is 2 pi to it), and what its grammar does not reach."""
    kept = {letter for symbol in _names(tree) for letter in symbol.lower()}
    return any(letter.lower() not in kept for letter in _letters(expression) - _OF_ITS_OWN)


def _names(tree: Any) -> set[str]:
    from sympy import Function, Symbol
    from sympy.core.function import AppliedUndef, UndefinedFunction

    symbols = {str(symbol) for symbol in tree.atoms(Symbol)}
    functions = {str(found.func) for found in tree.atoms(AppliedUndef, UndefinedFunction, Function)}
    return symbols | functions


def _letters(expression: str) -> set[str]:
    plain = _MACRO.sub(" ", _ENVIRONMENT.sub(" ", expression))
    words = [word for word in _LETTER.findall(plain) if not re.fullmatch(_FUNCTIONS, word)]
    return set("".join(words))


def _clash(stored: str, given: str) -> bool:
    """Whether one has a letter in capitals and the other has it small: math-verify has no case."""
    mine, other = _letters(stored), _letters(given)
    return any(letter.swapcase() in mine and letter not in mine for letter in other) and any(
        letter.swapcase() in other and letter not in other for letter in mine
    )


def _verified(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return bool(
        verify(
            [gold],
            [answer],
            timeout_seconds=None,
            raise_on_error=False,
            allow_set_relation_comp=True,
        )
    )


@lru_cache(maxsize=1)
def quiet() -> None:
    """Silence a warning of math-verify: `actors.verifiers.equality` bounds its time."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
