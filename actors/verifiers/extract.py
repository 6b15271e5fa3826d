"""How an answer is found in a text: boxes, tags, numbers, the last line.

Every function reads its text once, however long and however broken it is.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from actors.verifiers.braces import closing_braces
from common.errors import UserError

Extract = Literal["full", "last_number", "boxed", "answer_tag", "last_line"]

NUMBER = re.compile(
    r"(?<![\w.])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?"
)
"""A decimal number. A minus behind a digit or letter is a subtraction, not a sign."""
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[\d.]))")
_BARE_BOX = re.compile(r"[\d.]*\d")
_LINK = re.compile(r"[\s$]*(?:,|;|and|or|,\s*and|,\s*or)[\s$]*")


_BESIDE = re.compile(r"(?:[ $]|\\q?quad)*")


def check_extract(extract: str) -> None:
    """Raise `UserError` when `extract` is not one of `Extract`."""
    if extract not in get_args(Extract):
        raise UserError(f"extract={extract!r} is none of {', '.join(get_args(Extract))}")


def extract_answer(text: str, how: str) -> str | None:
    """The answer `text` gives, or None where it gives none.

    `full`: all of it. `last_line`: the last line that is not blank. `last_number`: the last
    decimal number, without thousands separators. `boxed`: what the last `\\boxed{}` holds.
    `answer_tag`: what the last `<answer></answer>` holds.
    """
    if how == "boxed":
        return last_boxed(text)
    if how == "answer_tag":
        return last_tagged(text)
    if how == "last_number":
        numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return str(numbers[-1]).replace(",", "") if numbers else None
    if how == "last_line":
        lines = text.strip().splitlines()
        return lines[-1].strip() if lines else None
    return text.strip() or None


def last_tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` of `text` holds; None without a whole one. A tag that
    opens inside another is text."""
    opened: int | None = None
    last: tuple[int, int] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end() if opened is None else opened
        elif opened is not None:
            last, opened = (opened, tag.start()), None
    return text[slice(*last)].strip() if last else None


def last_boxed(text: str) -> str | None:
    """What the last complete `\\boxed{...}` of `text` holds, braces inside it balanced."""
    boxes = _boxes(text)
    return boxes[-1][2] if boxes else None


def last_boxes(text: str) -> list[str]:
    """What the last `\\boxed{...}` holds, and those before it that are named with it.

    `\\boxed{1} and \\boxed{2}` is one answer of two parts, as are different boxes side by side on a
    line; between other boxes stand words, and a later one replaces an earlier one. Of a box inside
    a box the inner one is the answer.
    """
    found = _boxes(text)
    first = len(found) - 1
    while first > 0:
        between = text[found[first - 1][1] : found[first][0]]
        beside = _BESIDE.fullmatch(between) and found[first - 1][2] != found[first][2]
        if not (beside or _LINK.fullmatch(between)):
            break
        first -= 1
    return [content for _, _, content in found[max(first, 0) :]]


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every complete box that holds no other, in order."""
    found: list[tuple[int, int, str]] = []
    closings = closing_braces(text)
    for match in _BOXED.finditer(text):
        if match[0].endswith("{"):
            end = closings.get(match.end() - 1)
            if end is None:
                continue
            box = (match.start(), end + 1, text[match.end() : end].strip())
        else:  # \boxed 5, as TeX allows
            bare = _BARE_BOX.match(text, match.end())
            if bare is None:
                continue
            box = (match.start(), bare.end(), bare[0])
        if found and found[-1][1] > match.start():
            found.pop()
        found.append(box)
    return found
