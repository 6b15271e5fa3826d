"""vLLM's compiled norms where its CPU backend would run chains of torch operations.

vLLM leaves its norms on CPU to Inductor, which an engine that does not compile goes without. Then
a norm is eight torch operations, and norms were a quarter of the time of a decode step (135M
parameters). vLLM's CPU library has a kernel for each norm, which also rounds once instead of twice.
Importing this module makes the kernels known to vLLM. The engine argument `IR_OP_PRIORITY` chooses
them.

Shapes: [..., H] with hidden size H, weight [H].
"""

from __future__ import annotations

import torch
import vllm._custom_ops  # noqa: F401  loads the library of CPU kernels
from torch import Tensor
from vllm import ir

_PROVIDER = "cpu_c"
IR_OP_PRIORITY = {
    "rms_norm": [_PROVIDER, "native"],
    "fused_add_rms_norm": [_PROVIDER, "native"],
}

_VECTOR = 8
"""Elements the kernels take at a time: H must be a multiple."""
_THERE = all(hasattr(torch.ops._C, name) for name in IR_OP_PRIORITY)


def _fits(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    same = weight is not None and weight.dtype == x.dtype
    return same and variance_size is None and x.shape[-1] % _VECTOR == 0


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
