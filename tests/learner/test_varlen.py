"""Variable-length attention: what it hands to torch's kernel, and the proof at the start.

The kernel runs on CUDA alone. Its place is taken by the definition in torch's documentation, one
sequence at a time: everything around it is then compared with the untouched model.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_models import random_groups, save_tiny_model, tiny_config, tiny_model
from learner_ranks import assert_same_training, make_worker, on_ranks, train, train_work
from made_up_trees import batches, trees
from plain_passes import ROW_SHAPES, assert_same_pass, one_at_a_time, spread_weights
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, PreTrainedModel

import learner.policy.model
from common.config.load import load_config
from common.errors import UserError
from deploy.run.service import _check
from learner.policy import varlen
from learner.policy.attention import ATTENTION_NAME
from learner.policy.model import Policy, use_varlen
from learner.policy.packing import pack_microbatch, pack_row, plan_packing
from learner.policy.step_batch import StepBatch
from learner.policy.varlen import VARLEN_NAME
from learner.training.memory import OtherModels


def by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_edges: Tensor,
    key_edges: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    corner: str = "lower right",
) -> Tensor:
    """`varlen_attn` with a causal mask: [T, heads, D], the sequences cut at the edges."""
    left, right = window_size
    assert right == 0
    assert query_edges.dtype == key_edges.dtype == torch.int32
    assert longest_query == int(query_edges.diff().max())
    assert longest_key == int(key_edges.diff().max())
    assert int(query_edges[-1]) == len(query)
    assert int(key_edges[-1]) == len(key) == len(value)
    outputs = []
    for s in range(len(query_edges) - 1):
        q = query[query_edges[s] : query_edges[s + 1]].transpose(0, 1)
        k, v = (x[key_edges[s] : key_edges[s + 1]].transpose(0, 1) for x in (key, value))
        shift = k.shape[1] - q.shape[1] if corner == "lower right" else 0
        back = torch.arange(q.shape[1])[:, None] + shift - torch.arange(k.shape[1])
        visible = (back >= 0) & (back <= left if left >= 0 else back >= 0)
        out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def windowed() -> PreTrainedModel:
    """Gemma 2 with its window of 8 tokens and its soft cap of scores left out."""
    config = tiny_config("gemma2")
    config.attn_logit_softcapping = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    **{
        name: lambda name=name: tiny_model(name)
        for name in ("qwen2", "llama_tied", "gpt_neox", "granite")
    },
    "windowed": windowed,
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_gradients_are_those_of_one_sequence_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    model, groups = MODELS[name](), random_groups(ROW_SHAPES)
    expected = one_at_a_time(copy.deepcopy(model), groups, 0.7)
    for segments in (groups, [(p, [c]) for p, cs in groups for c in cs], [*groups, *groups[::-1]]):
        policy = Policy(copy.deepcopy(model), chunk_tokens=7)
        policy.model.config._attn_implementation = VARLEN_NAME
        row = pack_row(segments, range(sum(len(cs) for _, cs in segments)), "cpu")
        logprobs_N, _ = policy.logprobs(row, temperature=0.7)
        count = len(expected[0])
        (logprobs_N[:count] * spread_weights(count)).sum().backward()
        found = {n: p.grad for n, p in policy.model.named_parameters()}
        assert_same_pass((logprobs_N[:count].detach(), found), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_trie_is_read_as_the_grids_read_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    batch = StepBatch.from_record_batches(batches(trees(7)))
    every = np.ones(len(batch.group_B), bool)
    keys: dict[str, Any] = {"ranks": 1, "share_prefix": True, "pairs_per_token": 384.0}
    (segments,) = plan_packing(batch, every, budget=4096, **keys).microbatches[0]
    row = pack_microbatch(batch, segments, "cpu")
    assert row.place_N is not None
    model, passes = MODELS[name](), []
    for attention in (ATTENTION_NAME, VARLEN_NAME):
        policy = Policy(copy.deepcopy(model), chunk_tokens=7)
        policy.model.config._attn_implementation = attention
        found_N, _ = policy.logprobs(row, temperature=0.7)
        row.layout.derived.clear()
        (found_N * spread_weights(len(found_N))).sum().backward()
        passes.append((found_N.detach(), {n: p.grad for n, p in policy.model.named_parameters()}))
    assert_same_pass(*passes)


def test_a_row_of_one_idle_token_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    policy = Policy(tiny_model("qwen2"), chunk_tokens=7)
    policy.model.config._attn_implementation = VARLEN_NAME
    logprobs_N, _ = policy.logprobs(pack_row([], [], "cpu"), temperature=1.0)
    logprobs_N.sum().backward()
    assert len(logprobs_N) == 0


def test_each_layer_after_the_first_reuses_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    edges: list[int] = []

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        edges.append(id(args[3]))
        return by_definition(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", seen)
    policy = Policy(tiny_model("qwen2"), chunk_tokens=64)
    policy.model.config._attn_implementation = VARLEN_NAME
    row = pack_row(random_groups(ROW_SHAPES), range(8), "cpu")
    policy.logprobs(row, temperature=1.0)
    assert len(edges) == 2
    assert len(set(edges)) == 1


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """Shapes and keywords of the installed torch, forward and backward, traced without a device."""
    q, k, v = (
        torch.empty(count, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for count, heads in ((9, 4), (13, 2), (13, 2))
    )
    edges = torch.empty(4, dtype=torch.int32, device="meta")
    out = varlen_attn(q, k, v, edges, edges, 5, 9, scale=0.25, window_size=(7, 0), enable_gqa=True)
    assert out.shape == q.shape
    out.sum().backward()
    assert k.grad is not None
    assert k.grad.shape == k.shape


def test_soft_caps_are_refused() -> None:
    policy = Policy(tiny_model("gemma2"), chunk_tokens=7)
    policy.model.config._attn_implementation = VARLEN_NAME
    with pytest.raises(UserError, match=r"learner\.attention=grids"):
        policy.logprobs(pack_row(random_groups(ROW_SHAPES), range(8), "cpu"), temperature=1.0)


def prove(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Policy:
    """`use_varlen` with `kernel` in the place of torch's, on a CPU."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(learner.policy.model, "VARLEN_DEVICES", {"cpu"})
    policy = Policy(tiny_model("qwen2"), chunk_tokens=7)
    assert policy.model.config._attn_implementation == ATTENTION_NAME
    use_varlen(policy, torch.device("cpu"), temperature=1.0)
    return policy


