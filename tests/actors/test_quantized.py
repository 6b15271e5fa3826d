"""Weights in eight bits: rounding, rotation, and what vLLM is asked for. No engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config.quantization import _ONLINE_SHORTHANDS
from vllm.model_executor.layers.quantization import get_quantization_config

from actors.generation import quantized
from actors.generation.engine_arguments import changed_settings, engine_arguments
from actors.generation.quantized import FP8, INT8, method_of, rotation, rows_to_int8
from common.config.sections import GeneratorConfig, ModelConfig
from common.errors import UserError
from common.weights.registry import TRANSPORTS


@pytest.mark.parametrize(("inputs", "block"), [(576, 64), (48, 16), (6, 2), (7, 1)])
def test_a_rotation_is_its_own_inverse_and_as_wide_as_divides(inputs: int, block: int) -> None:
    turn = rotation(inputs)
    assert turn.shape == (block, block)
    torch.testing.assert_close(turn @ turn, torch.eye(block))
    assert torch.equal(turn, turn.T)


def test_a_rotation_is_exact_whatever_type_is_the_default() -> None:
    """vLLM makes its layers under the model's type."""
    expected = rotation(64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rotation(64), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the kernel computes: activations rotated and rounded by a scale a token."""
    rounded, scale = rows_to_int8(weight)
    turn = rotation(weight.shape[1])
    turned = (x.reshape(-1, len(turn)) @ turn).view(x.shape)
    scales = turned.abs().amax(-1, keepdim=True) / 127
    return ((turned / scales).round() * scales) @ (rounded * scale).T


def test_rounded_weights_are_within_half_a_step_of_the_rotated_ones() -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    rounded, scale = rows_to_int8(weight)
    turned = (weight.reshape(-1, 64) @ rotation(128)).view(5, 128)
    assert ((rounded * scale - turned).abs() <= scale / 2 * 1.0001).all()
    assert rounded.abs().amax(dim=1).tolist() == [127] * 5  # no step is wasted
    zeros, scale = rows_to_int8(torch.zeros(2, 64))
    assert not zeros.any()
    assert scale.isfinite().all()


def test_a_large_activation_leaves_the_others_their_steps() -> None:
    """Without the rotation an input a hundred times as large rounds the others to zero."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 512, generator=draw), torch.randn(64, 512, generator=draw)
    x[:, 3] *= 300
    weight[:, 3] = 0  # only the others count
    exact = x @ weight.T
    step = x.abs().amax(-1, keepdim=True) / 127
    plain = ((x / step).round() * step) @ weight.T
    error = (product(x, weight) - exact).abs().mean()
    assert error < 0.5 * (plain - exact).abs().mean()


def arguments(cuda: bool, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    model = ModelConfig(path="x", max_length=64)
    return engine_arguments(model, GeneratorConfig(**keys), TRANSPORTS["object_store"], 0, None)


def test_vllm_is_asked_for_its_method_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "quantization" not in arguments(False, monkeypatch)
    assert "quantization" not in arguments(True, monkeypatch)
    assert arguments(True, monkeypatch, quantization="fp8")["quantization"] == FP8
    assert arguments(False, monkeypatch, quantization="int8")["quantization"] == INT8
    # vLLM knows both names: a shorthand of its own, which quantises what is loaded, and ours.
    assert _ONLINE_SHORTHANDS[FP8].linear is not None
    assert get_quantization_config(INT8).__name__ == "Int8Config"
    quantized.register()  # a second engine in the same process


@pytest.mark.parametrize(("kind", "cuda", "other"), [("fp8", False, "int8"), ("int8", True, "fp8")])
def test_the_other_devices_kind_is_refused(kind: str, cuda: bool, other: str) -> None:
    with pytest.raises(UserError, match=f"quantization={kind} does not run .* to {other} or null"):
        method_of(kind, cuda=cuda)


def test_an_engine_that_is_not_quantised_as_asked_is_named() -> None:
    asked = {"quantization": INT8}

    class Used:
        def __getattr__(self, name: str) -> Any:
            return {"quantization": None, "cache_dtype": "auto"}.get(name)

    config: Any = Used()
    config.model_config = config.scheduler_config = config.cache_config = Used()
    assert changed_settings(asked, config) == [f"quantization is None instead of {INT8}"]
