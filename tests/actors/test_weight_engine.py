"""An update leaves the weights of experts in the form that their kernel reads. No engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as vllm_method
from vllm.model_executor.model_loader import reload

from actors.generation.weight_engine import ObjectStoreWeightEngine

PLAIN = torch.arange(24.0).view(2, 4, 3)


class Kernel:
    """Packs as the one on CPU does, in another order of the same elements."""

    def process_weights_after_loading(self, layer: Any) -> None:
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data = weight.data.flip(-1)


def mixture(name: str) -> torch.nn.Module:
    """A layer under vLLM's own method, whose kernel is the one above."""
    method: Any = object.__new__(vllm_method.UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.moe_kernel = None
    method.unquantized_backend = vllm_method.UnquantizedMoeBackend.CPU
    method._maybe_pad_weight = lambda weight: weight

    def begin(layer: Any) -> None:
        method.moe_kernel = SimpleNamespace(fused_experts=Kernel())

    method._init_moe_kernel = begin
    layer: Any = torch.nn.Module()
    layer.quant_method, layer.moe_config = method, None
    load(layer, PLAIN)
    model = torch.nn.Module()
    model.add_module(name, layer)
    return model


def load(layer: Any, weights: torch.Tensor) -> None:
    """As a reload does: plain weights in parameters, and then vLLM's own step."""
    for name in ("w13_weight", "w2_weight"):
        layer.register_parameter(name, torch.nn.Parameter(weights.clone(), requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)


def begin_update(model: torch.nn.Module) -> None:
    engine: Any = SimpleNamespace(model=model)
    ObjectStoreWeightEngine.start_weight_update(engine)


@pytest.fixture(autouse=True)
def _reload_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)


def test_experts_are_packed_once_at_the_start_and_in_every_update() -> None:
    model = mixture("experts")
    layer: Any = model.experts
    packed = PLAIN.flip(-1)
    assert torch.equal(layer.w13_weight, packed)
    for update in (1.0, 2.0, 3.0):
        begin_update(model)
        load(layer, update * PLAIN)
        assert torch.equal(layer.w13_weight, update * packed)
        assert torch.equal(layer.w2_weight, update * packed)


def test_a_layer_that_has_no_experts_stays_as_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    begin_update(model)
    assert not hasattr(model, "quant_method")
