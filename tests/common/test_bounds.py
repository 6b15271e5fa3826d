"""Bounds of numbers: every number has one, and what lies outside is refused by its key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from common.config.bounds import (
    Interval,
    Seconds,
    above,
    at_least,
    at_most,
    between,
    bound_of,
    check_bounds,
    or_infinite,
)
from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError

RULE = "verifier.rules=[{name: math_answer, weight: %s}]"


def hints(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type hint; `verifier.rules.weight` for the keys of a list's elements."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        sections = [
            each
            for each in (hint, *get_args(hint))
            if isinstance(each, type) and is_dataclass(each)
        ]
        for section in sections:
            yield from hints(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}", hint


def holds_numbers(hint: Any) -> bool:
    if get_origin(hint) is None:
        return hint in (int, float)
    return any(holds_numbers(each) for each in get_args(hint))


NUMBERS = {key: hint for key, hint in hints(Config) if holds_numbers(hint)}
SHAPES = {
    "learner.betas": "learner.betas=[0.9, %s]",
    "algorithm.rollout.follow_up.tree.children": "algorithm.rollout.follow_up.tree.children=[%s]",
    "verifier.rules.weight": RULE,
    "data.sources.weight": "data.sources=[{name: a, path: b, weight: %s}]",
    "data.sources.reasoning_gym.size": "data.sources=[{name: a, reasoning_gym: {size: %s}}]",
} | {
    f"{part}.resources": f"{part}.resources={{H100: %s}}"
    for part in ("environment", "generator", "learner", "verifier")
}
"""How a number is given where it is not the whole value."""


def load(override: str) -> Config:
    return load_config([], ["model.path=x", override])


def outside(bound: Interval, whole: bool) -> list[str]:
    """Values just outside a bound, as they are written in YAML."""
    found = []
    if math.isfinite(bound.low):
        found.append(bound.low if bound.open_low else bound.low - (1 if whole else 1e-3))
    if math.isfinite(bound.high):
        found.append(bound.high if bound.open_high else bound.high + (1 if whole else 1e-3))
    numbers = [str(int(number)) if whole else str(number) for number in found]
    if whole:
        return numbers
    unlimited = [".inf"] if bound.open_high else []
    return [*numbers, ".nan", "-.inf", *unlimited]


OUTSIDE = [
    (key, value)
    for key, hint in NUMBERS.items()
    if (bound := bound_of(hint)) is not None
    for value in outside(bound, "int" in str(hint))
]


def test_every_number_of_the_configuration_has_a_bound() -> None:
    assert {"steps", "learner.betas", "verifier.rules.weight", "generator.resources"} <= set(
        NUMBERS
    )
    assert [key for key, hint in NUMBERS.items() if bound_of(hint) is None] == []


def test_every_default_lies_in_its_bound() -> None:
    check_bounds(load("steps=1"))


@pytest.mark.parametrize(("key", "value"), OUTSIDE)
def test_what_lies_outside_is_refused_by_its_key(key: str, value: str) -> None:
    """The number alone, before any rule of several keys can see it."""
    with pytest.raises(UserError) as refused:
        load(SHAPES.get(key, f"{key}=%s") % value)
    # The element of a list has its place in its key.
    in_list = key.startswith(("verifier.rules.", "data.sources."))
    name = key.rpartition(".")[2] if in_list else key
    lines = str(refused.value).splitlines()
    assert any(name in line.partition("=")[0] and " must be " in line for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.stop_grace_s=-5", "checkpoint.stop_grace_s=-5.0 must be at least 0"),
        ("ray.placement_timeout_s=-1", "ray.placement_timeout_s=-1.0 must be greater than 0"),
        (
            "eval.max_completion_tokens=0",
            "eval.max_completion_tokens=0 must be at least 1, or null",
        ),
        ("checkpoint.keep_last=-3", "checkpoint.keep_last=-3 must be at least 0 (default: 2)"),
        ("checkpoint.keep_every=-1", "checkpoint.keep_every=-1 must be at least 0"),
        ("learner.logprob_gap_stop=-1", "must be greater than 0 or .inf (default: 1.0)"),
        ("generator.threads=0", "generator.threads=0 must be at least 1, or null (default: null)"),
        ("learner.threads=-2", "learner.threads=-2 must be at least 1, or null"),
        ("weights.canary_tolerance=-1", "weights.canary_tolerance=-1.0 must be greater than 0"),
        ("algorithm.aggregation.length_scale=-1", "length_scale=-1.0 must be greater than 0"),
        (RULE % ".nan", "verifier.rules[0].weight=nan must be finite (default: 1.0)"),
        ("learner.betas=[2.0,0.9]", "learner.betas[0]=2.0 must be in [0, 1)"),
        ("seed=-1", "seed=-1 must be in [0, 2147483647]"),
    ],
)
def test_values_that_cannot_work_are_named_with_what_can(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load(override)
    assert message in str(refused.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError) as refused:
        load_config([], ["model.path=x", "steps=0", "learner.threads=-2"])
    assert [line.partition("=")[0] for line in str(refused.value).splitlines()] == [
        "steps",
        "learner.threads",
    ]


def test_infinity_passes_where_it_means_no_limit() -> None:
    for key in (
        "learner.max_grad_norm",
        "algorithm.objective.clip_high",
        "learner.logprob_gap_warn",
    ):
        load(f"{key}=.inf")


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        (above(0), [1e-300, 5], [0, -1, math.inf, math.nan], "greater than 0"),
        (at_least(1), [1, 2], [0.999, math.inf, math.nan], "at least 1"),
        (at_most(0), [0, -7], [1e-9, -math.inf, math.nan], "at most 0"),
        (between(0, 1), [0, 1], [-1e-9, 1.001, math.nan], "in [0, 1]"),
        (above(0, most=1), [1e-9, 1], [0, 1.001, math.nan], "in (0, 1]"),
        (at_least(0, less_than=1), [0, 0.999], [1, -1e-9, math.nan], "in [0, 1)"),
        (or_infinite(above(0)), [1, math.inf], [0, -math.inf, math.nan], "greater than 0 or .inf"),
        (Interval(open_low=True, open_high=True), [-9, 9], [math.inf, math.nan], "finite"),
    ],
)
def test_intervals(
    interval: Interval, inside: list[float], outside: list[float], words: str
) -> None:
    assert all(number in interval for number in inside)
    assert not any(number in interval for number in outside)
    assert str(interval) == words


def test_the_bound_of_a_hint_is_found_at_any_depth() -> None:
    @dataclass
    class Section:
        waits: dict[str, list[Seconds] | None]

    hint = get_type_hints(Section, globals(), include_extras=True)["waits"]
    assert bound_of(hint) == above(0)
    assert fields(Section)[0].name == "waits"
    with pytest.raises(UserError, match=r"waits\.long\[1\]=-1 must be greater than 0"):
        check_bounds(Section({"short": None, "long": [1, -1]}))
