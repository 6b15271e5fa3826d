"""Scripts of tests against programs: what may be asked, and whose fault it is if not."""

from __future__ import annotations

import pytest

from actors.verifiers.code_tests import score
from common.errors import VerifierError

BAG = """
class Bag:
    def __init__(self, items): self.items = list(items)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __contains__(self, item): return item in self.items
    def __getitem__(self, place): return self.items[place]
    def __setitem__(self, place, item): self.items[place] = item
    def __eq__(self, other): return self.items == other.items
    def first(self, count=1):
        for item in self.items[:count]:
            yield item
class Liar(Bag):
    def __eq__(self, other): return True
def identity(x): return x
"""


def verdict(script: str, program: str = BAG) -> str:
    tests = {"kind": "script", "setup": "", "script": script}
    return score(f"```python\n{program}\n```", {"tests": tests}, seconds=5.0).kind


@pytest.mark.parametrize(
    "script",
    [
        "bag = Bag([3, 1, 2])\nassert len(bag) == 3 and list(bag) == [3, 1, 2]",
        "bag = Bag([3, 1, 2])\nassert 1 in bag and 7 not in bag and bag[1] == 1",
        "bag = Bag([3])\nbag[0] = 5\nassert bag.items == [5]",
        "assert list(Bag([3, 1, 2]).first(count=2)) == [3, 1]",
        "assert [y for y in Bag('ab')] == ['a', 'b']",
        "assert Bag([1]) == Bag([1]) and not Bag([1]) == Bag([2])",
        "xs = [2, 1]\nassert identity(xs) == [2, 1]",
    ],
)
def test_an_object_of_the_program_is_asked(script: str) -> None:
    assert verdict(script) == "pass"
    wrong = script.replace("assert ", "assert not (", 1) + ")"
    assert verdict(wrong) == "fail"


@pytest.mark.parametrize(
    "script",
    [
        "assert Liar([1]) == 1",
        "assert [1] == Liar([1])",
        "assert Liar([1]) in (1, 2)",
        "assert {1: 2}.get(Liar([1])) == 2",
        "assert not (Liar([1]) != 1)",
    ],
)
def test_an_object_of_the_program_is_equal_to_nothing_of_the_tests(script: str) -> None:
    assert verdict(script) == "fail"


def test_no_method_of_the_program_ends_a_loop_over_the_tests() -> None:
    program = """
class Ender:
    @property
    def value(self): raise StopIteration
    def __len__(self): raise StopIteration
    def __getitem__(self, place): raise StopIteration
    def __contains__(self, item): raise StopIteration
"""
    for each in ("bag[i] == 7", "bag.value == 7", "len(bag) == 7", "(i in bag) == 7"):
        script = f"bag = Ender()\nassert all(map(lambda i: {each}, [1, 2]))"
        assert verdict(script, program) == "fail", each


@pytest.mark.parametrize("error", ["StopIteration", "StopIteration(7)", "StopAsyncIteration"])
def test_no_exception_of_the_program_ends_a_loop_over_the_tests(error: str) -> None:
    program = f"def f(x):\n    raise {error}"
    for script in (
        "assert all(map(f, [1, 2]))",
        "for got, wanted in zip(map(f, [1, 2]), [1, 4]):\n    assert got == wanted",
        "assert list(map(f, [])) == [] and sum(map(f, [1])) == 0",
    ):
        assert verdict(script, program) == "fail", script


@pytest.mark.parametrize(
    "argument",
    [
        "lambda y: y",
        "len",
        "iter([1])",
        "(y for y in [1])",
        "map(str, [1])",
        "[object()]",
        "range(3)",
    ],
)
def test_tests_that_hand_over_what_is_no_plain_value_cannot_be_judged(argument: str) -> None:
    script = f"try:\n    identity({argument})\nexcept Exception:\n    pass"
    with pytest.raises(VerifierError, match="hand a"):
        verdict(script)
