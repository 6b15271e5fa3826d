"""Which block of a text is the program, and when outputs and results are the expected ones."""

from __future__ import annotations

import os
from typing import Any

import pytest

from actors.verifiers.outputs import same_output, same_value
from actors.verifiers.program import fenced_blocks, find_program
from actors.verifiers.script import run_script

CODE = "print(int(input()) * 2)\n"
FENCED = f"```python\n{CODE}```\n"


@pytest.mark.parametrize(
    "text",
    [
        FENCED,
        # a block behind the program that is none
        f"{FENCED}Example run:\n```\n6\n```\n",
        f"{FENCED}Example run:\n```\n3 -> 6\n```\n",
        f"{FENCED}Run it:\n```bash\npython a.py\n```\n",
        f"{FENCED}It prints\n```text\n6\n```\n",
        f"{FENCED}Test:\n```python\n>>> main()\n6\n```\n",
        f"```cpp\nint main() {{}}\n```\n{FENCED}",
        f"```python\nprint(7)\n```\nBetter:\n{FENCED}",
        # without a language
        f"```\n{CODE}```\n",
        f"```\n{CODE}```\nIt prints\n```\n6\n```\n",
        f"```\n{CODE}```\nIt prints\n```\n[1, 2], 'yes'\n```\n",
        f"```\n{CODE}```\nIt prints\n```\nthe double of 3\n```\n",
        # how fences are written
        f"~~~python\n{CODE}~~~\n",
        f"````python\n{CODE}````\n",
        f"```` python\n{CODE}`````\n",
        f"```Python3 title=a.py\n{CODE}```",
        f"```{{.python .numberLines}}\n{CODE}```",
        f"```py\n{CODE}```   \n",
        f"   ```python\n   {CODE}   ```\n",
        f"1. First:\n\n   ```python\n   {CODE}   ```\n",
        f"- ```python\n  {CODE}  ```\n",
        f"* Steps\n\n    ```python\n    {CODE}    ```\n",
        f"\t```python\n\t{CODE}\t```\n",
        f"> ```python\n> {CODE}> ```\n",
        FENCED.replace("\n", "\r\n"),
        f"It reads `x`, as in ```x```.\n{FENCED}",
    ],
)
def test_the_program_is_found(text: str) -> None:
    assert find_program(text, complete=True) == CODE
    assert find_program(text, complete=False) == CODE


def test_a_program_may_hold_fences_of_another_kind() -> None:
    inside = 'text = """\n```\nnot the end\n"""\n'
    assert find_program(f"````python\n{inside}````", complete=True) == inside
    assert find_program(f"~~~python\n{inside}~~~", complete=True) == inside
    deep = 'text = """\n    ```\n"""\n'
    assert find_program(f"```python\n{deep}```", complete=True) == deep


def test_the_end_of_the_text_closes_a_block_unless_the_text_was_cut() -> None:
    assert find_program(f"```python\n{CODE}", complete=True) == f"{CODE}\n"
    assert find_program(f"```python\n{CODE}", complete=False) is None
    assert find_program(f"{FENCED}```python\nprint(", complete=False) == CODE


@pytest.mark.parametrize(
    "text",
    [
        "",
        CODE,
        "```cpp\nint main() {}\n```",
        "```python\n>>> f(1)\n2\n```",
        "```python print(1)```",
    ],
)
def test_what_is_no_program(text: str) -> None:
    assert find_program(text, complete=True) is None


def test_an_unnamed_block_that_does_not_compile_is_taken_where_there_is_no_other() -> None:
    assert find_program("```\nprint(\n```", complete=True) == "print(\n"


def test_margins_are_those_of_the_fence_and_no_more() -> None:
    body = "if True:\n        pass\n"
    (block,) = fenced_blocks("  ```python\n  if True:\n          pass\n```\n")
    assert (block.language, block.content, block.closed) == ("python", body, True)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("1.0", "1", True),
        ("1 2 3", "1 2\n3", False),
        ("yes", "YES", False),
        ("0.3333", "0.33333", False),
        ("", "1", False),
        # floats are close, integers are equal
        ("0.3333333333333333", "0.333333333333", True),
        (str(0.1 + 0.2), "0.3", True),
        ("1e-12", "0.0", True),
        ("0.001", "0.0", False),
        ("50000000000000001", "50000000000000000", False),
        ("50000000000000000.0", "50000000000000000", True),
        ("3.0000001", "3", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1e308", False),
        ("x 0.30000000000000004", "x 0.3", True),
        # only a line feed ends a line
        ("a\N{LINE SEPARATOR}b", "a\N{LINE SEPARATOR}b", True),
        ("a\N{LINE SEPARATOR}b", "a\nb", False),
        ("a\x85b", "a\nb", False),
        ("a\r\nb\r\n", "a\nb", True),
    ],
)
def test_outputs(found: str, expected: str, same: bool) -> None:
    assert same_output(found.encode(), expected) is same


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (1e-12, 0.0, True),
        (1.0, 1, True),
        (2**63 + 1, 2**63, False),
        (True, 1, True),
        (0, False, True),
        (2, True, False),
        ("true", True, False),
        (1.0, True, True),
        (None, False, False),
        ([1, [2.0000000001]], [1, [2]], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, True),
        ({"a": 1}, {"b": 1}, False),
        (None, None, True),
        ("1", 1, False),
        (10**400, 1.5, False),
    ],
)
def test_results(found: Any, wanted: Any, same: bool) -> None:
    assert same_value(found, wanted) is same


@pytest.mark.parametrize("hears", [False, True], ids=["before the question", "after the question"])
def test_a_program_that_ends_before_its_tests_is_told_so_whenever_it_ends(hears: bool) -> None:
    """Whether the question still finds an open pipe is a matter of who is first."""
    (asked, ask), (answered, answer), report = os.pipe(), os.pipe(), os.memfd_create("report")
    if not hears:
        os.close(asked)
    os.close(answer)
    judge = run_script("", "assert square(3) == 9", ask, answered, report, [])
    os.waitpid(judge, 0)
    said = os.pread(report, 1000, 0).decode()
    for descriptor in (ask, answered, report, *([asked] if hears else [])):
        os.close(descriptor)
    assert said == "it ended before its tests had"
