"""Whether a program gave what its test expects: texts that were printed, values that came back.

Numbers are compared by how the test writes them. Integers are equal exactly, however large; where
either side has a decimal point or an exponent, they may differ by a millionth of their size. True
is 1 and false is 0, as they are to Python.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Any

TOLERANCE = 1e-6
"""Largest difference of two floats, as a share of the larger one."""
_NEAR_ZERO = 1e-9
"""Largest difference of two floats near 0, where no share of their size can be asked."""


def same_output(found: bytes, expected: str) -> bool:
    """Whether two texts are equal line by line.

    Spaces at the ends of a line and blank lines at the ends of the text do not count. Lines that
    differ are equal when their words are, or are numbers of the same value. Only a line feed ends
    a line: other separators of Unicode are text.
    """
    lines = _lines(found.decode("utf-8", "replace"))
    wanted = _lines(expected)
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def same_value(found: Any, wanted: Any) -> bool:
    """Whether two JSON values are equal, the numbers in them as this module says."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return isinstance(found, float | int) and bool(found == wanted)
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(map(same_value, found, wanted))
        )
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(same_value(found[key], wanted[key]) for key in wanted)
        )
    if isinstance(wanted, (int, float)) and isinstance(found, (int, float)):
        if isinstance(wanted, int) and isinstance(found, int):
            return found == wanted
        return found == wanted or _close(found, wanted)
    return bool(found == wanted)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    words, others = line.split(), wanted.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    try:
        left, right = Decimal(word), Decimal(wanted)
    except InvalidOperation:
        return False
    if left == right:
        return True
    if not (left.is_finite() and right.is_finite()) or _is_integer(wanted):
        return False
    return _close(left, right)


def _is_integer(word: str) -> bool:
    return word.lstrip("+-").isdigit()


def _close(left: float | Decimal, right: float | Decimal) -> bool:
    try:
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=_NEAR_ZERO)
    except OverflowError:  # an integer beyond floats
        return False
