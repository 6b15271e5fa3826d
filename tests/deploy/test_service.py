"""Settings that are refused before any process starts."""

from __future__ import annotations

import pytest
import torch

from common.config.load import load_config
from common.errors import UserError
from deploy.run.service import _check
from learner.training.memory import ALONE

CUDA = ("model.path=none", "learner.device=cuda", "model.dtype=bfloat16")
SHARED = ("weights.transport=ipc", "generator.max_staleness=0")


@pytest.mark.parametrize(
    ("here", "overrides", "wanted"),
    [
        (0, (), "2"),
        (1, (), "2"),
        (4, ("generator.count=2", "generator.tensor_parallel=2"), "5"),
        (1, ("learner.ranks=2", "generator.count=2", *SHARED), "2"),
    ],
)
def test_devices_that_are_not_there_are_named_and_not_waited_for(
    here: int, overrides: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    with pytest.raises(UserError, match=rf"want {wanted} CUDA.*torch sees {here} here"):
        _check(load_config([], [*CUDA, *overrides]), ALONE)


@pytest.mark.parametrize(
    ("here", "overrides"),
    [(2, ()), (1, SHARED), (5, ("generator.count=2", "generator.tensor_parallel=2"))],
)
def test_as_many_devices_as_are_there_may_be_taken(
    here: int, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    assert _check(load_config([], [*CUDA, *overrides]), ALONE)
    away = ["ray.address=auto"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _check(load_config([], [*CUDA, *overrides, *away]), ALONE)
