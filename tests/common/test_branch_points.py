"""Where completions are branched, in training and by `grpo-lambda credit`.

Both once had a function of their own. What these gave is kept here as numbers: readable ones of a
few completions, and digests of 3,000 drawn ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.generation.follow_ups import Said, points_of
from common.branch_points import BranchRules, branch_points
from common.config.follow_up import BranchConfig
from deploy.credit.branches import parse_rules

WORDS = ("so", " 4", ".", "!", " \n", "; ", "a.b", ": ", "", " =", "?", " and")


def in_training(
    texts: Sequence[str], logprobs: list[float], said: str | None = None, **config: Any
) -> list[int]:
    """`said`: the completion's text, where it is not all of its tokens'."""
    text = "".join(texts) if said is None else said
    one = Said(0, text, list(range(len(texts))), logprobs, 1.0, 1.0)
    return points_of(one, BranchConfig(**config), lambda ids: "".join(texts[i] for i in ids))


def in_measures(
    texts: Sequence[str], logprobs: list[float], words: Sequence[str], most: int, first: int = 0
) -> list[int]:
    return branch_points(texts.__getitem__, logprobs, parse_rules(words, most), first=first)


TEXTS = [
    *["Two", " and", " two", ".", " So", " four", "\n"],
    *[" 4", " =", " 4", ". ", "Yes", "!", " End"],
]
LOGPROBS = [-0.1, -0.1, -3.0, -0.1, -0.1, -2.0, -0.1, -0.4, -0.05, -1.0, -0.2, -0.9, -0.01, -0.3]
PLAYED = [math.nan if t in (3, 4, 8) else value for t, value in enumerate(LOGPROBS)]
"""The same where tokens 3, 4 and 8 were said by an environment."""


@pytest.mark.parametrize(
    ("config", "points"),
    [
        ({"at": "every", "every": 1}, list(range(14))),
        ({"at": "every", "every": 3}, [0, 3, 6, 9, 12]),
        ({"at": "every", "every": 1, "most": 4}, [0, 4, 9, 13]),
        ({"at": "every", "every": 1, "most": 5}, [0, 3, 6, 10, 13]),
        ({"at": "every", "every": 2, "most": 2}, [0, 12]),
        ({"at": "every", "every": 1, "said": "".join(TEXTS)[:-6]}, list(range(12))),
        ({"at": "probability"}, [0, 10]),
        ({"at": "probability", "every": 1}, [0, 2, 5, 7, 9, 10, 11, 13]),
        ({"at": "probability", "every": 2, "below": 0.7}, [0, 5, 9]),
        ({"at": "probability", "every": 1, "below": 0.5, "most": 3}, [0, 5, 11]),
        ({"at": "separator"}, [0, 4, 11]),
        ({"at": "separator", "separator": "\n"}, [0, 7]),
        ({"at": "separator", "separator": " ", "most": 6}, [0, 3, 5, 8, 9, 11]),
        ({"at": "separator", "separator": ""}, list(range(14))),
    ],
)
def test_training_branches_where_it_did(config: dict[str, Any], points: list[int]) -> None:
    assert in_training(TEXTS, LOGPROBS, **config) == points


@pytest.mark.parametrize(
    ("words", "most", "first", "points", "played"),
    [
        ("start", 12, 0, [0], [0]),
        ("turns", 12, 0, [0], [0, 5, 9]),
        ("sentences", 12, 0, [0, 4, 7, 11, 13], [0, 7, 11, 13]),
        ("every:3", 12, 0, [0, 3, 6, 9, 12], [0, 5, 9, 12]),
        ("every:1", 4, 0, [0, 3, 7, 11], [0, 2, 9, 12]),
        ("every:1", 5, 0, [0, 2, 5, 9, 12], [0, 2, 6, 10, 12]),
        ("every:1", 1, 0, [0], [0]),
        ("below:0.7", 12, 0, [0, 2, 5, 7, 9, 11], [0, 2, 5, 7, 9, 11]),
        ("below:0.5", 2, 0, [0, 9], [0, 9]),
        ("turns sentences every:4", 12, 0, [0, 4, 7, 8, 11, 12, 13], [0, 5, 6, 7, 9, 11, 13]),
        ("turns sentences every:4", 5, 0, [0, 4, 8, 11, 13], [0, 5, 7, 9, 13]),
        ("sentences below:0.5", 12, 5, [5, 7, 9, 11, 13], [5, 7, 9, 11, 13]),
    ],
)
def test_measures_branch_where_they_did(
    words: str, most: int, first: int, points: list[int], played: list[int]
) -> None:
    assert in_measures(TEXTS, LOGPROBS, words.split(), most, first) == points
    assert in_measures(TEXTS, PLAYED, words.split(), most, first) == played


def drawn(seed: int) -> tuple[Random, Callable[[int], int], list[str], list[float]]:
    """A completion, and what draws whole numbers below one."""
    random = Random(seed)

    def below(count: int) -> int:
        return int(random.random() * count)

    count = below(40)
    texts = [WORDS[below(12)] for _ in range(count)]
    return random, below, texts, [-3 * random.random() * random.random() for _ in range(count)]


def drawn_in_training(seed: int) -> list[int]:
    """Sometimes the text ends before the last token does."""
    random, below, texts, logprobs = drawn(seed)
    whole = "".join(texts)
    said = whole[: len(whole) - below(6)] if below(3) == 0 else whole
    return in_training(
        texts,
        logprobs,
        said,
        at=("every", "probability", "separator")[below(3)],
        every=1 + below(6),
        below=1 - random.random(),
        separator=(".", "\n", "=", "")[below(4)],
        most=1 + below(12),
    )


def drawn_in_measures(seed: int) -> list[int]:
    """What the policy says in its turns, and what is said to them."""
    random, below, texts, logprobs = drawn(seed)
    begin = 0
    while begin < len(texts):
        begin += 1 + below(9)
        end = min(len(texts), begin + below(4))
        logprobs[begin:end] = [math.nan] * (end - begin)
        begin = end
    sampled = [t for t, value in enumerate(logprobs) if not math.isnan(value)]
    first = sampled[0] if sampled else 0
    if below(3) == 0 and sampled:
        first = sampled[below(len(sampled))]
    rules = ("turns", "sentences", f"every:{1 + below(6)}", f"below:{1 - random.random()}")
    words = [word for word in rules if below(2)]
    return in_measures(texts, logprobs, words, 1 + below(12), first)


@pytest.mark.parametrize(
    ("of", "first_ones", "digest"),
    [
        (
            drawn_in_training,
            [[0, 4, 11], [0, 2], [0, 4, 8, 12, 16, 20, 24, 28, 32], [0, 2], [0, 3, 6], [0, 15]],
            "ab394ab34ff2115e83dac15fb14c84be727dc7a15052567e0b2e7f3a816278d1",
        ),
        (
            drawn_in_measures,
            [[23, 25, 26, 27, 29, 30, 31, 32], [0, 1], [0, 23], [0, 4], [0, 2, 3, 5, 6, 8]],
            "b9a4569dfd2b8f1b4a836a5e2db37f3f298142407d497ac8bc01ad6d527ea14f",
        ),
    ],
)
def test_drawn_completions_are_branched_where_they_were(
    of: Callable[[int], list[int]], first_ones: list[list[int]], digest: str
) -> None:
    found = [of(seed) for seed in range(3000)]
    assert found[: len(first_ones)] == first_ones
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == digest


RULES = st.builds(
    BranchRules,
    turns=st.booleans(),
    sentences=st.booleans(),
    separator=st.sampled_from([None, "", ".", " "]),
    every=st.sampled_from([None, 1, 2, 5]),
    below=st.sampled_from([None, 0.2, 1.0]),
    nth_below=st.integers(1, 3),
    most=st.integers(1, 9),
    kept=st.sampled_from(["ends", "middles"]),
)
TOKENS = st.lists(
    st.tuples(st.sampled_from(WORDS), st.sampled_from([-3.0, -0.5, -0.01, math.nan])), max_size=30
)


@given(tokens=TOKENS, rules=RULES, first=st.integers(0, 4), odd=st.booleans())
def test_branches_stand_at_tokens_of_the_policy_where_they_may_be(
    tokens: list[tuple[str, float]], rules: BranchRules, first: int, odd: bool
) -> None:
    """Whatever the rules: the first is behind what was given, and there are no more than `most`."""
    logprobs = [value for _, value in tokens]
    found = branch_points(
        lambda t: tokens[t][0], logprobs, rules, first=first, may_be=lambda t: not odd or t % 2 == 1
    )
    assert found[0] == first and found == sorted(set(found)) and len(found) <= rules.most
    assert not any(math.isnan(logprobs[t]) or (odd and t % 2 == 0) for t in found[1:])
