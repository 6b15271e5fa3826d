"""`grpo-lambda plan`: works for every preset and recipe, and says where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.load import load_config
from deploy.cli import main
from deploy.command.presets import CONFIGS, RECIPES, load
from deploy.predict import cluster_plan

PRESETS = sorted(CONFIGS.glob("*.yaml"))
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TINY = CONFIGS / "tiny.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = main(["plan", *words])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def configuration(text: str) -> str:
    """The part of a plan that is YAML."""
    return text.partition("\n# Placement")[0].partition("\n# Pools")[0]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_planned(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cluster_plan, "_STEPS", 10)  # of the simulation; 64 devices take long
    text = plan(capsys, "--config", str(path))
    assert "# Batch arithmetic" in text
    assert ("# Predicted step" in text) == ("x8" in path.stem)
    written = tmp_path / "planned.yaml"
    written.write_text(configuration(text))  # with its comments
    planned, config = load_config([written], [], resolved=True), load(path, [])
    assert planned.model.dtype in ("bfloat16", "float32")
    config.model.dtype = planned.model.dtype
    assert planned == config


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "--config", str(TINY), f"recipe={name}")
    assert f"recipe: {name}  # " in text
    assert name in ("grpo", "lambda_grpo") or f"  # recipe {name}" in text


def test_a_plan_says_where_each_value_came_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(TINY.read_text() + "algorithm: {objective: {epochs: 2}}\n")
    keys = ("recipe=dapo", "algorithm.objective.clip_low=0.1", "data.system_prompt=one\ntwo")
    lines = plan(capsys, "--config", str(mine), *keys).splitlines()
    for line in (
        "    clip_high: 0.28  # recipe dapo",
        f"    epochs: 2  # file {mine}",
        f"    params:  # file {mine}",
        "    clip_low: 0.1  # command line",
        "    kl: 0.0",
    ):
        assert line in lines
    (text,) = (line for line in lines if line.endswith("two'  # command line"))
    assert text.strip() != "two'"  # behind the last line of text that goes over several


def test_a_data_type_that_the_machine_decides_is_said_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = plan(capsys, "--config", str(CONFIGS / "smollm2.yaml"))
    assert "  # auto, for the devices" in text
