"""The measure of credit without an engine: a policy whose values are known, and the statistics."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from learner_models import save_tiny_model, trajectories
from learner_ranks import on_policy, worker

from common.branch_points import branch_points
from common.config.load import load_config
from common.errors import UserError
from deploy.command.presets import RECIPES
from deploy.credit import report
from deploy.credit.agreement import (
    agreement,
    ceiling,
    credit_of_segments,
    from_halves,
    rank_correlation,
    same_sign,
)
from deploy.credit.branches import parse_rules
from deploy.credit.completions import chosen, digest_of, policy_version
from deploy.credit.files import RESULTS, SEGMENTS
from deploy.credit.gradient import Directions, cosine, of_rule
from deploy.credit.launch import Options, measure
from deploy.credit.measured import Measured, standard_error
from deploy.eval.metrics import Estimate
from learner.policy.step_batch import StepBatch
from learner.training.rank import LearnerRank

LENGTH, VOCABULARY = 4, 3


class TablePolicy:
    """Logits for every prefix, and a reward for every sequence: all values can be enumerated."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(3), repeat=n)]
        logits = {p: random.normal(0, 1.5, VOCABULARY) for p in prefixes}
        self.chances = {p: np.exp(x) / np.exp(x).sum() for p, x in logits.items()}
        whole = itertools.product(range(3), repeat=LENGTH)
        self.rewards = {sequence: float(random.random() < 0.4) for sequence in whole}

    def value(self, prefix: tuple[int, ...]) -> float:
        """Exact, by going through everything that may follow."""
        if len(prefix) == LENGTH:
            return self.rewards[prefix]
        return sum(p * self.value((*prefix, a)) for a, p in enumerate(self.chances[prefix]))

    def go_on(self, prefix: tuple[int, ...], random: np.random.Generator) -> tuple[int, ...]:
        while len(prefix) < LENGTH:
            prefix = (*prefix, int(random.choice(VOCABULARY, p=self.chances[prefix])))
        return prefix

    def measured(
        self, sequence: tuple[int, ...], points: tuple[int, ...], count: int, seed: int
    ) -> Measured:
        random = np.random.default_rng(seed)
        rewards = tuple(
            tuple(self.rewards[self.go_on(sequence[:t], random)] for _ in range(count))
            for t in points
        )
        return Measured(points, LENGTH, self.rewards[sequence], rewards, (0.0, 1.0))

    def truth(self, sequence: tuple[int, ...], points: tuple[int, ...]) -> np.ndarray:
        values = [self.value(sequence[:t]) for t in points]
        return np.diff([*values, self.rewards[sequence]])


EVERY = (0, 1, 2, 3)


def test_measured_values_are_those_of_an_enumeration() -> None:
    """Within the stated error: squares of the standardised errors have a mean of one."""
    scores = []
    for seed in range(12):
        policy = TablePolicy(seed)
        sequence = policy.go_on((), np.random.default_rng(seed))
        found = policy.measured(sequence, EVERY, 200, seed)
        exact = np.array([policy.value(sequence[:t]) for t in EVERY])
        away = (found.values_J - exact) / found.errors_J
        assert np.abs(away).max() < 4.5
        scores += (away**2).tolist()
        apart = found.advantages_J - policy.truth(sequence, EVERY)
        assert (np.abs(apart) < 4.5 * found.advantage_errors_J).all()
    assert 0.5 < np.mean(scores) < 1.6


def test_advantages_of_segments_add_up_to_the_reward_less_the_first_value() -> None:
    policy = TablePolicy(3)
    for sequence in list(policy.rewards)[::7]:
        for points in (EVERY, (0, 2), (0,)):
            found = policy.measured(sequence, points, 5, seed=1)
            expected = found.reward - found.values_J[0]
            assert found.advantages_J.sum() == pytest.approx(expected, abs=1e-12)


def test_without_a_branch_but_the_first_it_is_broadcast() -> None:
    found = TablePolicy(1).measured((0, 1, 2, 0), (0,), 50, seed=2)
    assert found.segments == [(0, LENGTH)]
    assert found.advantages_J.tolist() == [found.reward - found.values_J[0]]


def test_few_or_equal_rewards_do_not_look_sure() -> None:
    assert math.isnan(standard_error([], (0, 1)))
    alone, equal = standard_error([1.0], (0, 1)), standard_error([1.0] * 8, (0, 1))
    assert alone > 0.4 and equal > 0.05
    many = standard_error([0.0, 1.0] * 500, (0, 1))
    assert many == pytest.approx(0.5 / math.sqrt(1000), rel=1e-2)
    assert standard_error([1.0], (-1, 3)) > 2 * alone


