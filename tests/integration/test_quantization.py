"""int8 in a generator, on a real engine: updates, and what the canary makes of wrong weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_beside import EngineBeside, EngineError, engine_beside
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config.load import load_config
from common.errors import RefutedError
from common.weights.buckets import pack_tensors
from deploy.models.resolve import resolve_model
from deploy.models.tiny_model import OPENING
from learner.weights.canary import Canary, CanaryProof, largest_gap

KEYS = ["model.path=x", "generator.quantization=int8"]
SUMS = ((3, 4, 5), (9, 1, 2), (7, 7, 7), (2, 8, 6))
LAYER = "layers.2."


@pytest.fixture(scope="module")
def first() -> Path:
    return Path(resolve_model("builtin:tiny-chain-sum"))


@pytest.fixture(scope="module")
def canary(first: Path) -> Canary:
    tokenizer: Any = AutoTokenizer.from_pretrained(first)
    texts = [f"{OPENING} {a} + {b} - {c} =" for a, b, c in SUMS]
    return Canary.from_prompts([tokenizer(text)["input_ids"] for text in texts], 24)


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights: each moved by a fifth of the spread of its tensor."""
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("second")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(first).save_pretrained(folder)
    return folder


def tensors(folder: Path, dtype: str) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return {name: weight.detach() for name, weight in model.named_parameters()}


def buckets(weights: dict[str, Tensor]) -> list[Any]:
    return list(pack_tensors(iter(weights.items()), 2**20))


@torch.no_grad()
def exact(folder: Path, canary: Canary) -> list[list[float]]:
    """What a learner in float32 scores."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for ids, given in zip(canary.sequences, canary.prompt_lengths, strict=True):
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append([float(logprobs[i - 1, ids[i]]) for i in range(given, len(ids))])
    return found


def scores(engine: EngineBeside, canary: Canary) -> list[list[float]]:
    return engine.score(canary.sequences, canary.prompt_lengths)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def engine(first: Path, dtype: str) -> Iterator[EngineBeside]:
    with engine_beside(first, 128, dtype, quantization="int8") as started:
        yield started


def test_two_updates_are_as_a_start_with_the_last_weights(
    engine: EngineBeside, first: Path, second: Path, dtype: str, canary: Canary
) -> None:
    at_start = scores(engine, canary)
    with engine_beside(second, 128, dtype, quantization="int8") as other:
        fresh = scores(other, canary)
        sampled = other.sample(canary.sequences, 1.0, 16)
    engine.update(buckets(tensors(second, dtype)), 1)
    engine.update(buckets(tensors(first, dtype)), 2)
    assert scores(engine, canary) == at_start
    engine.update(buckets(tensors(second, dtype)), 3)
    assert scores(engine, canary) == fresh != at_start
    assert engine.sample(canary.sequences, 1.0, 16) == sampled


def test_the_canary_passes_right_weights_and_refuses_wrong_ones(
    engine: EngineBeside, first: Path, second: Path, dtype: str, canary: Canary
) -> None:
    config = load_config([], [*KEYS, f"model.dtype={dtype}"])
    learner: Any = None
    new, old = tensors(second, dtype), tensors(first, dtype)
    one_missing = {
        name: torch.zeros_like(weight) if LAYER in name and weight.dim() == 2 else weight
        for name, weight in new.items()
    }
    expected = exact(second, canary)

    def prove(weights: dict[str, Tensor], version: int) -> float:
        engine.update(buckets(weights), version)
        tolerance = config.canary_tolerance
        proof = CanaryProof(learner, canary, tolerance, config.weights.canary_growth)
        proof._expected = {version: expected}
        return proof.prove(version, {"generator-0": scores(engine, canary)})

    assert 0.001 < prove(new, 1) < config.canary_tolerance / 2
    for version, wrong in enumerate((old, one_missing), start=2):
        with pytest.raises(RefutedError, match=f"canary_tolerance={config.canary_tolerance:g}"):
            prove(wrong, version)
    prove(new, 4)


def test_a_damaged_bucket_loads_nothing(
    engine: EngineBeside, first: Path, second: Path, dtype: str, canary: Canary
) -> None:
    engine.update(buckets(tensors(first, dtype)), 1)
    before = scores(engine, canary)
    packed = buckets(tensors(second, dtype))
    damaged = packed[-1].buffer.copy()
    damaged[7] ^= 1
    packed[-1] = packed[-1].at(damaged)
    with pytest.raises(EngineError, match="WeightsError"):
        engine.update(packed, 2)
    assert scores(engine, canary) == before


def test_what_is_sampled_has_the_logprobs_that_it_scores(
    engine: EngineBeside, canary: Canary
) -> None:
    """The sampler's own numbers are those of the weights it samples with, rounding aside."""
    sampled = engine.sample(canary.sequences, 1.0, 24)
    whole = [p + t for p, (t, _) in zip(canary.sequences, sampled, strict=True)]
    again = engine.score(whole, [len(p) for p in canary.sequences])
    assert largest_gap(again, [logprobs for _, logprobs in sampled]) < 0.05
