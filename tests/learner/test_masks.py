"""Dense masks of a step: those of one micro-batch at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learner_models import save_tiny_model, trajectories
from learner_ranks import SHAPES, worker

from learner.policy.model import Policy
from learner.policy.packing import PackedRow
from learner.training.trainer import Trainer


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": 0.1}, {"kl": 0.1, "kl_in": "reward"}, {"updates_per_batch": 2}],
    ids=["plain", "reference", "reference before the step", "old policy before the step"],
)
def test_a_micro_batch_has_let_its_masks_go_when_the_next_begins(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a step at once took a GB of the device, beside activations of one micro-batch."""
    layouts: list[Any] = []
    made: list[int] = []
    accumulate, logprobs = Trainer._accumulate, Policy.logprobs

    def passed(self: Policy, row: PackedRow, **options: Any) -> Any:
        layouts.append(row.layout)
        return logprobs(self, row, **options)

    def seen(self: Trainer, microbatch: Any, *args: Any) -> Any:
        assert not any(layout.derived for layout in layouts)
        done = accumulate(self, microbatch, *args)
        made.append(len(microbatch.row.layout.derived))
        return done

    monkeypatch.setattr(Policy, "logprobs", passed)
    monkeypatch.setattr(Trainer, "_accumulate", seen)
    with worker(save_tiny_model(tmp_path), tokens_per_microbatch=32, **changes) as learner:
        learner.step(trajectories(SHAPES), 0, 0)
    assert len(layouts) > 1
    assert any(made)
    assert not any(layout.derived for layout in layouts)