def test_a_branch_without_a_reward_leaves_its_two_segments_open() -> None:
    found = Measured((0, 2, 5), 8, 1.0, ((0.0, 1.0), (), (1.0,)), (0.0, 1.0))
    assert np.isnan(found.advantages_J).tolist() == [True, True, False]
    agreed = agreement([np.array([1.0, 2.0, 3.0])], [found])
    assert agreed.segments == 1 and math.isnan(agreed.rank.value)


def steps(count: int, samples: int) -> tuple[list[Measured], list[np.ndarray]]:
    policy, random = TablePolicy(7), np.random.default_rng(0)
    sequences = [policy.go_on((), random) for _ in range(count)]
    measured = [policy.measured(s, EVERY, samples, seed=i) for i, s in enumerate(sequences)]
    return measured, [policy.truth(s, EVERY) for s in sequences]


def test_the_truth_agrees_as_far_as_the_noise_allows() -> None:
    """And more of it with more samples; its opposite and noise do not."""
    for samples, least in ((4, 0.4), (200, 0.9)):
        measured, truth = steps(60, samples)
        found, bound = agreement(truth, measured), ceiling(measured)
        assert found.rank.value > least
        assert found.rank.value == pytest.approx(bound.value, abs=0.12)
        assert found.rank.low < found.rank.value < found.rank.high
        assert agreement([-each for each in truth], measured).rank.value < -least
    random = np.random.default_rng(1)
    noise = agreement([random.normal(size=4) for _ in measured], measured)
    assert noise.rank.low < 0 < noise.rank.high
    assert noise.sign.low < 0.5 < noise.sign.high


def test_one_continuation_has_no_ceiling() -> None:
    measured, truth = steps(10, 1)
    assert math.isnan(ceiling(measured).value)
    assert agreement(truth, measured).segments == 40


def test_correlations_by_hand() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 1000.0])
    assert rank_correlation(one, other) == pytest.approx(0.8)
    tied = np.array([1.0, 1.0, 2.0, 2.0])  # ranks 1.5, 1.5, 3.5, 3.5
    assert rank_correlation(one, tied) == pytest.approx(4 / math.sqrt(5 * 4))
    assert math.isnan(rank_correlation(one, np.ones(4)))
    assert same_sign(np.array([1, -1, 0, 2.0]), np.array([3, 1, 1, 0.0])) == 0.5
    assert math.isnan(same_sign(np.zeros(2), np.ones(2)))


def test_the_credit_of_a_segment_is_the_mean_of_its_trained_tokens() -> None:
    measured = Measured((0, 2, 4), 6, 1.0, ((), (), ()), (0, 1))
    advantages = np.array([1.0, 3.0, math.nan, 5.0, math.nan, math.nan])
    assert credit_of_segments(advantages, measured).tolist() == [2.0, 5.0, 0.0]
    assert credit_of_segments(None, measured).tolist() == [0.0, 0.0, 0.0]


TEXTS = ["Two", " and", " two", ".", " So", " four", "\n", "4"]
LOGPROBS = [-0.1, -0.1, -3.0, -0.1, -0.1, -2.0, -0.1, -0.1]


def test_branches_stand_where_the_rules_say() -> None:
    def of(*words: str, most: int = 9, first: int = 0) -> list[int]:
        return branch_points(TEXTS.__getitem__, LOGPROBS, parse_rules(words, most), first=first)

    assert of("start") == [0]
    assert of("sentences") == [0, 4, 7]
    assert of("every:3") == [0, 3, 6]
    assert of("below:0.2") == [0, 2, 5]
    assert of("sentences", "below:0.2") == [0, 2, 4, 5, 7]
    assert of("every:1", most=4) == [0, 2, 4, 6]
    assert of("every:100") == [0]  # behind the end
    assert of("every:2", first=3) == [3, 5, 7]
    everywhere = parse_rules(["sentences", "every:1", "below:1"], 12)
    assert branch_points("4".__getitem__, [-0.1], everywhere) == [0]


@pytest.mark.parametrize("word", ["every:0", "every:x", "every", "below:0", "below:2", "word"])
def test_a_rule_that_cannot_be_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"--at {word}"):
        parse_rules([word], 3)
    with pytest.raises(UserError, match="--points 0"):
        parse_rules([], 0)


@pytest.mark.parametrize("name", ["completions", "continuations", "samples", "seconds", "points"])
def test_a_number_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--{name} 0"):
        measure(Options(tmp_path, 1, **{name: 0}))


def test_where_no_run_is_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        measure(Options(tmp_path, 1))


