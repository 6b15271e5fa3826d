"""Packed rows against one plain sequence at a time through the untouched model."""

from __future__ import annotations

import copy

import pytest
import torch
from learner_models import ARCHITECTURES, random_groups, tiny_model
from plain_passes import ROW_SHAPES, assert_same_pass, one_at_a_time, spread_weights
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from common.errors import UserError
from learner.policy.attention import ATTENTION_NAME, _for_each_head, build_layout
from learner.policy.model import Policy
from learner.policy.packing import pack_row
from learner.policy.tries import SegmentLengths


def _packed(model, segments, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    policy = Policy(model, chunk_tokens=7)
    count = sum(len(c) for _, cs in segments for c in cs)
    row = pack_row(segments, range(sum(len(cs) for _, cs in segments)), "cpu")
    logprobs_N, _ = policy.logprobs(row, temperature=temperature)
    (logprobs_N * spread_weights(count)).sum().backward()
    return logprobs_N.detach(), {n: p.grad for n, p in policy.model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_one_sequence_at_a_time(architecture: str, temperature: float) -> None:
    model = tiny_model(architecture)
    groups = random_groups(ROW_SHAPES)
    expected = one_at_a_time(copy.deepcopy(model), groups, temperature)
    assert_same_pass(_packed(copy.deepcopy(model), groups, temperature), expected)
    copies = [(prompt, [c]) for prompt, completions in groups for c in completions]
    assert_same_pass(_packed(model, copies, temperature), expected)


def test_completions_see_neither_each_other_nor_other_segments() -> None:
    groups = random_groups([(6, (8, 8)), (5, (4, 4, 4))])
    policy = Policy(tiny_model("qwen2"), chunk_tokens=64)
    before_N, _ = policy.logprobs(pack_row(groups, range(5), "cpu"), temperature=1.0)
    groups[0][1][0][:-1] += 1  # labels of the first completion change with it
    after_N, _ = policy.logprobs(pack_row(groups, range(5), "cpu"), temperature=1.0)
    torch.testing.assert_close(before_N[8:], after_N[8:], atol=1e-6, rtol=0)
    assert (before_N[:8] - after_N[:8]).abs().max() > 1e-3


def test_every_row_has_one_cell_and_padding_is_bounded() -> None:
    lengths = [SegmentLengths(p, (c, 3 * c, 1)) for p, c in [(4, 900), (2000, 20), (30, 600)]]
    layout = build_layout(lengths, "cpu")
    tokens = sum(s.tokens for s in lengths)
    assert torch.equal(layout.cell_rows[layout.row_cells_T], torch.arange(tokens))
    grids = [g for b in layout.blocks for g in (b.roots, *(leaf.grid for leaf in b.leaves))]
    cells = sum(g.count * g.length for g in grids)
    assert cells == len(layout.cell_rows)
    assert cells <= 1.25 * tokens + 1024 * len(grids)
    assert layout.padding is not None and int(layout.padding.sum()) == cells - tokens


def test_transformers_makes_no_mask_for_us() -> None:
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def test_model_without_layout_is_refused() -> None:
    policy = Policy(tiny_model("qwen2"), chunk_tokens=64)
    with pytest.raises(UserError, match="packed learner"):
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_keys_repeated_for_each_head_are_those_of_grouped_attention() -> None:
    """What CUDA gets under a mask; a rule of torch's own kernel is the oracle."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=draw) for heads in (6, 2, 2))
    mask = torch.randn(2, 1, 5, 5, generator=draw)
    attend = torch.nn.functional.scaled_dot_product_attention
    repeated = attend(query, *_for_each_head(query, key, value), mask)
    torch.testing.assert_close(repeated, attend(query, key, value, mask, enable_gqa=True))
