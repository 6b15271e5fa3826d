"""The canary's limit against real rounding: models in bfloat16 whose logits grow with training."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import RefutedError
from learner.weights.canary import Canary, CanaryProof, largest_gap

TOLERANCE, GROWTH = 0.2, 10.0
"""The defaults in bfloat16 (`common.config.sections`)."""
SEQUENCES = torch.randint(0, 512, (4, 40), generator=torch.Generator().manual_seed(1))
CANARY = Canary(SEQUENCES.tolist(), [8] * 4)


@functools.cache
def model(sharpness: float, dtype: torch.dtype, garbled: bool = False) -> LlamaForCausalLM:
    """Four random layers; the same weights, rounded to bfloat16, in either type."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2 if parameter.dim() == 2 else 1)
        made.model.norm.weight.mul_(sharpness)
        if garbled:  # some rows of a projection in another order, as of a kernel's packing
            weight = made.model.layers[1].mlp.up_proj.weight
            weight[:24] = weight[:24].roll(1, 0)
    return made.to(torch.bfloat16).to(dtype)


@torch.no_grad()
def scores(sharpness: float, dtype: torch.dtype, garbled: bool = False) -> list[list[float]]:
    logits = model(sharpness, dtype, garbled)(SEQUENCES).logits[:, 7:-1].float()
    found = logits.log_softmax(-1).gather(-1, SEQUENCES[:, 8:, None]).squeeze(-1)
    return found.tolist()


def gap(sharpness: float) -> float:
    return largest_gap(scores(sharpness, torch.float32), scores(sharpness, torch.bfloat16))


def proof_at(versions: list[float]) -> CanaryProof:
    """A proof that has seen right weights of each sharpness, in turn."""
    learner: object = None
    proof = CanaryProof(learner, CANARY, TOLERANCE, GROWTH)  # type: ignore[arg-type]
    for version, sharpness in enumerate(versions):
        prove(proof, version, sharpness)
    return proof


def prove(proof: CanaryProof, version: int, sharpness: float, garbled: bool = False) -> float:
    proof._expected = {version: scores(sharpness, torch.float32)}
    return proof.prove(version, {"engine": scores(sharpness, torch.bfloat16, garbled)})


def test_right_weights_pass_while_their_logits_grow_from_2_to_41() -> None:
    """Rounding alone grows more than the tenfold that a version may be above the first."""
    rising = [1.4**step for step in range(10)]
    assert gap(rising[-1]) > GROWTH * gap(1.0) and gap(rising[-1]) > 0.05
    assert proof_at(rising).proved == len(rising) - 1


def test_right_weights_pass_though_their_logits_grow_twelvefold_at_once() -> None:
    """To 25, where rounding is the share of the tolerance that passes in any case."""
    assert GROWTH * gap(1.0) < gap(12.0) < 0.05
    prove(proof_at([1.0]), 1, 12.0)


@pytest.mark.parametrize("sharpness", [1.0, 1.4])
def test_garbled_weights_are_refuted_below_the_tolerance(sharpness: float) -> None:
    wrong = scores(sharpness, torch.bfloat16, garbled=True)
    assert 0.05 < largest_gap(scores(sharpness, torch.float32), wrong) < TOLERANCE
    with pytest.raises(RefutedError, match="canary_growth"):
        prove(proof_at([1.0]), 1, sharpness, garbled=True)
