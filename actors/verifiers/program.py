"""Which part of a completion is the program.

`find_program` chooses among the fenced blocks of the text. `fenced_blocks` reads them as CommonMark
0.31 section 4.5 does, also inside lists and quotations, where models put them.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_OPENING = re.compile(
    r"(?P<margin>[ \t>]*|[ \t>]*(?:[-*+]|\d{1,9}[.)])[ \t]+)(?P<fence>`{3,}|~{3,})(?P<info>.*)"
)
_LANGUAGE = re.compile(r"[\s{.]*([A-Za-z][\w+#-]*)")
_PYTHON = frozenset({"python", "python3", "python2", "py", "py3", "sage", "cython"})
_TRANSCRIPT = re.compile(r"\s*>>> ")


@dataclass(frozen=True)
class Block:
    """One fenced block. `language` is in lower case, empty where the fence names none."""

    language: str
    content: str
    closed: bool


def find_program(text: str, complete: bool) -> str | None:
    """The program that `text` gives, or None where it gives none.

    It is the last block that calls itself Python. Without one it is the last block without a
    language that compiles and does anything, else the last without a language. Blocks in other
    languages are no programs, nor are transcripts of a session (`>>> `).

    Args:
        complete: the model ended the text by itself, so its end closes a block that is still
            open. A text that was cut at the limit of tokens ends inside its program.
    """
    blocks = [
        block
        for block in fenced_blocks(text)
        if (block.closed or complete) and not _TRANSCRIPT.match(block.content)
    ]
    named = [block.content for block in blocks if block.language in _PYTHON]
    if named:
        return named[-1]
    unnamed = [block.content for block in blocks if not block.language]
    return next(filter(_does_something, reversed(unnamed)), unnamed[-1] if unnamed else None)


def fenced_blocks(text: str) -> list[Block]:
    """All fenced blocks of `text` in order, without the margin of the fence that opens them."""
    blocks: list[Block] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if opening is None:
            opening, lines = _opens(line), []
        elif _closes(_without_margin(line, opening["margin"]), opening["fence"]):
            blocks.append(_block(opening, lines, closed=True))
            opening = None
        else:
            lines.append(_without_margin(line, opening["margin"]))
    if opening is not None:
        blocks.append(_block(opening, lines, closed=False))
    return blocks


def _opens(line: str) -> re.Match[str] | None:
    found = _OPENING.fullmatch(line)
    if found is None or (found["fence"][0] == "`" and "`" in found["info"]):
        return None  # backticks behind backticks are code inside a line
    return found


def _closes(line: str, fence: str) -> bool:
    bare = line.strip()
    indented = len(line) - len(line.lstrip(" "))
    return indented < 4 and len(bare) >= len(fence) and set(bare) == {fence[0]}


def _without_margin(line: str, margin: str) -> str:
    """`line` without as much of the fence's margin as it has."""
    if ">" in margin:
        line = re.sub(r"^[ \t]*(?:>[ ]?)+", "", line, count=1)
        margin = margin.rpartition(">")[2][1:]
    width = len(margin.expandtabs(4))
    taken = 0
    for character in line:
        if width <= 0 or character not in " \t":
            break
        width -= 4 if character == "\t" else 1
        taken += 1
    return line[taken:]


def _block(opening: re.Match[str], lines: list[str], closed: bool) -> Block:
    language = _LANGUAGE.match(opening["info"])
    content = "".join(f"{line}\n" for line in lines)
    return Block(language[1].lower() if language else "", content, closed)


def _does_something(program: str) -> bool:
    """Whether it compiles and is more than constants: the output of an example run is not."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return any(not (isinstance(part, ast.Expr) and _is_constant(part.value)) for part in tree.body)


def _is_constant(value: ast.expr) -> bool:
    return not any(
        isinstance(node, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom))
        for node in ast.walk(value)
    )
