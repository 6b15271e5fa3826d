"""Counters of a device, on one that is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fake_step import fake_ranks
from learner_models import random_groups, tiny_model

from common.devices import DEVICES, find_device
from learner.policy.model import Policy
from learner.policy.packing import pack_row
from learner.training import fsdp
from learner.training.counters import Counters, Waits


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA A10G", "A10-24GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA RTX A6000", "A6000-48GB"),
    ],
)
def test_a_device_is_found_by_the_name_that_torch_gives_it(name: str, key: str) -> None:
    assert find_device(name) is DEVICES[key]


def test_an_unknown_device_has_no_peak() -> None:
    assert find_device("Voodoo 2") is None


def test_the_share_of_the_peak_is_six_operations_a_weight_and_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    counters = Counters(torch.device("cuda", 0), torch.nn.Linear(1, 1), 10**9, 10**9, ranks=1)
    found = counters.metrics(tokens=989_000, seconds=12.0)
    assert found == {
        "learner/tflops": pytest.approx(494.5),
        "learner/mfu": pytest.approx(0.5),
        "memory/peak": 7.0,
    }
    assert Counters(torch.device("cpu"), torch.nn.Linear(1, 1), 9, 9, 1).metrics(1.0, 1.0) == {}


def test_every_wait_for_weights_is_timed() -> None:
    clock = iter(range(1000))

    def event() -> SimpleNamespace:
        made = SimpleNamespace(synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", next(clock))
        made.elapsed_time = lambda later: later.at - made.at
        return made

    with fake_ranks(2):
        policy = Policy(tiny_model("llama_untied"), chunk_tokens=7)
        fsdp.shard(
            policy.model, policy.layers, fsdp.data_mesh(torch.device("cpu"), None), torch.float32
        )
        waits = Waits(policy.model, event)
        row = pack_row(random_groups([(9, [5, 12])]), range(2), "cpu")
        policy.logprobs(row, temperature=1.0)[0].sum().backward()
    # Two layers, embedding, head and what is left; layers and embedding are gathered twice, and a
    # wait of a millisecond each is what this clock shows.
    assert waits.seconds() >= 8e-3
    assert waits.seconds() == 0
