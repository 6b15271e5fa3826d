"""The memory estimate: counts what is in the files, and refuses what cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.config.load import load_config
from common.errors import UserError
from deploy.placement import memory


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert memory.count_parameters(tmp_path) == 3 * 5 + 1 + 7


def test_the_estimate_grows_with_what_it_is_made_of() -> None:
    def total(*overrides: str, has_reference: bool = False) -> float:
        config = load_config([], ["model.path=x", "model.dtype=bfloat16", *overrides])
        return memory.estimate(config, 10**9, has_reference=has_reference).total

    base = total()
    assert total("generator.kv_cache_gib=3") - base == pytest.approx(2 * memory.GIB)
    assert total("generator.count=2") > base + 2 * 10**9
    assert total(has_reference=True) - base == pytest.approx(2 * 10**9)
    assert total("model.dtype=float32") > base
    # AdamW's two moments, one of momentum and none, in the learner and in a checkpoint's copy.
    momentum = ("learner.optimizer.kind=SGD", "learner.optimizer.args={momentum: 0.9}")
    assert base - total(*momentum) == pytest.approx(2 * 4 * 10**9)
    assert base - total("learner.optimizer.kind=SGD") == pytest.approx(2 * 8 * 10**9)


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(1000, 1000)}, tmp_path / "model.safetensors")
    config = load_config([], [f"model.path={tmp_path}"])
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * memory.GIB)
    with pytest.raises(UserError, match=r"(?s)needs about .* 2\.0 GiB are.*kv_cache_gib"):
        memory.check_memory(config, tmp_path, has_reference=False)
    monkeypatch.setattr(memory, "available_bytes", lambda: 64 * memory.GIB)
    memory.check_memory(config, tmp_path, has_reference=False)
