"""The command line: exit status and one clear message for every mistake, before anything starts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config_loader import load_config
from common.errors import UserError
from deploy import cluster
from deploy.cli import main
from deploy.placement import plan_cores

ROOT = Path(__file__).resolve().parent.parent
RULE = "verifier.rules=[{name: math_answer}]"
IN_RATIO = "algorithm.credit.application=trace"
GUIDED = ("data.source=file", "data.path=x.jsonl", "algorithm.rollout.guidance.ratio=0.5")


def test_plan_prints_everything_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(ROOT / "deploy/configs/tiny.yaml"), "steps=7"]) == 0
    printed = capsys.readouterr().out
    for part in ("steps: 7", "# Placement", "generator-0", "learner rank 0", "# Batch arithmetic"):
        assert part in printed
    assert "8 prompts x 8 completions = 64" in printed
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["plan", "learner.lerning_rate=1"], 2, "learning_rate"),
        (["plan", "--config", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["train", "resume=nowhere"], 2, "there is no run in this folder"),
        (["train", "model.path=/nowhere"], 2, "there is no such folder"),
        (["train", "ray.address=127.0.0.1:1"], 2, "nothing answers at ray.address"),
        (["train", "weights.transport=nccl", "learner.device=cpu"], 2, "object_store"),
        (["train", "data.source=file", "data.path=no.jsonl", RULE], 2, "no.jsonl does not"),
        (["train", "ray.address=ray://127.0.0.1:1"], 2, "submit the run as a job"),
        (["plan", "recipe=grpo_lambda_cut", IN_RATIO], 2, "application = weight"),
        (["train", "algorithm.credit.lambda_=1.5"], 2, "must lie in [0, 1]"),
        (["plan", "algorithm.rollout.guidance.ratio=1.5"], 2, "must lie in [0, 1]"),
        (["plan", *GUIDED, RULE], 2, "needs data.solution_column"),
    ],
)
def test_mistakes_end_with_a_status_and_a_message(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [f"runs_dir={tmp_path}", "name=wrong"] if arguments[0] == "train" else []
    preset = [] if "--config" in arguments or "resume=nowhere" in arguments else ["--config"]
    config = [str(ROOT / "deploy/configs/tiny.yaml")] if preset else []
    assert main([arguments[0], *preset, *config, *arguments[1:], *overrides]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()  # the name is free for the next try


def test_help_is_instant() -> None:
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", "--help"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=30,
    )
    assert time.monotonic() - started < 2.0  # 0.35 s on an idle machine
    imports = "import sys, deploy.cli; print('torch' in sys.modules or 'ray' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", imports], cwd=ROOT, check=True, capture_output=True, timeout=30
    )
    assert loaded.stdout.strip() == b"False"


def test_an_address_that_is_none_is_refused_at_once() -> None:
    config = load_config([], ["model.path=x", "ray.address=somewhere"])
    with pytest.raises(UserError, match="local, auto or HOST:PORT"):
        cluster.connect(config, plan_cores(config, [0], []))
