"""Weights of eight bits in vLLM: how an engine is asked for them, and int8 on a CPU.

Weights come from the learner as they are, in `model.dtype`. vLLM quantises a layer when all of it
has arrived, at the start and in every update (its online quantisation). Matrices of a layer are
quantised. The embedding, the output head, norms, biases and experts of a mixture stay as they are.

vLLM has that for fp8 on CUDA. For int8 it has a kernel on CPU, and reads int8 from checkpoints
alone. `Int8Method` gives the kernel what arrives, by the same interface as vLLM's own methods. A
row of a matrix has a scale, and each token's activations get one as they come.

A few large activations of a token would leave the others few of the 255 steps. So inputs are
rotated, 64 at a time, by a Hadamard matrix, which spreads what is large over its block; weights are
rotated by the same, and the product stays ([P] QuaRot, Ashkboos et al. 2024). It needs no data.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.config.quantization import check_device

INT8 = "int8_per_channel_cpu"
"""Our method's name in vLLM."""
FP8 = "fp8_per_channel"
"""vLLM's own: a scale a row of a matrix and a scale a token, as here."""
_BLOCK = 64
"""Inputs that are rotated together, or the largest power of two below that divides K."""
_MOST = 127
_READ_BY_ATTENTION = ".kv_b_proj"
"""Latent attention takes this weight apart by itself, and the kernel keeps none to be read."""
_LEAST_SCALE = 1e-12
"""For a row of zeros."""


def method_of(kind: str, *, cuda: bool) -> str:
    """vLLM's name of what `generator.quantization` asks for, which vLLM then knows.

    Raises:
        UserError: this device does not compute with it.
    """
    check_device(kind, cuda=cuda)
    if kind == "fp8":
        return FP8
    register()
    return INT8


def rotation(inputs: int) -> Tensor:
    """A Hadamard matrix [B, B] over the root of B, its own inverse; B divides `inputs`."""
    size = 1
    while size < _BLOCK and inputs % (2 * size) == 0:
        size *= 2
    signs = torch.ones(1, 1, dtype=torch.float32)  # the default type may be the model's
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs / size**0.5


@functools.cache
def _rotator(inputs: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rotates activations [T, K], by vLLM's product: it is twice as fast as torch's."""
    from vllm import _custom_ops as ops

    exact = rotation(inputs)
    packed: Any = ops.create_onednn_mm(exact.to(dtype), 32)

    def rotated(x_TK: Tensor) -> Tensor:
        blocks: Tensor = ops.onednn_mm(packed, x_TK.reshape(-1, len(exact)), None)
        return blocks.view(x_TK.shape)

    return rotated


def rows_to_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], float32 scale [N, 1]): the rotated weight is within half a scale of the
    product of both."""
    turn = rotation(weight_NK.shape[1])
    exact = (weight_NK.to(torch.float32).reshape(-1, len(turn)) @ turn).view(weight_NK.shape)
    scale = (exact.abs().amax(dim=1, keepdim=True) / _MOST).clamp_min(_LEAST_SCALE)
    return (exact / scale).round().clamp(-_MOST, _MOST).to(torch.int8), scale


def register() -> None:
    """Make int8 on a CPU known to vLLM in this process."""
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if INT8 not in QUANTIZATION_METHODS:
        register_quantization_config(INT8)(_int8_config())


def _int8_method() -> type:
    """vLLM's classes are imported when an engine is to start, and not before."""
    from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
    from vllm.model_executor.utils import replace_parameter

    class Int8Method(OnlineLinearBase):
        """A linear layer whose weights are quantised as soon as they are there."""

        def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
            from vllm.model_executor.kernels.linear import init_int8_linear_kernel

            super().create_weights(layer, *args, **kwargs)
            self.kernel = init_int8_linear_kernel(
                is_channelwise=True,
                is_static_input_scheme=False,
                input_symmetric=True,
                module_name=type(self).__name__,
            )

        def process_weights_after_loading(self, layer: Any) -> None:
            if getattr(layer, "_already_called_process_weights_after_loading", False):
                return
            self.rotated = _rotator(layer.weight.shape[1], layer.orig_dtype)
            weight, scale = rows_to_int8(layer.weight.detach())
            replace_parameter(layer, "weight", nn.Parameter(weight, requires_grad=False))
            replace_parameter(layer, "weight_scale", nn.Parameter(scale, requires_grad=False))
            layer.input_scale = layer.input_zero_point = layer.azp_adj = None
            # The kernel is built for outputs of torch's default type, which is the model's when
            # vLLM loads it for the first time, and torch's own in an update.
            before = torch.get_default_dtype()
            torch.set_default_dtype(layer.orig_dtype)
            try:
                self.kernel.process_weights_after_loading(layer)
            finally:
                torch.set_default_dtype(before)
            # The kernel keeps the scales' address alone. An update puts a copy into the layer, and
            # these would be freed.
            self.scales = layer.weight_scale.data
            layer._already_called_process_weights_after_loading = True

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            output: Tensor = self.kernel.apply_weights(layer, self.rotated(x), bias)
            return output

    return Int8Method


def _int8_config() -> type:
    """The class that vLLM asks how each layer is computed."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    int8_method = _int8_method()

    class Int8Config(QuantizationConfig):
        """Which layers are quantised: the linear ones, except the head and experts."""

        def get_name(self) -> str:
            return INT8

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return -1  # CUDA's alone

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Int8Config:
            raise NotImplementedError("weights are quantised as they are loaded")

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if isinstance(layer, LinearBase):
                read = prefix.endswith(_READ_BY_ATTENTION)
                return UnquantizedLinearMethod() if read else int8_method()
            if isinstance(layer, RoutedExperts):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return None

    return Int8Config
