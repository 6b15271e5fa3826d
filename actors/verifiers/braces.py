"""Braces of TeX: which closes which, and how deep they stand in each other.

Escaped ones (`\\{`) do not group. Every function reads its text once.
"""

from __future__ import annotations

import re

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def closing_braces(text: str) -> dict[int, int]:
    """For every place of a `{` that is closed, the place of its `}`."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            pairs[opened.pop()] = brace.start()
    return pairs


def is_group(text: str) -> bool:
    """Whether a text is one pair of braces and what stands in it."""
    return text.startswith("{") and closing_braces(text).get(0) == len(text) - 1


def without_unopened(text: str) -> str:
    """`text` without closing braces that close nothing."""
    closing = set(closing_braces(text).values())
    extra = [
        brace.start()
        for brace in _BRACE.finditer(text)
        if brace[0] == "}" and brace.start() not in closing
    ]
    for place in reversed(extra):
        text = text[:place] + text[place + 1 :]
    return text


def depth(text: str) -> int | None:
    """How many braces stand in each other; None where one is not closed, or not opened."""
    deepest = now = 0
    for brace in _BRACE.finditer(text):
        now += {"{": 1, "}": -1}.get(brace[0], 0)
        if now < 0:
            return None
        deepest = max(deepest, now)
    return None if now else deepest
