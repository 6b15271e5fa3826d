"""vLLM's kernels on CPU: its compiled norms, and a rotation that reads its memory rightly.

vLLM leaves its norms on CPU to Inductor, which an engine that does not compile goes without. Then
a norm is eight torch operations, and norms were a quarter of the time of a decode step (135M
parameters). vLLM's CPU library has a kernel for each norm, which also rounds once instead of twice.
Importing this module makes the kernels known to vLLM. The engine argument `IR_OP_PRIORITY` chooses
them.

Its kernel for rotary positions takes heads for tokens where they have an axis of their own, as in
latent attention (DeepSeek-V2 and V3 without YaRN). The import has vLLM rotate those by torch.

Shapes: [..., H] with hidden size H, weight [H].
"""

from __future__ import annotations

import torch
import vllm._custom_ops  # noqa: F401  loads the library of CPU kernels
from torch import Tensor
from vllm import ir
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

_PROVIDER = "cpu_c"
IR_OP_PRIORITY = {
    "rms_norm": [_PROVIDER, "native"],
    "fused_add_rms_norm": [_PROVIDER, "native"],
}

_VECTOR = 8
"""Elements the kernels take at a time: H must be a multiple."""
_THERE = all(hasattr(torch.ops._C, name) for name in IR_OP_PRIORITY)


def _rounds_to_bfloat16() -> bool:
    """Whether the kernels round; those for AVX2 cut the last places off, so all is too small."""
    x = torch.tensor([1.0] * 7 + [3.0], dtype=torch.bfloat16)
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, torch.ones_like(x), 0.0)
    return float(output[-1]) == 2.125  # of 2.1213; cut off it is 2.109375


ROUNDS = _THERE and _rounds_to_bfloat16()


def _fits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    same = weight is not None and weight.dtype == x.dtype
    exact = ROUNDS or x.dtype == torch.float32
    return same and exact and variance_size is None and x.shape[-1] % _VECTOR == 0


def _one_fits(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _fits(x, weight, variance_size)


def _two_fit(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    # The kernel writes into both, and knows no strides.
    alike = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
    return alike and _fits(x, weight, variance_size)


@ir.ops.rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _PROVIDER, supported=_THERE, supports_args=_one_fits
)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """`weight` times `x` over the root of its mean square."""
    x = x.contiguous()  # heads within a packed projection are not
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    _PROVIDER, supported=_THERE, supports_args=_two_fit, inplace=True
)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of the sum, the sum), each in its argument's memory."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


_compiled_rotation = RotaryEmbedding.forward_cpu


def rotate(
    self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Queries and keys turned by their positions; [T, heads, D], or [T, heads · D] in place.

    The kernel takes the stride of the last axis but one for that of tokens.
    """
    if query.dim() == 3:
        turned: tuple[Tensor, Tensor | None] = self.forward_native(positions, query, key)
        return turned
    found: tuple[Tensor, Tensor | None] = _compiled_rotation(self, positions, query, key)
    return found


RotaryEmbedding.forward_cpu = rotate
