"""What a configuration does that its numbers do not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_config
from common.config.notes import notes
from common.config.sections import Config

CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"


def loaded(*keys: str) -> Config:
    return load_config([CONFIGS / "tiny.yaml"], keys, CONFIGS / "recipes")


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        (["recipe=grpo"], True),
        (["recipe=grpo", "algorithm.objective.updates_per_batch=2"], False),
        (["recipe=grpo", "algorithm.objective.epochs=2"], False),
        (["recipe=grpo", "algorithm.objective.anchor=behaviour"], False),
        (
            ["recipe=grpo", "algorithm.objective.updates_per_batch=2", "batch.prompts_per_step=1"],
            True,
        ),
        (["recipe=gpg"], False),
        (["recipe=gspo"], False),
    ],
)
def test_a_clip_that_cannot_act_is_said(keys: list[str], idle: bool) -> None:
    assert any("cannot act" in note for note in notes(loaded(*keys))) == idle


def test_more_updates_than_prompts_are_said() -> None:
    found = notes(loaded("recipe=dapo", "batch.prompts_per_step=4"))
    assert any("more than the 4 prompts of a step" in note for note in found)


def test_a_raw_trace_prefers_length_and_a_normalised_one_does_not() -> None:
    """Mean weights 21.1 at 48 tokens and 2.5 at 4: by summing them."""

    def mean(tokens: int) -> float:
        return sum(sum(0.99**j for j in range(tokens - k)) for k in range(tokens)) / tokens

    keys = ["recipe=grpo_lambda_recent", "generator.max_completion_tokens=48"]
    (note,) = [n for n in notes(loaded(*keys)) if "prefers length" in n]
    assert f"has {mean(48) / mean(4):.1f} times the credit of one of 4" in note
    keys.append("algorithm.credit.normalize=mean")
    assert not any("prefers length" in n for n in notes(loaded(*keys)))
