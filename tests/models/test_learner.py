"""Every architecture of the matrix in the learner: packed rows against plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LONGEST, VOCABULARY, plain_model, save_model
from learner_models import random_groups
from plain_passes import assert_same_pass, one_at_a_time, spread_weights

from common.config.sections import ModelConfig
from common.errors import UserError
from learner.policy.model import Policy, load_policy
from learner.policy.packing import pack_row
from learner.policy.self_check import check_policy

pytestmark = pytest.mark.models
SHAPES = [(21, (5, 40)), (60, (50, 12)), (30, (8, 1))]
"""Sequences of 26 to 110 tokens, some short beside some long."""
REFUSED = {name: case for name, case in ARCHITECTURES.items() if case.learner_refuses}
Note = Callable[[str, str, float | str], None]


def load(folder: Path, temperature: float = 1.0) -> Policy:
    config = ModelConfig(path=str(folder), dtype="float32", max_length=LONGEST)
    policy, gap = load_policy(
        config, torch.float32, logits_mib=0.1, temperature=temperature, weights=True
    )
    check_policy(gap, torch.float32, str(folder))
    return policy


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in REFUSED])
def test_packed_rows_equal_plain_passes(name: str, tmp_path: Path, note: Note) -> None:
    save_model(tmp_path, name)
    groups = random_groups(SHAPES, 0, VOCABULARY)
    for temperature in (1.0, 0.7):
        policy = load(tmp_path, temperature)
        expected = one_at_a_time(plain_model(tmp_path, name), groups, temperature)
        row = pack_row(groups, range(sum(len(c) for _, c in groups)), "cpu")
        logprobs_N, _ = policy.logprobs(row, temperature=temperature)
        (logprobs_N * spread_weights(len(logprobs_N))).sum().backward()
        gradients = {n: p.grad for n, p in policy.model.named_parameters()}
        assert_same_pass((logprobs_N.detach(), gradients), expected)
        gap = (logprobs_N.detach() - expected[0]).abs().max()
        note(name, f"learner, T {temperature:g}", float(gap))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_learner_cannot_score_is_refused(name: str, tmp_path: Path, note: Note) -> None:
    save_model(tmp_path, name)
    with pytest.raises(UserError, match=REFUSED[name].learner_refuses):
        load(tmp_path)
    note(name, "refused by the learner", REFUSED[name].learner_refuses)


def test_a_rank_without_weights_computes_the_same(tmp_path: Path) -> None:
    """What follows from the configuration alone, as rotary factors, is the same on all ranks."""
    save_model(tmp_path, "phi3_longrope")
    config = ModelConfig(path=str(tmp_path), dtype="float32", max_length=LONGEST)
    read = load(tmp_path)
    blank, _ = load_policy(config, torch.float32, logits_mib=0.1, temperature=1.0, weights=False)
    blank.model.load_state_dict(copy.deepcopy(read.model.state_dict()))
    groups = random_groups(SHAPES, 0, VOCABULARY)
    row = pack_row(groups, range(6), "cpu")
    found = [policy.logprobs(row, temperature=1.0)[0] for policy in (read, blank)]
    assert torch.equal(found[0], found[1])
