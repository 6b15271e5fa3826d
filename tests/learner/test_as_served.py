"""The model as vLLM serves it, and a self-check whose rows go past every range of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import LONGEST, VOCABULARY, plain_model, save_model
from learner_ranks import make_worker
from torch import Tensor

from common.config.sections import ModelConfig
from common.errors import UserError
from learner.policy import attention
from learner.policy.as_served import reach
from learner.policy.model import Policy, load_policy, save_hf_folder
from learner.policy.packing import pack_row
from learner.policy.self_check import check_policy

Group = tuple[np.ndarray, list[np.ndarray]]


def load(folder: Path, max_length: int = LONGEST) -> Policy:
    config = ModelConfig(path=str(folder), dtype="float32", max_length=max_length)
    policy, gap = load_policy(config, torch.float32, logits_mib=0.1, temperature=1.0, weights=True)
    check_policy(gap, torch.float32, str(folder))
    return policy


def group(prompt: int, completion: int, seed: int) -> Group:
    random = np.random.default_rng(seed)
    return random.integers(3, VOCABULARY, prompt), [random.integers(3, VOCABULARY, completion)]


@torch.no_grad()
def packed(policy: Policy, *groups: Group) -> Tensor:
    row = pack_row(list(groups), range(len(groups)), "cpu")
    return policy.logprobs(row, temperature=1.0)[0]


SHORT, LONG = group(10, 20, 1), group(70, 20, 2)


def test_a_sequence_scores_the_same_beside_a_long_one(tmp_path: Path) -> None:
    policy = load(save_model(tmp_path, "phi3_longrope"))
    torch.testing.assert_close(
        packed(policy, SHORT, LONG)[:20], packed(policy, SHORT), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("max_length", [64, LONGEST])
def test_longropes_factors_are_those_of_the_longest_context(
    max_length: int, tmp_path: Path
) -> None:
    """What transformers makes of one call that long is the oracle; of a short one, of no more."""
    folder = save_model(tmp_path, "phi3_longrope")
    model: Any = plain_model(folder, "llama_tied")  # nothing of the folder changed
    policy = load(folder, max_length)
    rotary, positions = policy.model.model.rotary_emb, torch.arange(max_length)[None]
    expected = model.model.rotary_emb(torch.zeros(1), positions)
    for upto in (max_length, 10):
        for found, whole in zip(rotary(torch.zeros(1), positions[:, :upto]), expected, strict=True):
            assert torch.equal(found, whole[:, :upto])


def test_cohere2_sees_a_token_more_and_its_folder_stays_as_it_was(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "cohere2")
    policy = load(folder)
    found = packed(policy, LONG)
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate([LONG[0], *LONG[1]]))[None]
        for name, far in (("cohere2", False), ("llama_tied", True)):  # with and without the change
            logits = plain_model(folder, name)(input_ids=ids).logits[0, 69:-1].log_softmax(-1)
            gap = (logits.gather(1, ids[0, 70:, None])[:, 0] - found).abs().max()
            assert (float(gap) > 1e-3) == far
    state = {name: tensor.detach() for name, tensor in policy.model.named_parameters()}
    save_hf_folder(policy, state, tmp_path / "saved", torch.float32)
    windows = [
        json.loads((place / "config.json").read_text())["sliding_window"]
        for place in (folder, tmp_path / "saved")
    ]
    assert windows == [32, 32]


def test_the_self_check_goes_past_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner without windows scores short sequences right."""
    folder, attend = save_model(tmp_path, "mistral"), attention._attend_block

    def everywhere(block: Any, cells: Any, layout: Any, window: Any, *rest: Any) -> Any:
        return attend(block, cells, layout, None, *rest)

    monkeypatch.setattr(attention, "_attend_block", everywhere)
    load(folder, max_length=32)
    with pytest.raises(UserError, match="disagrees"):
        load(folder)


def test_rotary_factors_that_depend_on_the_row_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama_tied")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    load(folder, max_length=64)
    with pytest.raises(UserError, match="from one sequence of a row to the next"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "max_length", "expected"),
    [
        ("mistral", LONGEST, 32),
        ("mistral", 33, 32),
        ("mistral", 32, 0),  # no context exceeds it
        ("gemma3", LONGEST, 32),
        ("phi3_longrope", LONGEST, 64),
        ("phi3_longrope", 64, 0),
        ("llama_yarn", LONGEST, 0),  # its factors never change
        ("qwen2", LONGEST, 0),
        ("gpt2", LONGEST, 0),
    ],
)
def test_reach(name: str, max_length: int, expected: int, tmp_path: Path) -> None:
    assert reach(plain_model(save_model(tmp_path, name), name).config, max_length) == expected


def test_a_rank_says_how_far_its_model_reaches(tmp_path: Path) -> None:
    """The canary goes by it."""
    made = make_worker(save_model(tmp_path, "mistral"), max_length=LONGEST)
    try:
        assert made.setup(*made.rendezvous_address())["reach"] == 32
    finally:
        made.shutdown()


def test_an_architecture_that_cannot_take_rows_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FalconForCausalLM cannot score packed rows"):
        load(save_model(tmp_path, "falcon"))