def test_completions_are_taken_group_by_group_and_of_one_version() -> None:
    groups = trajectories([(3, [2, 3]), (2, [4, 1, 2])], version=5, rewards=[[1, None], [0, 1, 0]])
    assert policy_version(groups) == 5
    found = chosen(groups, 5, 3)
    assert [each.key for each in found] == [(0, 0), (1, 0), (1, 1)]
    assert found[0].reward == 1 and len(found[0].token_ids) == 2
    with pytest.raises(UserError, match="version 4"):
        chosen(groups, 4, 3)
    assert digest_of(found, [(0,)] * 3) != digest_of(found, [(0, 1)] * 3)


def test_weights_that_changed_inside_of_every_completion_are_nobodys() -> None:
    (group,) = trajectories([(3, [2, 2])])
    mixed = pa.array([[0, 1]] * 2, group.schema.field("weight_versions").type)
    place = group.schema.get_field_index("weight_versions")
    with pytest.raises(UserError, match="several versions"):
        policy_version([group.set_column(place, "weight_versions", mixed)])


def test_the_table_and_the_file_say_the_same(tmp_path: Path) -> None:
    groups = trajectories([(3, [4, 4])], rewards=[[1.0, 0.0]])
    completions = [(each, "abcd") for each in chosen(groups, 0, 2)]
    rewards = (((1.0, 0.0), (1.0, 1.0)), ((0.0, 1.0), (0.0, 0.0)))
    measured = [
        Measured((0, 2), 4, each.reward, own, (0.0, 1.0))
        for (each, _), own in zip(completions, rewards, strict=True)
    ]
    credits = {"grpo": {(0, 0): np.array([1.0, 1.0, 1.0, 1.0]), (0, 1): None}}
    some, none = Estimate(0.5, 0.25, 0.75), Estimate(math.nan, math.nan, math.nan)
    ways = {"grpo": Directions(some, none, ""), "raft": Directions(none, some, "it is 0")}
    credits["raft"] = {}
    found = report.of(completions, measured, credits, ways)
    report.write(tmp_path, found)
    rows = pyarrow.parquet.read_table(tmp_path / SEGMENTS).to_pylist()
    assert [row["advantage"] for row in rows] == [0.5, 0.0, -0.5, 0.0]
    assert [row["text"] for row in rows] == ["ab", "cd"] * 2
    assert [row["credit/grpo"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert "8 judged continuations" in found.table
    lines = {line.split("  ")[0]: line for line in found.table.splitlines()}
    assert "0.50 [0.25, 0.75]" in lines["grpo"] and lines["grpo"].endswith("not known")
    assert "raft: no gradient, it is 0" in found.table
    said = json.loads((tmp_path / RESULTS).read_text())["gradients"]
    assert said["grpo"]["cosine"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert said["raft"]["cosine"]["value"] is None and said["raft"]["missing"] == "it is 0"


def softmax_gradient(policy: TablePolicy, sequence: tuple[int, ...], of: np.ndarray) -> np.ndarray:
    """Sum over tokens of what each is credited with, times the gradient of its log-probability."""
    place = {prefix: row for row, prefix in enumerate(policy.chances)}
    found = np.zeros((len(place), VOCABULARY))
    for t, (token, advantage) in enumerate(zip(sequence, of, strict=True)):
        found[place[sequence[:t]]] += advantage * (
            np.eye(VOCABULARY)[token] - policy.chances[sequence[:t]]
        )
    return found.ravel().astype(np.float32)


def test_gradients_of_the_truth_agree_as_far_as_the_noise_allows() -> None:
    """Policy and values are enumerated, so that the true gradient is known."""
    policy, random = TablePolicy(7), np.random.default_rng(0)
    sequences = [policy.go_on((), random) for _ in range(40)]
    true = np.stack([softmax_gradient(policy, s, policy.truth(s, EVERY)) for s in sequences])
    for samples in (2, 8, 200):
        measured = [policy.measured(s, EVERY, samples, seed=i) for i, s in enumerate(sequences)]

        def of(found: list[Measured], sequences: list[tuple[int, ...]] = sequences) -> np.ndarray:
            pairs = zip(sequences, found, strict=True)
            return np.stack([softmax_gradient(policy, s, m.of_tokens()) for s, m in pairs])

        halves = cosine(of([m.half(0) for m in measured]), of([m.half(1) for m in measured]))
        found, bound = cosine(true, of(measured)), from_halves(halves.value)
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(bound, abs=0.06)
        assert cosine(-true, of(measured)).value == pytest.approx(-found.value)
    assert found.value > 0.99


def test_a_cosine_needs_two_gradients_and_its_interval_two_completions() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(6, 50)).astype(np.float32)
    found = cosine(one, 3 * one)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert cosine(one, -one).value == pytest.approx(-1)
    other = random.normal(size=(6, 50)).astype(np.float32)
    a, b = one.sum(0).astype(float), other.sum(0).astype(float)
    assert cosine(one, other).value == pytest.approx(a @ b / math.sqrt(a @ a * (b @ b)), rel=1e-5)
    assert math.isnan(cosine(one, 0 * one).value) and math.isnan(cosine(one, 0 * one).low)
    opposed = np.concatenate([one, -one])  # add up to 0 but for rounding
    assert math.isnan(cosine(opposed, np.concatenate([one, one])).value)
    alone = cosine(one[:1], one[:1])
    assert alone.value == pytest.approx(1) and math.isnan(alone.low)
    assert math.isnan(cosine(one[:0], one[:0]).value)


POINTS = (0, 3)


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerRank]:
    with worker(save_tiny_model(tmp_path_factory.mktemp("tiny")), temperature=1.0) as made:
        yield made


def way_of(
    rank: LearnerRank,
    recipe: str,
    credit: dict[int, list[float]],
    known: dict[int, list[float]],
    count: int = 2,
) -> Directions:
    """Of a rule that credits the two segments of each completion of a group so.

    Args:
        known: the measured advantages of the segments. count: continuations, all alike.
    """
    made = trajectories([(5, [6] * 4)], rewards=[[1.0, 0.0, 1.0, 0.0]])
    (group,) = groups = on_policy(rank, made)
    config = load_config([], ["model.path=m", f"recipe={recipe}"], RECIPES)
    rows = [
        {
            "group_id": 0,
            "completion_index": i,
            "advantage": credit[i][0] if i in credit else 0.0,
            "token_weight": float(i in credit) / 24,
            "advantages": list(np.repeat(credit[i], 3)) if i in credit else None,
        }
        for i in range(group.num_rows)
    ]
    rewards = group.column("reward").to_pylist()
    measured = {
        (0, i): Measured(
            POINTS,
            6,
            rewards[i],
            ((rewards[i] - one - two,) * count, (rewards[i] - two,) * count),
            (0.0, 1.0),
        )
        for i, (one, two) in known.items()
    }
    batch = StepBatch.from_record_batches(groups)
    return of_rule(rank.trainer, batch, groups, config, pa.Table.from_pylist(rows), measured)


WORTH = {0: [0.5, 0.25], 1: [-1.0, 0.25], 3: [0.125, 0.0]}


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "gspo", "cispo", "sapo"])
def test_a_rule_that_credits_what_was_measured_has_its_gradient(
    rank: LearnerRank, recipe: str
) -> None:
    found = way_of(rank, recipe, WORTH, WORTH)
    assert found.cosine.value == pytest.approx(1, abs=1e-5)
    assert found.cosine.low == pytest.approx(1, abs=1e-5)
    assert found.ceiling.value == pytest.approx(1, abs=1e-5)
    assert found.missing == ""
    opposite = {i: [-a for a in each] for i, each in WORTH.items()}
    assert way_of(rank, recipe, opposite, WORTH).cosine.value == pytest.approx(-1, abs=1e-5)
    early = {i: [each[0], 0.0] for i, each in WORTH.items()}
    assert -0.999 < way_of(rank, recipe, early, WORTH).cosine.value < 0.999


def test_no_gradient_has_no_cosine_and_says_so(rank: LearnerRank) -> None:
    nothing = {i: [0.0, 0.0] for i in WORTH}
    found = way_of(rank, "grpo", nothing, WORTH)
    assert math.isnan(found.cosine.value) and found.missing.startswith("its gradient")
    assert found.ceiling.value == pytest.approx(1, abs=1e-5)
    found = way_of(rank, "grpo", WORTH, nothing)
    assert math.isnan(found.cosine.value) and found.missing.startswith("the measured gradient")
    once = way_of(rank, "grpo", WORTH, WORTH, count=1)
    assert once.cosine.value == pytest.approx(1, abs=1e-5)
    assert math.isnan(once.ceiling.value)  # of one continuation there are no halves


def test_a_completion_that_a_rule_leaves_out_counts_as_measured(rank: LearnerRank) -> None:
    """The rule has no gradient there, and what was measured has one."""
    fewer = {i: WORTH[i] for i in (0, 3)}
    both = way_of(rank, "raft", fewer, WORTH)
    assert 0 < both.cosine.value < 0.95
    assert way_of(rank, "raft", fewer, fewer).cosine.value == pytest.approx(1, abs=1e-5)
