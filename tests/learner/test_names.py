"""Weights travel under the names, and in the shapes, of the architecture's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architecture_table import PAGE, with_table
from architectures import save_model
from learner_ranks import weights, worker
from safetensors.torch import load_file

from learner.training.fsdp import PolicyWeights

# One tensor for each expert; modules under other names; as they are.
CASES = ("mixtral", "qwen3_moe", "granitemoe", "gpt_neox", "glm4_moe", "llama_tied", "phi3")


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_is_what_the_folder_held(name: str, tmp_path: Path) -> None:
    saved = load_file(save_model(tmp_path, name) / "model.safetensors")
    with worker(tmp_path) as rank:
        found = weights(rank)
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(found[key], tensor), key


def test_shapes_are_those_of_the_tensors_in_their_order(tmp_path: Path) -> None:
    save_model(tmp_path, "mixtral")
    with worker(tmp_path) as rank:
        sent = PolicyWeights(rank.trainer.policy, torch.bfloat16)
        tensors = [(name, value.dtype, tuple(value.shape)) for name, value in sent.tensors()]
        assert sent.shapes() == tensors
        assert sum("experts.7.w2.weight" in name for name, _, _ in tensors) == 2


def test_the_table_of_architectures_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert with_table(text) == text, "run `python tests/support/architecture_table.py`"
