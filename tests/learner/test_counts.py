"""What a step asks of a device, counted on tensors without content: it must not grow back.

Nothing here is timed. Kernels, bytes, products and messages are those of the real modules.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from typing import Any

import pytest
import torch
from fake_step import Count, count_step
from learner_models import random_groups, tiny_model
from torch._dynamo.testing import CompileCounter

from learner.policy import logprobs
from learner.policy.model import Policy, checkpoint_activations
from learner.policy.packing import pack_row
from learner.policy.shape import ModelShape
from learner.training.ways import compile_layers

SHAPE = ModelShape(40_000, 256, 2, 4, 2, 64, 768, False, True)
TOKENS, RANKS, ROUNDS = 4096, 8, 2


@cache
def counted(**ways: Any) -> Count:
    settings = {"tokens": TOKENS, "logits_mib": 160, "microbatches": ROUNDS} | ways
    shape = settings.pop("shape", SHAPE)
    return count_step(shape, settings.pop("ranks", RANKS), **settings)


def test_variable_length_attention_needs_neither_masks_nor_padding() -> None:
    """Grids write keys for every completion, masks for every leaf, and gather both ways."""
    grids, varlen = counted(varlen=False), counted()
    assert varlen.kernels < 0.85 * grids.kernels
    assert varlen.touched < 0.95 * grids.touched
    assert varlen.peak <= grids.peak


def test_a_compiled_head_goes_over_its_logits_four_times() -> None:
    """Read and written in bfloat16 by the products, read once by each kernel, and written once.

    Operation by operation it is some hundred bytes a logit.
    """
    # With the products' inputs, and without the layers: they are the same in both.
    fused, plain = counted(), counted(fused=False)
    logits = ROUNDS * 3840 * SHAPE.vocabulary
    saved = (plain.touched - fused.touched) / logits
    assert saved > 60
    assert plain.kernels > fused.kernels


def test_the_head_adds_its_gradient_up_without_a_narrow_product() -> None:
    """A float32 sum is read and written for each chunk, 8 bytes a weight; with it, 14."""
    small, large = counted(logits_mib=160), counted(logits_mib=640)
    chunks = {mib: -(-3840 // int(mib * 2**20 / (4 * SHAPE.vocabulary))) for mib in (160, 640)}
    more = ROUNDS * (chunks[160] - chunks[640])
    # Each further chunk reads the weight for two products more and for its gradient's.
    per_chunk = (small.touched - large.touched) / more / SHAPE.embedding
    assert per_chunk < 2 + 2 + 2 + 8 + 1


def test_recomputing_costs_a_second_forward_pass_and_saves_the_layers() -> None:
    kept, again = counted(recompute=False), counted()
    # Norms and biases are no products; the last of a layer is not needed again.
    products = 2 * SHAPE.hidden * 64 * (SHAPE.heads + SHAPE.kv_heads)
    products += 2 * SHAPE.hidden * SHAPE.intermediate
    assert again.flops - kept.flops == 2 * SHAPE.layers * products * TOKENS * ROUNDS
    assert again.saved < 0.4 * kept.saved


def test_reducing_once_sends_gradients_once_a_step() -> None:
    each, once = counted(), counted(reduce_once=True)
    assert each.messages["reduce_scatter"] == ROUNDS * once.messages["reduce_scatter"]
    assert each.sent["reduce_scatter"] == ROUNDS * once.sent["reduce_scatter"]
    assert each.messages["allgather"] == once.messages["allgather"]


def test_shards_of_a_node_send_a_share_of_the_gradients_to_other_nodes() -> None:
    """Layers are gathered by all ranks or inside the node; between nodes goes 1/8 of gradients."""
    nodes = counted(ranks=32, shard_ranks=8)
    everywhere = counted(ranks=32)
    assert "allreduce" not in everywhere.sent
    assert nodes.sent["allreduce"] == pytest.approx(nodes.sent["reduce_scatter"] / 8, rel=0.01)
    assert nodes.sent["allgather"] == pytest.approx(everywhere.sent["allgather"], rel=0.01)


def test_embedding_and_head_are_gathered_when_their_turn_comes() -> None:
    """Each is a message of its own, so the reduction of the head's gradient, the largest, goes
    beside the layers' backward pass. A tied weight is one."""
    apart = counted()
    tied = counted(shape=dataclasses.replace(SHAPE, tied=True))
    layers_embedding_head_and_norm = SHAPE.layers + 3
    assert apart.messages["reduce_scatter"] == ROUNDS * layers_embedding_head_and_norm
    assert tied.messages["reduce_scatter"] == ROUNDS * (SHAPE.layers + 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_compiled_once_whatever_the_rows_and_inside_of_a_recomputed_one(
    recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiles = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiles(f, backend=counter, **k))
    policy = Policy(tiny_model("qwen2"), chunk_tokens=7)
    compile_layers(policy.layers)
    if recompute:
        checkpoint_activations(policy.layers)
    found = []
    for more in range(4):
        groups = random_groups([(9 + more, [5 + more, 12, 3]), (4, [20, 2 + more])])
        row = pack_row(groups, range(5), "cpu")
        policy.logprobs(row, temperature=1.0)[0].sum().backward()
        found.append((counter.frame_count, counter.op_count))
    assert len(set(found)) == 1
    assert counter.op_count > 30  # a layer but for its attention: norms, rotation, the gated MLP


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("entropy", [False, True])
def test_a_compiled_chunk_is_one_kernel_backward_and_gives_the_same_numbers(entropy: bool) -> None:
    from torch._inductor import metrics

    torch.manual_seed(0)
    product_CV, labels_C = torch.randn(8, 301).bfloat16(), torch.randint(0, 301, (8,))
    rule = logprobs._Rule(logprobs.LogitTransform(0.5), 0.8, entropy)
    expected = logprobs._row_scores(product_CV, labels_C, rule)
    found = logprobs._compile(logprobs._row_scores)(product_CV, labels_C, rule)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    learns = (torch.randn(8), expected[2]) if entropy else None
    arguments = (product_CV, labels_C, expected[1], torch.randn(8), learns, False, rule)
    metrics.reset()
    slopes_CV, _ = logprobs._compile(logprobs._slopes)(*arguments)
    torch.testing.assert_close(slopes_CV, logprobs._slopes(*arguments)[0], atol=0.0, rtol=2**-7)
    assert metrics.generated_kernel_count == 1
