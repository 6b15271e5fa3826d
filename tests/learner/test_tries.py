"""Groups that are trees, packed as tries: each token once, and the numbers of each answer alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_models import ARCHITECTURES, tiny_model
from made_up_trees import Node, batches, edges_of, random_tree, rows_of, trees
from plain_passes import assert_same_pass, one_at_a_time, spread_weights

from learner.policy.attention import build_layout
from learner.policy.model import Policy
from learner.policy.packing import PackedRow, PackingPlan, pack_microbatch, plan_packing
from learner.policy.step_batch import StepBatch
from learner.policy.tries import SegmentLengths


def planned(batch: StepBatch, budget: int, trained=None, ranks=1, share=True) -> PackingPlan:
    chosen = np.ones(len(batch.group_B), bool) if trained is None else trained
    return plan_packing(
        batch, chosen, ranks=ranks, budget=budget, share_prefix=share, pairs_per_token=384.0
    )


def rows_in(batch: StepBatch, budget: int, share: bool = True) -> list[PackedRow]:
    found = planned(batch, budget, share=share).microbatches[0]
    return [pack_microbatch(batch, segments, "cpu") for segments in found]


def tokens_of(root: Node) -> int:
    return sum(len(child.ids) for _, child, _ in edges_of(root))


def test_every_token_of_a_tree_is_computed_once() -> None:
    roots = trees(5)
    batch = StepBatch.from_record_batches(batches(roots))
    (row,) = rows_in(batch, 4096)
    once = sum(len(prompt) for prompt in batch.prompts) + sum(map(tokens_of, roots))
    assert row.input_ids_1T.shape[1] == once
    assert len(row.labels_M) == len(row.predictor_rows_M) == sum(map(tokens_of, roots))
    plain = sum(r.input_ids_1T.shape[1] for r in rows_in(batch, 4096, share=False))
    assert once < 0.7 * plain
    assert row.place_N is not None
    ids = torch.from_numpy(batch.token_ids)
    expected = torch.cat([ids[batch.tokens_of(c)] for c in row.completions])
    assert torch.equal(row.labels_M[row.place_N], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_numbers_and_gradients_are_those_of_each_answer_alone(architecture: str) -> None:
    """Windows and soft caps included; several levels, and some trees cut between micro-batches."""
    model, roots = tiny_model(architecture), trees(6)
    batch = StepBatch.from_record_batches(batches(roots))
    groups = [
        (prompt, [np.array(row.ids) for row in rows_of(root)])
        for prompt, root in zip(batch.prompts, roots, strict=True)
    ]
    expected = one_at_a_time(copy.deepcopy(model), groups, 0.7)
    weights_N = spread_weights(len(batch.token_ids))
    for budget in (4096, 60):
        policy = Policy(copy.deepcopy(model), chunk_tokens=7)
        logprobs_N = torch.zeros(len(batch.token_ids))
        for row in rows_in(batch, budget):
            found_N, _ = policy.logprobs(row, temperature=0.7)
            at_N = torch.cat(
                [torch.arange(*batch.tokens_of(c).indices(9**9)) for c in row.completions]
            )
            (found_N * weights_N[at_N]).sum().backward()
            logprobs_N[at_N] = found_N.detach()
        gradients = {n: p.grad for n, p in policy.model.named_parameters()}
        assert_same_pass((logprobs_N, gradients), expected)


def test_a_branch_sees_its_way_and_nothing_beside_it() -> None:
    """What is said in another branch, or behind the place where it leaves, does not reach it."""
    lengths = SegmentLengths(2, (4, 3, 2), (-1, 0, 1), (0, 2, 3))
    assert [way.tolist() for way in lengths.ways] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 6, 7, 8],
        [0, 1, 2, 3, 6, 9, 10],
    ]
    assert (lengths.tokens, lengths.longest, lengths.root) == (11, 7, 2)
    layout = build_layout([lengths], "cpu")
    assert torch.equal(layout.cell_rows[layout.row_cells_T], torch.arange(11))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    ranks=st.integers(1, 3),
    budget=st.integers(8, 200),
    share=st.booleans(),
)
def test_plans_are_partitions_within_the_budget(
    seed: int, ranks: int, budget: int, share: bool
) -> None:
    random = np.random.default_rng(seed)
    roots = [random_tree(random, (3, 2, 2)), random_tree(random, (2, 3))]
    batch = StepBatch.from_record_batches(batches(roots))
    trained = random.random(len(batch.group_B)) < 0.7
    found = planned(batch, budget, trained, ranks, share)
    segments = [s for rank in found.microbatches for members in rank for s in members]
    completions = sorted(c for segment in segments for c in segment.completions)
    assert completions == np.flatnonzero(trained).tolist()
    assert len({len(rank) for rank in found.microbatches}) == 1
    for members in (m for rank in found.microbatches for m in rank):
        alone = len(members) == 1 and len(members[0].completions) == 1
        assert sum(s.tokens for s in members) <= budget or alone
        row = pack_microbatch(batch, members, "cpu")
        assert row.input_ids_1T.shape[1] == max(1, sum(s.tokens for s in members))
        assert row.lengths == tuple(int(batch.lengths_B[c]) for c in row.completions)
    assert share or all(len(segment.completions) == 1 for segment in segments)


def test_siblings_share_what_an_answer_has_that_is_not_there() -> None:
    """The first of them has the tokens itself, also where their parent's parent is away too."""
    for seed in range(20):
        roots = trees(seed)
        batch = StepBatch.from_record_batches(batches(roots))
        assert batch.trees is not None
        parents = batch.trees.parent_B.tolist()
        trained = np.array([parents.count(c) == 0 for c in range(len(parents))])
        row = pack_microbatch(batch, planned(batch, 4096, trained).microbatches[0][0], "cpu")
        ways = [each.way for root in roots for each in rows_of(root)]
        nodes = {id(node): node for c in row.completions for node in ways[c]}
        behind = {int(batch.group_B[c]) for c in row.completions}
        once = sum(len(node.ids) for node in nodes.values())
        assert row.input_ids_1T.shape[1] == once + sum(len(batch.prompts[g]) for g in behind)