def test_a_right_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = prove(monkeypatch, by_definition)
    assert policy.model.config._attn_implementation == VARLEN_NAME


def test_a_kernel_that_aligns_the_other_corner_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="disagrees with"):
        prove(monkeypatch, partial(by_definition, corner="upper left"))


def test_a_kernel_with_a_wrong_backward_pass_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_keys(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return by_definition(query, key.detach(), *args, **kwargs)

    with pytest.raises(UserError, match=r"and by 0\.\d+ of the gradient"):
        prove(monkeypatch, without_keys)


def test_a_policy_that_does_not_learn_is_proved_without_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    monkeypatch.setattr(learner.policy.model, "VARLEN_DEVICES", {"cpu"})
    policy = Policy(tiny_model("qwen2").requires_grad_(False), chunk_tokens=7)
    use_varlen(policy, torch.device("cpu"), temperature=1.0)
    assert policy.model.config._attn_implementation == VARLEN_NAME


def test_a_kernel_that_does_not_run_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("no such kernel")

    with pytest.raises(UserError, match=r"no such kernel: use learner\.attention=grids"):
        prove(monkeypatch, none)


def test_a_learner_without_cuda_is_refused() -> None:
    policy = Policy(tiny_model("qwen2"), chunk_tokens=7)
    with pytest.raises(UserError, match=r"cpu is none: use learner\.attention=grids"):
        use_varlen(policy, torch.device("cpu"), temperature=1.0)


def _patched_target(rank: int, ranks: int, folder: Path) -> tuple[Any, Any]:
    varlen.varlen_attn = by_definition
    learner.policy.model.VARLEN_DEVICES = {"cpu"}
    return make_worker(folder, rank, ranks, attention="varlen"), train_work


def test_two_sharded_ranks_learn_what_one_learns_with_the_grids(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    found = on_ranks(2, _patched_target, folder)
    assert_same_training(found[0], train(folder))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_that_cannot_have_it_is_refused_before_anything_starts(device: str) -> None:
    overrides = ["model.path=none", "learner.attention=varlen", "model.dtype=float32"]
    config = load_config([], [*overrides, f"learner.device={device}"])
    with pytest.raises(UserError, match=r"use learner\.attention=grids"):
        _check(config, OtherModels())
