"""Groups that are trees: values and advantages of nodes, and how the learner trains on them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, moments, weights, worker
from made_up_trees import Node, Row, batches, edges_of, rows_of, trees, values_of

from common.config.algorithm import AdvantageConfig, AlgorithmConfig
from common.errors import RunError, UserError
from common.record.turns import turn
from learner.algorithm.advantage_inputs import AdvantageInputs, TokenAdvantages
from learner.algorithm.recipe_checks import check_recipe
from learner.algorithm.rewarded import StepTokens, Trees
from learner.algorithm.traces import PackedAxis
from learner.algorithm.trees import tree_values
from learner.policy.step_batch import StepBatch


def inputs(groups: list[list[Row]], **changes: Any) -> AdvantageInputs:
    """A step of groups of such completions."""
    rows = [row for group in groups for row in group]
    firsts = np.cumsum([0, *map(len, groups)])
    parents = [
        row.parent if row.parent < 0 else int(first) + row.parent
        for group, first in zip(groups, firsts, strict=False)
        for row in group
    ]
    total, given = sum(len(row.ids) for row in rows), torch.tensor([row.given for row in rows])
    rewards_B = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    mask_N = torch.cat([torch.arange(len(row.ids)) >= row.given for row in rows])
    logprobs_N = torch.full((total,), -1.0).masked_fill(~mask_N, math.nan)
    return AdvantageInputs(
        advantages_B=rewards_B,
        rewards_B=rewards_B,
        group_B=torch.tensor([g for g, group in enumerate(groups) for _ in group]),
        kept_B=~rewards_B.isnan(),
        tokens=StepTokens(
            PackedAxis(torch.tensor([len(row.ids) for row in rows])),
            torch.arange(total),
            mask_N,
            changes.get("logprobs_N", logprobs_N),
            trees=Trees(torch.tensor(parents), given),
        ),
        baseline=lambda values, groups, lengths: values,
    )


def found(given: AdvantageInputs, **args: Any) -> TokenAdvantages:
    return tree_values(given, AdvantageConfig(kind="tree_values"), **args)


@pytest.mark.parametrize("divide", ["none", "deviation"])
def test_advantages_are_those_of_the_recursion_over_nodes(divide: str) -> None:
    """Beside an independent recursion from the root, edge by edge."""
    for seed in range(30):
        roots = trees(seed)
        groups = [rows_of(root) for root in roots]
        given = inputs(groups)
        parts = iter(
            found(given, divide=divide).advantages_N.split(given.tokens.axis.lengths_B.tolist())
        )
        for root, group in zip(roots, groups, strict=True):
            values = values_of(root)
            for row in group:
                expected, place = [], 0
                for parent, node in itertools.pairwise((root, *row.way)):
                    step = values[id(node)][0] - values[id(parent)][0]
                    if divide == "deviation":
                        step /= values[id(parent)][1] + 1e-8
                    own = place >= row.given
                    expected += [step if own else 0.0] * len(node.ids)
                    place += len(node.ids)
                assert next(parts).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_advantages_on_the_way_to_a_leaf_add_up_to_its_reward_less_the_value_of_the_root() -> (
    None
):
    """Whoever sampled the nodes: those that were given are credited in another completion."""
    for seed in range(20):
        (root,) = trees(seed, 1)
        group = rows_of(root)
        given = inputs([group])
        parts = found(given).advantages_N.split(given.tokens.axis.lengths_B.tolist())
        of_node: dict[int, float] = {}
        for row, part in zip(group, parts, strict=True):
            place = 0
            for node in row.way:
                if place >= row.given:
                    assert id(node) not in of_node  # trained once
                    of_node[id(node)] = float(part[place])
                place += len(node.ids)
        assert len(of_node) == sum(1 for _ in edges_of(root))
        start = values_of(root)[id(root)][0]
        for row in group:
            total = sum(of_node[id(node)] for node in row.way)
            assert total == pytest.approx(row.reward - start, abs=1e-12)


def test_a_group_in_which_nothing_goes_on_has_the_reward_less_the_mean() -> None:
    rows = [Row([1] * n, 0, -1, reward, ()) for n, reward in ((2, 1.0), (3, 0.0), (1, 0.5))]
    assert found(inputs([rows])).advantages_N.tolist() == [0.5] * 2 + [-0.5] * 3 + [0.0]
    divided = found(inputs([rows]), divide="deviation").advantages_N
    assert divided[0].item() == pytest.approx(0.5 / math.sqrt(1 / 6))


def test_a_whole_tree_of_coins_has_its_true_advantages() -> None:
    """Every continuation is there once, so that means are expectations, known exactly."""

    def value(prefix: tuple[int, ...]) -> float:
        ends = itertools.product((0, 1), repeat=4 - len(prefix))
        return sum(sum(prefix + end) >= 2 for end in ends) / 2 ** (4 - len(prefix))

    def grow(prefix: tuple[int, ...]) -> Node:
        ids = list(prefix[-1:])
        if len(prefix) == 4:
            return Node(ids, reward=value(prefix))
        return Node(ids, [grow((*prefix, coin)) for coin in (0, 1)])

    group = rows_of(grow(()))
    assert len(group) == 16
    parts = found(inputs([group])).advantages_N.split([4] * 16)
    for row, part in zip(group, parts, strict=True):
        ids = tuple(row.ids)
        truth = [value(ids[: t + 1]) - value(ids[:t]) if t >= row.given else 0 for t in range(4)]
        assert part.tolist() == pytest.approx(truth, abs=1e-15)


def test_equal_rewards_give_exactly_nothing_and_no_token_counts() -> None:
    (root,) = trees(0, 1)
    group = [Row(row.ids, row.given, row.parent, 0.1, row.way) for row in rows_of(root)]
    answer = found(inputs([group]), divide="deviation")
    assert (answer.advantages_N == 0).all()
    assert answer.counted_N is not None
    assert not answer.counted_N.any()


def test_what_nobody_could_judge_is_in_no_value() -> None:
    """Two completions; two others go on from the first, and one of these has no reward."""
    nan = math.nan
    rows = [
        Row([1, 2, 3, 4], 0, -1, 1.0, ()),
        Row([5, 6], 0, -1, 0.0, ()),
        Row([1, 2, 7], 2, 0, nan, ()),
        Row([1, 2, 8, 9], 2, 0, 0.0, ()),
    ]
    answer = found(inputs([rows])).advantages_N
    # V of the first two tokens is the mean of 1 and 0, that of the root the mean of 0.5 and 0.
    assert answer.tolist() == [0.25, 0.25, 0.5, 0.5, -0.25, -0.25, 0, 0, 0, 0, 0, -0.5, -0.5]
    lost = [Row(row.ids, row.given, row.parent, nan, ()) for row in rows]
    assert not found(inputs([lost])).advantages_N.any()


def test_sure_tokens_leave_the_loss() -> None:
    rows = [Row([1, 2], 0, -1, 1.0, ()), Row([3, 4], 0, -1, 0.0, ())]
    logprobs = torch.tensor([0.95, 0.5, 0.5, 0.95]).log()
    answer = found(inputs([rows], logprobs_N=logprobs), zero_above=0.9)
    assert answer.advantages_N.tolist() == [0, 0.5, -0.5, 0]
    assert answer.counted_N is not None
    assert answer.counted_N.tolist() == [False, True, True, False]
    kept = found(inputs([rows], logprobs_N=logprobs), zero_above=0.9, drop=False)
    assert kept.counted_N is None
    white = found(inputs([rows], logprobs_N=logprobs), zero_above=0.9, whiten=True)
    assert white.advantages_N[1:3].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def of_trees(**args: Any) -> AlgorithmConfig:
    algorithm = AlgorithmConfig()
    algorithm.baseline.kind, algorithm.aggregation.kind = "none", "token_mean"
    algorithm.advantage.kind, algorithm.advantage.args = "tree_values", args
    return algorithm


def trained(folder: Path, groups: list[pa.RecordBatch], **changes: Any) -> tuple[Any, Any, Any]:
    changes = {"correction_kind": "none", "tokens_per_microbatch": 128} | changes
    with worker(folder, **changes) as made:
        metrics = [made.step(groups, 0, 0, None)]
        exported = {name: tensor.float().numpy() for name, tensor in weights(made).items()}
        return metrics, exported, moments(made)


def test_a_tree_trains_as_its_edges_do(folder: Path) -> None:
    """Each edge a completion of its own behind all that leads to it, as the official code has it.

    Those without an advantage are not there: so they are in no denominator.
    """
    roots = trees(1)
    groups = batches(roots)
    edges = []
    for root, group in zip(roots, groups, strict=True):
        values, record = values_of(root), group.to_pylist()[0]
        rows = []
        for parent, child, way in edges_of(root):
            gain = values[id(child)][0] - values[id(parent)][0]
            if abs(gain) < 1e-12:
                continue
            before = [token for node in way for token in node.ids]
            rows.append(
                record
                | {
                    "completion_index": len(rows),
                    "prompt_ids": record["prompt_ids"] + before,
                    "token_ids": child.ids,
                    "behaviour_logprobs": [-1.0] * len(child.ids),
                    "weight_versions": [0] * len(child.ids),
                    "loss_mask": [True] * len(child.ids),
                    "turns": [turn(0, len(child.ids), "stop")],
                    "reward": gain,
                }
            )
        edges.append(pa.RecordBatch.from_pylist(rows, schema=group.schema))
    plain = AlgorithmConfig()
    plain.baseline.kind, plain.aggregation.kind = "none", "token_mean"
    ours, theirs = (
        trained(folder, groups, algorithm=of_trees()),
        trained(folder, edges, algorithm=plain),
    )
    assert ours[0][0]["completions/joined"] == sum(
        row.parent >= 0 for root in roots for row in rows_of(root)
    )
    assert "completions/joined" not in theirs[0][0]
    assert ours[0][0]["tokens/trained"] == theirs[0][0]["tokens/trained"] > 0
    assert ours[0][0]["grad_norm"] == pytest.approx(theirs[0][0]["grad_norm"], rel=1e-5)
    for name, moment in theirs[2].items():
        np.testing.assert_allclose(ours[2][name], moment, rtol=1e-3, atol=2e-7)


def test_dropped_tokens_are_as_if_they_had_been_masked(folder: Path) -> None:
    """Also with a KL term and an entropy bonus, which they have no part in then."""
    roots = trees(2)
    groups = batches(roots)
    masked = []
    for root, group in zip(roots, groups, strict=True):
        values, rows, records = values_of(root), rows_of(root), group.to_pylist()
        for row, record in zip(rows, records, strict=True):
            mask, place = [], 0
            for parent, node in itertools.pairwise((root, *row.way)):
                gain = abs(values[id(node)][0] - values[id(parent)][0]) > 1e-12
                mask += [gain and place >= row.given] * len(node.ids)
                place += len(node.ids)
            record["loss_mask"] = mask
        masked.append(pa.RecordBatch.from_pylist(records, schema=group.schema))
    terms = {"kl": 0.1, "entropy": 0.01}
    found = []
    for groups_, drop in ((groups, True), (masked, False)):
        algorithm = of_trees(drop=drop)
        for name, value in terms.items():
            setattr(algorithm.objective, name, value)
        found.append(trained(folder, groups_, algorithm=algorithm))
    assert found[0][0][0]["grad_norm"] > 0
    assert found[0][0][0]["grad_norm"] == found[1][0][0]["grad_norm"]
    for name, moment in found[1][2].items():
        np.testing.assert_array_equal(found[0][2][name], moment)


@pytest.mark.parametrize("budget", [64, 4096])
def test_a_step_on_tries_is_the_step_on_answers_alone(folder: Path, budget: int) -> None:
    keys = {"algorithm": of_trees(), "tokens_per_microbatch": budget}
    shared = trained(folder, batches(trees(8)), **keys)
    alone = trained(folder, batches(trees(8)), packing="sequence", **keys)
    assert shared[0][0]["grad_norm"] == pytest.approx(alone[0][0]["grad_norm"], rel=1e-5)
    for name, moment in alone[2].items():
        np.testing.assert_allclose(shared[2][name], moment, rtol=1e-3, atol=2e-7)


def test_a_plain_group_is_trained_on_as_by_dr_grpo(folder: Path) -> None:
    """Bitwise where no advantage is 0: the same mean, over the same tokens."""
    groups = trajectories(SHAPES)
    centred = AlgorithmConfig()
    centred.baseline.kind, centred.aggregation.kind = "dr_grpo", "token_mean"
    ours = trained(folder, groups, algorithm=of_trees(drop=False))
    theirs = trained(folder, groups, algorithm=centred)
    assert ours[0][0]["grad_norm"] == pytest.approx(theirs[0][0]["grad_norm"], rel=1e-6)
    for name, moment in theirs[2].items():
        np.testing.assert_allclose(ours[2][name], moment, rtol=1e-4, atol=1e-9)


def test_groups_without_trees_have_none() -> None:
    batch = StepBatch.from_record_batches(trajectories(SHAPES))
    assert batch.trees is None


def test_parents_are_found_by_their_index_in_every_group() -> None:
    roots = trees(3)
    groups = batches(roots)
    found = StepBatch.from_record_batches(groups).trees
    assert found is not None
    first, expected = 0, []
    for root in roots:
        rows = rows_of(root)
        expected += [(row.parent + first if row.parent >= 0 else -1, row.given) for row in rows]
        first += len(rows)
    assert list(zip(found.parent_B.tolist(), found.given_B.tolist(), strict=True)) == expected


@pytest.mark.parametrize("change", ["order", "tokens", "missing"])
def test_a_completion_that_does_not_go_on_from_its_parent_is_an_error(change: str) -> None:
    group = batches(trees(4, 1))[0]
    records = group.to_pylist()
    at = next(n for n, record in enumerate(records) if record["continues"] >= 0)
    if change == "order":
        records[at]["continues"] = at
    elif change == "tokens":
        records[at]["token_ids"] = [95, *records[at]["token_ids"][1:]]
    else:
        records[at]["continues"] = 500
    wrong = pa.RecordBatch.from_pylist(records, schema=group.schema)
    with pytest.raises(RunError, match="does not go on from completion"):
        StepBatch.from_record_batches([wrong])


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rollout", "overlong_penalty_share", 0.5),
        ("rollout", "prune_rate", 0.5),
        ("rollout", "max_variance_share", 0.5),
        ("objective", "kind", "gpg"),
    ],
)
def test_what_changes_the_reward_of_some_leaves_is_refused(
    section: str, key: str, value: Any
) -> None:
    algorithm = of_trees()
    check_recipe(algorithm, "none")
    setattr(getattr(algorithm, section), key, value)
    with pytest.raises(UserError, match="kind=tree_values compares that"):
        check_recipe(algorithm, "none")


def test_a_tree_with_dynamic_sampling_is_no_contradiction() -> None:
    algorithm = of_trees()
    algorithm.rollout.dynamic_sampling = True
    check_recipe(algorithm, "none")
