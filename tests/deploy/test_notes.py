"""What a configuration does that its numbers do not show."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config.load import load_config, load_with_origins
from common.config.sections import Config
from common.errors import UserError
from deploy.cli import main
from deploy.predict.notes import notes
from deploy.run import coordinator
from deploy.run.service import Service

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
        (["recipe=grpo", "algorithm.objective.isolate_below=0.4"], False),
        (["recipe=disco", "algorithm.objective.updates_per_batch=1"], True),
        (["recipe=gpg"], False),
        (["recipe=grpo", "algorithm.objective.kind=dro"], True),
        (["recipe=grpo", "algorithm.objective.kind=kl_cov"], True),
        *(([f"recipe={name}"], False) for name in ("gspo", "gmpo", "dapo", "cispo", "cppo")),
        (["recipe=cispo", "algorithm.objective.updates_per_batch=1"], True),
        (["recipe=cppo", "algorithm.objective.epochs=1"], True),
    ],
)
def test_a_clip_that_cannot_act_is_said(keys: list[str], idle: bool) -> None:
    assert any("cannot act" in note for note in notes(loaded(*keys))) == idle


def test_plan_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(CONFIGS / "tiny.yaml"), "recipe=grpo"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot act" in line]
    assert "note " in line and "objective.kind=ppo" in line


def test_the_first_lines_of_a_run_say_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the model is looked for."""

    def missing(*_: object) -> None:
        raise UserError("no such model")

    monkeypatch.setattr(coordinator, "find_inputs", missing)
    nothing: Any = None
    place: Any = SimpleNamespace(path=tmp_path)
    run = coordinator.Run(loaded("recipe=grpo"), place, Service(), nothing, nothing)
    with pytest.raises(UserError, match="no such model"):
        asyncio.run(run.main())
    assert "cannot act" in capsys.readouterr().out


def test_more_updates_than_prompts_are_said() -> None:
    found = notes(loaded("recipe=dapo", "batch.prompts_per_step=4"))
    assert any("more than the 4 prompts of a step" in note for note in found)


def test_a_raw_trace_prefers_length_and_a_normalised_one_does_not() -> None:
    """Mean weights 21.1 at 48 tokens and 2.5 at 4: by summing them."""

    def mean(tokens: int) -> float:
        return sum(sum(0.99**j for j in range(tokens - k)) for k in range(tokens)) / tokens

    keys = ["recipe=grpo_lambda_recent", "generator.max_completion_tokens=48"]
    raw = "algorithm.credit.normalize=none"
    (note,) = [n for n in notes(loaded(*keys, raw)) if "prefers length" in n]
    assert (
        f"has on average {mean(48) / mean(4):.2g} times the credit of one in an answer of 4" in note
    )
    for without in ("normalize=mean", "args={weighted_mean: true}"):
        found = notes(loaded(*keys, raw, f"algorithm.credit.{without}"))
        assert not any("prefers length" in note for note in found)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("grpo_lambda_both", "prefers length"),
        ("grpo_lambda_recent_weight", "prefers length"),
        ("grpo_lambda_terminal", "prefers short answers"),
    ],
)
@pytest.mark.parametrize("kind", ["sequence_mean", "token_mean"])
def test_every_shape_and_place_of_a_raw_trace_says_so(recipe: str, said: str, kind: str) -> None:
    found = notes(
        loaded(
            f"recipe={recipe}",
            "generator.max_completion_tokens=200",
            "model.max_length=400",
            "algorithm.credit.normalize=none",
            f"algorithm.aggregation.kind={kind}",
        )
    )
    assert any(said in note for note in found)


def test_the_presets_do_not_prefer_length() -> None:
    for path in CONFIGS.glob("*.yaml"):
        config = load_config([path], [], CONFIGS / "recipes")
        assert config.algorithm.credit.normalize == "mean", path.name


@pytest.mark.parametrize(
    ("preset", "keys", "said"),
    [
        ("tiny", [], None),
        ("tiny", ["model.adapter.rank=8"], "learner.learning_rate=0.00015 looks like that: try "),
        ("tiny", ["model.adapter.rank=8", "learner.learning_rate=1.5e-3"], None),
        ("tiny", ["model.adapter.rank=8", "learner.learning_rate=1e-6"], "=1e-06 looks like"),
        ("qwen2.5-3b-lora-24gb", [], None),
        ("qwen2.5-3b-lora-24gb", ["learner.learning_rate=1e-6"], "try 1e-05"),
    ],
)
def test_adapters_with_the_learning_rate_of_full_fine_tuning_are_told(
    preset: str, keys: list[str], said: str | None
) -> None:
    """`plan` knows that the rate was set before adapters were turned on."""
    path, recipes = CONFIGS / f"{preset}.yaml", CONFIGS / "recipes"
    found = load_with_origins([path], keys, recipes)
    told = [note for note in notes(found.config, found.origins) if "model.adapter" in note]
    assert [said in note for note in told] == ([] if said is None else [True])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], False),
        (["algorithm.correction.kind=none"], True),
        (["algorithm.correction.kind=icepop"], False),
        (["algorithm.correction.kind=none", "algorithm.objective.anchor=behaviour"], False),
    ],
)
def test_eight_bits_without_a_correction_are_said(keys: list[str], said: bool) -> None:
    found = notes(loaded("recipe=grpo", "generator.quantization=int8", *keys))
    assert any("sampled with int8, trained with float32" in note for note in found) is said
    assert not any("int8" in note for note in notes(loaded("recipe=grpo", *keys)))
