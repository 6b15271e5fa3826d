"""Stored answers as data sets have them, made here, and five ways to give each back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79]
WORDS = [
    "north",
    "east",
    "south",
    "west",
    "even",
    "odd",
    "prime",
    "composite",
    "isosceles",
    "scalene",
    "Monday",
    "Friday",
    "Evelyn",
    "Carla",
    "parabola",
    "hyperbola",
    "ellipse",
    "circle",
    "yes",
    "no",
    "true",
    "false",
    "increasing",
    "decreasing",
    "listen",
    "silent",
]
UNITS = ["cm", "km", "kg", "hours", "dollars", "square inches", "km/h", "apples"]


@dataclass(frozen=True)
class Stored:
    """An answer as it stands in a data set, and what tells it from others."""

    text: str
    value: object
    """Two answers of one value are one answer; of two values they are two."""


def stored_answers(seed: int = 0) -> list[Stored]:
    """Some twelve hundred answers of every form that the public sets have, no value twice."""
    draw = random.Random(seed)
    found: dict[object, Stored] = {}
    for answer in itertools.chain(
        _numbers(draw), _expressions(), _lists(draw), _relations(), _texts(draw)
    ):
        found.setdefault(answer.value, answer)
    return list(found.values())


def spellings(stored: Stored) -> Iterator[str]:
    """Five completions that give the answer, as models write them."""
    bare = stored.text.replace("$", "")
    yield rf"We find that \boxed{{{bare}}}"
    yield f"Therefore, the answer is ${bare}$."
    yield f"Let us see.\n\n{stored.text}"
    yield f"$$\\boxed{{ {_typeset(bare)} }}$$."
    yield f"<think>It may be 5.</think>\n<answer> {stored.text} </answer>"


def _typeset(text: str) -> str:
    """The same, with the signs and sizes of another typist."""
    pairs = [
        *[("\\frac", "\\dfrac"), ("-", "\N{MINUS SIGN}"), ("^{\\circ}", "°"), ("\\pi", "π")],
        *[("\\sqrt", "\\sqrt "), (", ", ",\\ "), ("\\infty", "∞"), ("\\cup", "∪")],
        *[("\\le ", "\\leq "), ("\\ge ", "≥ ")],
    ]
    for plain, other in pairs:
        text = text.replace(plain, other)
    return text


def _numbers(draw: random.Random) -> Iterator[Stored]:
    for number in [*range(-40, 160), *(draw.randrange(10**4, 10**7) for _ in range(60))]:
        yield Stored(f"{number:,}" if number % 2 else str(number), Fraction(number))
    for above, below in itertools.product(PRIMES[:9], PRIMES[3:9]):
        if above != below:
            yield Stored(rf"\frac{{{above}}}{{{below}}}", Fraction(above, below))
            yield Stored(rf"-\frac{{{above}}}{{{2 * below}}}", Fraction(-above, 2 * below))
    for _ in range(80):
        cents = draw.randrange(1, 10**6) * 10 + 3
        yield Stored(f"{cents / 1000:.3f}", Fraction(cents, 1000))
    for whole in range(2, 22):
        yield Stored(rf"{whole}\frac{{3}}{{8}}", whole + Fraction(3, 8))
    for power in range(7, 27):
        yield Stored(rf"1.7 \times 10^{{{power}}}", Fraction(17 * 10**power, 10))
        yield Stored(rf"1.3 \times 10^{{-{power}}}", Fraction(13, 10 ** (power + 1)))
    for number in range(1009, 1049):
        yield Stored(rf"{number}\%", ("percent", number))


def _expressions() -> Iterator[Stored]:
    for inside, factor in itertools.product(PRIMES[:8], range(2, 8)):
        yield Stored(rf"{factor}\sqrt{{{inside}}}", ("root", factor * factor * inside))
        yield Stored(rf"\frac{{{factor}\pi}}{{{inside}}}", ("pi", Fraction(factor, inside)))
        yield Stored(f"x^2+{factor}x-{inside}", ("quadratic", factor, inside))
        yield Stored(rf"\frac{{{factor}x}}{{y+{inside}}}", ("ratio", factor, inside))
    for first, second in itertools.combinations(PRIMES[:8], 2):
        yield Stored(f"{first}+{second}i", ("complex", first, second))
        yield Stored(rf"\log_{{{first}}} {second}", ("log", first, second))
        yield Stored(f"{second}^{{n+{first}}}", ("power", first, second))


def _lists(draw: random.Random) -> Iterator[Stored]:
    for first, second in itertools.combinations(range(1, 12), 2):
        yield Stored(f"({first}, {second})", ("pair", first, second))
        yield Stored(f"[{first}, {second})", ("half open", first, second))
        yield Stored(rf"\{{{first}, {second}, 100\}}", ("set", first, second, 100))
        yield Stored(rf"(-\infty, {first}] \cup [{second}, \infty)", ("outside", first, second))
    for _ in range(40):
        members = sorted(draw.sample(range(200, 400), 4))
        yield Stored(", ".join(map(str, members)), ("list", *members))
    for first, second in itertools.product(range(1, 6), repeat=2):
        matrix = rf"\begin{{pmatrix}}{first} & 2 \\ 3 & {second}\end{{pmatrix}}"
        yield Stored(matrix, ("matrix", first, second))
        yield Stored(f"{first}, {first}, {second + 10}", ("repeated", first, second))
        yield Stored(rf"{first}, {second}, \ldots, {9 * second}", ("dots", first, second))


def _relations() -> Iterator[Stored]:
    for first, second in itertools.product(PRIMES[:6], PRIMES[6:10]):
        yield Stored(f"y={first}x+{second}", ("line", first, second))
        yield Stored(f"x^2+{first}y^2={second}", ("curve", first, second))
        yield Stored(rf"{first}<x\le {second}", ("between", first, second))
    for first in PRIMES[:12]:
        yield Stored(f"x>{first}", ("above", first))
        yield Stored(rf"x\ge {first}", ("at least", first))


def _texts(draw: random.Random) -> Iterator[Stored]:
    for word in WORDS:
        yield Stored(rf"\text{{{word}}}" if len(word) % 2 else word, ("word", word.lower()))
    for hour, minute in itertools.product(range(1, 13, 2), (5, 10, 30)):
        yield Stored(f"{hour}:{minute:02d} a.m.", ("time", hour, minute, "am"))
        yield Stored(rf"\text{{{hour}:{minute:02d} p.m.}}", ("time", hour, minute, "pm"))
    for unit, count in itertools.product(UNITS, range(5001, 5005)):
        yield Stored(rf"{count} \text{{ {unit}}}", ("quantity", count, unit))
    for first, second in itertools.combinations(range(2, 6), 2):
        yield Stored(f"{first} apples and {second} pears", ("basket", first, second))
    for _ in range(20):
        parts = draw.randrange(200, 999), draw.randrange(1000, 9999)
        yield Stored(f"{parts[0]}-{parts[1]}", ("telephone", *parts))
    for digits in range(17, 47):
        yield Stored(f"{digits:b}_2", ("binary", digits))
