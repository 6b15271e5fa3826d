"""Bounds of numbers, written in the type of a field: `steps: Count = 30`.

A bound is part of the type hint, `Annotated[int, at_least(1)]`. So it stands beside the field, and
holds for every number of a list, a tuple or a mapping. `check_bounds` walks a configuration by its
hints and compares every number with its bound. OmegaConf and mypy read the plain type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from common.errors import UserError


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; NaN lies in none.

    An infinite end that is open asks for a finite number; one that is closed lets `.inf` in.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """Read after "must be"."""
        low, high = _shown(self.low), _shown(self.high)
        if math.isfinite(self.low) and math.isfinite(self.high):
            return (
                f"in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"
            )
        if math.isfinite(self.low):
            floor = f"{'greater than' if self.open_low else 'at least'} {low}"
            return floor if self.open_high else f"{floor} or .inf"
        if math.isfinite(self.high):
            return f"{'less than' if self.open_high else 'at most'} {high}"
        return "finite"


def _shown(number: float) -> str:
    return str(int(number)) if math.isfinite(number) and number == int(number) else f"{number:g}"


def above(low: float, most: float | None = None) -> Interval:
    """Finite numbers greater than `low`, up to `most`."""
    if most is None:
        return Interval(low, math.inf, open_low=True, open_high=True)
    return Interval(low, most, open_low=True)


def at_least(low: float, less_than: float = math.inf) -> Interval:
    """Finite numbers from `low` on that are less than `less_than`."""
    return Interval(low, less_than, open_high=True)


def at_most(high: float) -> Interval:
    """Finite numbers up to `high`."""
    return Interval(-math.inf, high, open_low=True)


def between(low: float, high: float) -> Interval:
    """Numbers from `low` to `high`, both included."""
    return Interval(low, high)


def or_infinite(interval: Interval) -> Interval:
    """`interval` with `.inf`, where that means "no limit"."""
    return replace(interval, open_high=False)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Seed = Annotated[int, between(0, 2**31 - 1)]
"""A seed that every generator of random numbers takes, also with a generator's number added."""
Finite = Annotated[float, Interval(open_low=True, open_high=True)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Limit = Annotated[float, or_infinite(above(0))]
"""`.inf` is no limit."""
TEMPERATURES = between(0.01, 2)
Temperature = Annotated[float, TEMPERATURES]
"""vLLM samples at 0.01 where it is asked for less, without a word, and takes no more than 2."""
Seconds = Annotated[float, above(0)]
"""A deadline: every wait has one, so it is finite."""
Share = Annotated[float, between(0, 1)]
PositiveShare = Annotated[float, above(0, most=1)]
ShareBelowOne = Annotated[float, at_least(0, less_than=1)]


def check_bounds(section: Any, prefix: str = "") -> None:
    """Compare every number of the dataclass `section` with its bound.

    Args:
        prefix: put before the names of the fields, e.g. `algorithm.`.

    Raises:
        UserError: one line for every number outside its bound: key, value, bound and default.
    """
    if found := list(_violations(section, prefix)):
        raise UserError("\n".join(found))


def bound_of(hint: Any) -> Interval | None:
    """The bound in a type hint, at any depth; None where no number has one.

    A tuple, list or mapping has one bound for all its numbers.
    """
    own = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Interval))
    inner = (bound_of(each) for each in get_args(hint) if get_origin(hint) is not Literal)
    return next((each for each in (*own, *inner) if each is not None), None)


def _violations(section: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        hint = hints[field.name]
        bound = bound_of(hint)
        for key, value in _leaves(getattr(section, field.name), f"{prefix}{field.name}"):
            if is_dataclass(value):
                yield from _violations(value, f"{key}.")
            elif bound is not None and isinstance(value, int | float) and value not in bound:
                yield f"{key}={value} must be {bound}{_choices(value, bound, field, hint)}"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """What a value is, or what its list, tuple or mapping holds."""
    if isinstance(value, dict):
        for name, element in value.items():
            yield from _leaves(element, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, element in enumerate(value):
            yield from _leaves(element, f"{key}[{place}]")
    else:
        yield key, value


def _choices(number: float, bound: Interval, field: Field[Any], hint: Any) -> str:
    """What a user may put instead: the words behind the bound."""
    finite = " and finite" if number == bound.high == math.inf else ""
    optional = ", or null" if type(None) in get_args(hint) else ""
    if field.default is MISSING:
        return f"{finite}{optional}"
    default = "null" if field.default is None else field.default
    return f"{finite}{optional} (default: {default})"
