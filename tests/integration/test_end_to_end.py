"""The whole loop on real parts: Ray, vLLM, two FSDP ranks, verifiers in child processes.

One run of the tiny preset, as a person would start it, and then everything that can be asked of
what it left behind.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from run_process import finish, inspect, leftovers, run_python, start

from common.config.load import load_config
from common.record.metric_names import METRICS
from common.record.metrics import read_metrics
from common.record.trajectory_log import read_log, segments

STEPS = 24
CONTRACT = [
    "step",
    "policy_version",
    "reward/mean",
    "reward/accuracy",
    "staleness/max",
    "staleness/mean",
    "tokens/trained",
    "tokens/generated",
    "time/step",
    "time/generate",
    "time/train",
    "time/publish",
    "time/wait_data",
    "loss/policy",
    "loss/kl",
    "grad_norm",
    "clip_fraction",
    "is_ratio/mean",
    "logprob_gap/mean",
    "packing/efficiency",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synchronous run with two learner ranks; the folder it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    before = set(psutil.pids())
    process = start(
        f"runs_dir={folder}",
        "name=e2e",
        f"steps={STEPS}",
        "generator.max_staleness=0",
        "learner.ranks=2",
        "eval.every=12",
        "checkpoint.every=12",
    )
    output = finish(process, 280)
    assert process.returncode == 0, output
    assert leftovers(before) == []
    return folder / "e2e"


def test_held_out_accuracy_rises_and_every_step_is_on_record(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        missing = [key for key in CONTRACT if key not in record]
        assert not missing
        assert record["staleness/max"] == 0
        assert record["policy_version"] == record["step"]
    before, after = records[0]["eval/accuracy"], records[-1]["eval/accuracy"]
    assert after >= before + 0.1, f"{before} -> {after}"
    assert list((run / "tensorboard").glob("events.*"))


def test_the_first_record_says_what_the_start_took(run: Path) -> None:
    first, *others = read_metrics(run / "metrics.jsonl")
    start = {name: value for name, value in first.items() if name.startswith("time/start/")}
    assert set(start) == {name for name in METRICS if name.startswith("time/start/")}
    assert all(value > 0 for value in start.values())
    assert not any(name.startswith("time/start/") for record in others for name in record)


def test_the_canary_held_at_every_publish(run: Path) -> None:
    tolerance = load_config([run / "config.yaml"], [], resolved=True).canary_tolerance
    gaps = [record["canary/gap"] for record in read_metrics(run / "metrics.jsonl")]
    assert len(gaps) == STEPS + 1
    assert max(gaps) <= tolerance
    assert min(gaps) >= 0


def test_sampler_and_trainer_agree_on_every_log_probability(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")[1:]
    assert max(record["logprob_gap/mean"] for record in records) < 1e-4
    assert all(abs(record["is_ratio/mean"] - 1) < 1e-3 for record in records)


def test_every_group_is_in_the_log_once_and_held_out_questions_never(run: Path) -> None:
    batches = list(read_log(run / "trajectories"))
    ids = [batch.column("group_id")[0].as_py() for batch in batches]
    prompts = load_config([run / "config.yaml"], [], resolved=True).batch.prompts_per_step
    assert len(ids) == len(set(ids)) >= STEPS * prompts
    closed = [
        path for path in segments(run / "trajectories") if path.with_suffix(".parquet").exists()
    ]
    assert closed
    questions = {json.loads(batch.column("reference")[0].as_py())["prompt"] for batch in batches}
    evaluated = pq.read_table(run / "evaluations" / "step-000000.parquet")
    held_out = {json.loads(text)["prompt"] for text in evaluated.column("reference").to_pylist()}
    assert len(held_out) == 200
    assert not questions & held_out


def test_the_account_closes(run: Path) -> None:
    status, output = inspect(run)
    assert status == 0, output
    assert output.splitlines()[-1] == "the account closes"
    config = load_config([run / "config.yaml"], [], resolved=True)
    trained = STEPS * config.completions_per_step
    assert f"trained{trained:>17}" in output


def test_one_rank_computes_the_loss_that_two_ranks_did(run: Path) -> None:
    """The first step's groups, from the log, through a learner of one rank on the start model."""
    script = Path(__file__).with_name("one_rank_step.py")
    result = run_python(str(script), str(run), timeout_s=120)
    assert result.returncode == 0, result.stderr
    alone: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    together = read_metrics(run / "metrics.jsonl")[1]
    for key in ("loss/policy", "grad_norm", "reward/mean", "tokens/trained", "credit/mean_weight"):
        assert alone[key] == pytest.approx(together[key], rel=1e-4, abs=1e-6), key


def test_the_checkpoint_gives_the_same_greedy_answers_in_transformers(run: Path) -> None:
    """The last evaluation came from vLLM with published weights; transformers reads the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / f"step-{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pq.read_table(run / "evaluations" / f"step-{STEPS:06d}.parquet").to_pylist()[:20]
    same = 0
    for row in rows:
        prompt = torch.tensor([row["prompt_ids"]])
        with torch.no_grad():
            output = model.generate(
                prompt,
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        same += output[0, prompt.shape[1] :].tolist() == row["token_ids"]
    assert same >= 19  # a tie of two tokens may fall either way


def test_the_run_goes_on_from_its_checkpoint(run: Path) -> None:
    process = start(f"resume={run}", f"steps={STEPS + 2}", f"runs_dir={run.parent}")
    output = finish(process, 200)
    assert process.returncode == 0, output
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 3))
    assert records[STEPS + 1]["reward/mean"] > records[1]["reward/mean"]
    ids = [batch.column("group_id")[0].as_py() for batch in read_log(run / "trajectories")]
    assert len(ids) == len(set(ids))
    status, account = inspect(run)
    assert status == 0, account


def test_ctrl_c_ends_everything_and_says_so(tmp_path: Path) -> None:
    before = set(psutil.pids())
    process = start(f"runs_dir={tmp_path}", "name=stopped", "eval.prompts=20")
    deadline = time.monotonic() + 200
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) > 5):
        if time.monotonic() > deadline:
            pytest.fail(f"no step within 200 s:\n{finish(process, 0)}")
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output = finish(process, 60)
    assert process.returncode == 130, output
    assert "stopped by Ctrl-C" in output
    assert "Traceback" not in output
    assert leftovers(before) == []
    assert read_metrics(metrics)[-1]["step"] >= 5
    status, account = inspect(tmp_path / "stopped")
    assert status == 0, account
    assert_updates_in_flight(tmp_path / "stopped")


def assert_updates_in_flight(run: Path) -> None:
    """Some completions were sampled by two versions, the older one first."""
    spans = [
        versions
        for batch in read_log(run / "trajectories")
        for versions in batch.column("weight_versions").to_pylist()
    ]
    assert all(versions == sorted(versions) for versions in spans)
    assert any(versions[0] < versions[-1] for versions in spans)
