"""`resume=auto`: what a job does that a cluster submits again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config import Config
from common.config_loader import dump_config, load_config
from common.errors import UserError
from common.manifest import seal
from deploy.launch import found, train


def config(folder: Path, *overrides: str) -> Config:
    keys = ["model.path=none", f"runs_dir={folder}", "steps=4", *overrides]
    return load_config([], keys)


def finished(folder: Path, steps: int) -> None:
    run = folder / "job"
    checkpoint = run / "checkpoints" / f"step-{steps}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    seal(checkpoint)
    (run / "config.yaml").write_text(dump_config(config(folder)))
    (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "eval/accuracy": 0.5}) + "\n")


def test_the_run_of_the_name_is_found_or_a_new_one_begun(tmp_path: Path) -> None:
    asked = config(tmp_path, "resume=auto", "name=job")
    assert found(asked).resume is None
    finished(tmp_path, 2)
    assert found(asked).resume == str(tmp_path / "job")
    assert found(config(tmp_path, "name=job")).resume is None
    with pytest.raises(UserError, match="needs name="):
        found(config(tmp_path, "resume=auto"))


def test_a_run_that_is_done_is_not_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The retry of a job whose end was not noticed ends well, without starting anything."""
    finished(tmp_path, 4)
    metrics = train(config(tmp_path, "resume=auto", "name=job"))
    assert metrics == {"step": 4, "eval/accuracy": 0.5}
    assert "is done, 4 steps" in capsys.readouterr().out
    assert not (tmp_path / "job" / "log").exists()
