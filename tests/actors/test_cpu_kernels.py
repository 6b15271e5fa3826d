"""vLLM's kernels on CPU: their numbers, and what they leave to torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from actors.generation.cpu_kernels import IR_OP_PRIORITY, ROUNDS

EPSILON = 1e-5
# Relative: one rounding, to half a bit in the last place; a few in float32, of sums.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2**-8}
# What the kernels of this machine do not round is left to torch, which rounds every step.
EXACT = [dtype for dtype in ROUNDING if ROUNDS or dtype == torch.float32]
dtypes = pytest.mark.parametrize("dtype", EXACT, ids=str)


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to what is expected."""
    return float(((found.double() - expected).abs() / expected.abs().clamp_min(1e-6)).max())


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(autouse=True)
def _priority() -> object:
    with (
        ir.ops.rms_norm.set_priority(IR_OP_PRIORITY["rms_norm"]),
        ir.ops.fused_add_rms_norm.set_priority(IR_OP_PRIORITY["fused_add_rms_norm"]),
    ):
        yield


def provider(op: object, *arguments: object) -> str:
    return op.dispatch(*arguments).provider  # type: ignore[attr-defined, no-any-return]


@dtypes
@pytest.mark.parametrize("shape", [(1, 64), (33, 576), (5, 7, 72)], ids=str)
def test_norm_is_that_of_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype)
    before = x.clone()
    assert provider(ir.ops.rms_norm, x, weight, EPSILON) == "cpu_c"
    found = ir.ops.rms_norm(x, weight, EPSILON)
    assert found.dtype == dtype and found.shape == x.shape
    assert error(found, oracle(x, weight)) <= ROUNDING[dtype]
    assert torch.equal(x, before)


def test_norm_of_heads_within_a_packed_projection() -> None:
    """Their rows lie apart; the kernel itself would read what lies between."""
    heads = drawn(6, 3 * 64, dtype=torch.float32)[:, :128].view(6, 2, 64)
    weight = drawn(64, dtype=torch.float32)
    assert provider(ir.ops.rms_norm, heads, weight, EPSILON) == "cpu_c"
    found = ir.ops.rms_norm(heads, weight, EPSILON)
    assert error(found, oracle(heads, weight)) <= ROUNDING[torch.float32]


@dtypes
def test_norm_of_a_sum_leaves_the_sum_as_residual(dtype: torch.dtype) -> None:
    x, residual = drawn(33, 576, dtype=dtype), drawn(34, 576, dtype=dtype)[1:]
    weight = drawn(576, dtype=dtype)
    total = x.double() + residual.double()
    assert provider(ir.ops.fused_add_rms_norm, x, residual, weight, EPSILON) == "cpu_c"
    found, kept = ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, EPSILON)
    assert torch.equal(kept, total.to(dtype))
    # As the learner's, it is the norm of what is kept, but for the root mean square.
    assert error(found, oracle(kept, weight)) <= 1.1 * ROUNDING[dtype]
    assert kept.data_ptr() == residual.data_ptr() and found.data_ptr() == x.data_ptr()


def test_what_the_kernels_do_not_compute_is_left_to_torch() -> None:
    x, weight = drawn(4, 72, dtype=torch.float32), drawn(72, dtype=torch.float32)
    odd = drawn(4, 70, dtype=torch.float32), drawn(70, dtype=torch.float32)
    one = ir.ops.rms_norm
    assert provider(one, *odd, EPSILON) == "native"
    assert provider(one, x, None, EPSILON) == "native"
    assert provider(one, x, weight, EPSILON, 8) == "native"
    assert provider(one, x.bfloat16(), weight, EPSILON) == "native"
    narrow = provider(one, x.bfloat16(), weight.bfloat16(), EPSILON)
    assert narrow == ("cpu_c" if ROUNDS else "native")
    assert error(one(*odd, EPSILON), oracle(*odd)) <= ROUNDING[torch.float32]
    two, columns = ir.ops.fused_add_rms_norm, drawn(72, 4, dtype=torch.float32).T
    assert provider(two, x, columns, weight, EPSILON) == "native"
    assert provider(two, columns, x, weight, EPSILON) == "native"
    found, kept = two.maybe_inplace(x, columns, weight, EPSILON)
    assert error(found, oracle(x + columns, weight)) <= ROUNDING[torch.float32]
    assert torch.equal(kept, x + columns)


def turned(x_THD: Tensor, positions: Tensor) -> Tensor:
    """Neighbours as the two parts of a complex number, turned by its position; in float64."""
    wide = torch.view_as_complex(x_THD.double().unflatten(-1, (-1, 2)).contiguous())
    size = x_THD.shape[-1]
    speed = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions[:, None, None] * speed
    return torch.view_as_real(wide * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("flat", [False, True])
def test_each_head_is_turned_by_the_position_of_its_token(flat: bool) -> None:
    """Latent attention hands over a part of each head; others a row a token, turned in place."""
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(64, 512, False, {"rope_type": "default", "rope_theta": 10000.0})
    positions = torch.tensor([0, 1, 2, 7, 90])
    query = drawn(5, 4, 96, dtype=torch.float32)[..., 32:]
    key = drawn(5, 576, dtype=torch.float32)[:, 512:].unsqueeze(1)
    expected = [turned(each, positions) for each in (query, key)]
    if flat:
        query, key = query.flatten(1).contiguous(), key.flatten(1).contiguous()
    found = rope.forward_cpu(positions, query, key)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each.view(wanted.shape).double(), wanted, rtol=0, atol=1e-4)
