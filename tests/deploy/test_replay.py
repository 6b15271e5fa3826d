"""Replay against a run that was put together from the real learner, log and ledger."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from learner_models import save_tiny_model, trajectories
from learner_ranks import worker
from made_up_groups import request_for

from common.config.algorithm import (
    AdvantageConfig,
    AlgorithmConfig,
    BaselineConfig,
    CreditConfig,
    ObjectiveConfig,
)
from common.config.load import dump_config
from common.config.sections import (
    AdapterConfig,
    Config,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    TeacherConfig,
    VerifierConfig,
    VerifierSpec,
)
from common.errors import UserError
from common.record.credit_log import VERSION_KEY, credit_path, read_credit, read_scores
from common.record.ledger import Ledger
from common.record.metrics import JsonlSink
from common.record.trajectory_log import TrajectoryLog
from common.record.writer import receipt
from deploy.inspector.replay import other_rule, replay, step_batches
from deploy.inspector.replay_report import cosine, describe, early_share
from deploy.models.resolve import ModelLocation
from deploy.placement.options import plan_here
from deploy.run.actors import learner_job
from learner.training.rank import LearnerRank

RECIPES = Path(__file__).resolve().parents[2] / "deploy/configs/recipes"
STEPS, SAVED = 4, 2
SHAPES = [(9, [5, 12, 3, 7]), (4, [20, 2, 9])]
TRACE = CreditConfig(kind="lambda_trace", trace="recent", lambda_=0.9)


def groups_of(step: int) -> list[pa.RecordBatch]:
    """Two groups of a run, the later ticket first in the log, one weight version old."""
    batches = []
    for place, batch in enumerate(trajectories(SHAPES, seed=step, version=max(step - 2, 0))):
        columns = batch.to_pydict()
        ticket = 2 * (step - 1) + place
        for name in ("group_id", "ticket"):
            columns[name] = [ticket] * batch.num_rows
        batches.append(pa.RecordBatch.from_pydict(columns, schema=batch.schema))
    return batches


def _config(folder: Path) -> Config:
    return Config(
        recipe="grpo_lambda_recent",
        steps=STEPS,
        model=ModelConfig(path=str(folder), dtype="float32"),
        generator=GeneratorConfig(max_completion_tokens=48, temperature=0.9),
        verifier=VerifierConfig(rules=[VerifierSpec(name="reasoning_gym")]),
        algorithm=AlgorithmConfig(credit=TRACE),
        learner=LearnerConfig(device="cpu", learning_rate=1e-3, warmup_steps=0),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return _made(tmp_path_factory.mktemp("run"), folder, _config(folder), unlogged=1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under a teacher of another size, which is gone afterwards."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    teacher = save_tiny_model(tmp_path_factory.mktemp("teacher"), "llama_untied")
    args = {"reward_weight": 1.0}
    advantage = AdvantageConfig(kind="distill", scorer="teacher", args=args)
    config = replace(
        _config(folder),
        algorithm=AlgorithmConfig(advantage=advantage),
        teacher=TeacherConfig(path=str(teacher)),
    )
    made = _made(tmp_path_factory.mktemp("run"), folder, config)
    shutil.rmtree(teacher)
    return made


def _made(path: Path, folder: Path, config: Config, unlogged: int = 0) -> Path:
    """A run at `path` of which the first `unlogged` steps have no credit log."""
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(dump_config(config))
    threads = plan_here(config, []).learner_threads
    job = learner_job(config, ModelLocation(str(folder), str(folder)))
    made = LearnerRank(replace(job, learner=replace(job.learner, threads=threads)), 0)
    made.setup(*made.rendezvous_address())
    ledger, sink = Ledger(path / "ledger.sqlite", "test"), JsonlSink(path / "metrics.jsonl")
    log = TrajectoryLog(path / "trajectories", groups_of(1)[0].schema)
    for step in range(1, STEPS + 1):
        groups = groups_of(step)
        for batch in reversed(groups):  # logged as they end, taken by ticket
            ledger.dispatched(request_for(batch))
            log.append(batch)
            ledger.verified(batch.column("ticket")[0].as_py(), 1)
        credit_run = None if step <= unlogged else str(path)
        metrics = made.step(groups, step - 1, 1, credit_run)
        ledger.trained(step, [receipt(batch, None) for batch in groups])
        sink.write(step, metrics)
        if step == SAVED:
            made.take_checkpoint({})
            made.write_checkpoint(str(path / "checkpoints" / f"step-{step}"))
    made.shutdown()
    log.close()
    ledger.end()
    sink.close()
    return path


@pytest.mark.parametrize(("step", "start"), [(1, 0), (2, 0), (3, SAVED), (4, SAVED)])
def test_every_step_comes_out_bitwise(run: Path, step: int, start: int) -> None:
    found = replay(run, step)
    assert found.differences == []
    assert found.from_step == start
    assert found.compared >= 14 + 6 * (step > 1)
    assert "all the same, bitwise" in describe(found, "x")


def test_steps_under_a_teacher_come_out_bitwise_without_it(taught: Path) -> None:
    scores = read_scores(taught, SAVED + 1)
    assert all(np.isfinite(each).all() for each in scores.values())
    for step in (SAVED, SAVED + 2):  # the second goes over a step between, whose scores count too
        found = replay(taught, step)
        assert found.differences == []
        assert found.metrics["scorer/gap"] != 0
    other = other_rule(taught, ["recipe=grpo"], RECIPES)
    judged = replay(taught, SAVED, other).other
    assert judged is not None
    assert "scorer/gap" not in judged.metrics
    other = other_rule(taught, ["algorithm.advantage.args.reward_weight=0"], RECIPES)
    judged = replay(taught, SAVED, other).other
    assert judged is not None
    assert judged.metrics["scorer/gap"] == replay(taught, SAVED).metrics["scorer/gap"]


def test_a_run_that_saves_memory_is_replayed_bitwise(tmp_path: Path) -> None:
    """Weights are rounded as they were. A run on a device may have kept activations on its host."""
    folder = save_tiny_model(tmp_path / "tiny")
    learner = replace(
        _config(folder).learner, masters="bfloat16", optimizer=OptimizerConfig(state="8bit")
    )
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    config = replace(_config(folder), model=model, learner=learner)
    run = _made(tmp_path / "run", folder, config)
    offloaded = replace(config, learner=replace(learner, activation_offload=True))
    (run / "config.yaml").write_text(dump_config(offloaded))
    for step in (SAVED, SAVED + 2):
        assert replay(run, step).differences == []


def test_values_of_a_critic_come_out_bitwise_beside_adapters_too(tmp_path: Path) -> None:
    """Behind a checkpoint, and with a log of before it had values: those are not compared."""
    folder = save_tiny_model(tmp_path / "tiny")
    config = replace(
        _config(folder),
        model=ModelConfig(path=str(folder), dtype="float32", adapter=AdapterConfig(rank=4)),
        algorithm=AlgorithmConfig(
            baseline=BaselineConfig(kind="none"), advantage=AdvantageConfig(kind="gae")
        ),
    )
    run = _made(tmp_path / "run", folder, config)
    found = replay(run, SAVED + 2)
    assert found.differences == [] and found.from_step == SAVED
    values = read_credit(run, SAVED + 2)["values"].to_pylist()
    assert max(abs(value) for each in values for value in each) > 0
    path = credit_path(run, SAVED + 2)
    older = read_credit(run, SAVED + 2).drop_columns(["values"])
    older = older.replace_schema_metadata({VERSION_KEY: b"3"})
    with pa.ipc.new_file(path, older.schema) as file:
        file.write_table(older)
    again = replay(run, SAVED + 2)
    assert again.differences == [] and again.compared == found.compared - 1


def test_a_mix_that_decays_goes_by_the_step_behind_a_checkpoint_too(tmp_path: Path) -> None:
    """It is over after three steps: the fourth has GRPO's credit, and replays as the others do."""
    folder = save_tiny_model(tmp_path / "tiny")
    teacher = save_tiny_model(tmp_path / "teacher", "llama_untied")
    args = {"mix": 1.0, "bound": 0.9, "decay_steps": STEPS - 1}
    config = replace(
        _config(folder),
        algorithm=AlgorithmConfig(
            advantage=AdvantageConfig(kind="evidence", scorer="teacher", args=args)
        ),
        teacher=TeacherConfig(path=str(teacher)),
    )
    run = _made(tmp_path / "run", folder, config)
    for step in range(1, STEPS + 1):
        found = replay(run, step)
        assert found.differences == []
        assert found.from_step == (SAVED if step > SAVED else 0)
        spread = [np.ptp(each) for each in found.credit["advantages"].to_pylist()]
        assert (max(spread) == 0) == (step == STEPS)


@pytest.mark.parametrize(
    "objective",
    [
        {"isolate_below": 0.02, "updates_per_batch": 2},
        {"kind": "disco", "args": {"beta": 1.0}, "updates_per_batch": 2},
    ],
)
def test_steps_of_several_updates_come_out_bitwise(
    tmp_path: Path, objective: dict[str, Any]
) -> None:
    """From the start, and over a step between behind the checkpoint, as a resume goes on."""
    folder = save_tiny_model(tmp_path / "tiny")
    algorithm = AlgorithmConfig(objective=ObjectiveConfig(**objective))
    config = _config(folder)
    learner = replace(config.learner, learning_rate=0.03)
    run = _made(tmp_path / "run", folder, replace(config, algorithm=algorithm, learner=learner))
    for step in (SAVED, SAVED + 2):
        found = replay(run, step)
        assert found.differences == []
        assert found.metrics["clip_fraction"] > 0  # else there was but one update


def test_a_step_whose_scores_are_gone_says_so(taught: Path, tmp_path: Path) -> None:
    copy = _copy(taught, tmp_path)
    credit_path(copy, SAVED).unlink()
    with pytest.raises(UserError, match="step-000002"):
        replay(copy, SAVED)


def test_another_rule_is_judged_by_the_same_policy_and_completions(run: Path) -> None:
    before = replay(run, 1)
    other = other_rule(run, ["recipe=grpo"], RECIPES)
    found = replay(run, 1, other)
    assert found.differences == []  # the probe has moved nothing
    assert found.other is not None
    with worker(Path(_model(run)), algorithm=AlgorithmConfig(), tokens_per_microbatch=4096) as made:
        alone = made.step(groups_of(1), 0, 1)
    for name in ("grad_norm", "loss/policy", "tokens/trained", "reward/mean"):
        assert found.other.metrics[name] == pytest.approx(alone[name], rel=1e-5), name
    rows = read_credit(run, 1, "grpo").to_pylist()
    assert all(row["trace_weights"] == [1.0] * len(row["trace_weights"]) for row in rows)
    mine, theirs = found.credit, found.other.credit
    a, b = (np.concatenate(table.column("advantages").to_pylist()) for table in (mine, theirs))
    expected = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    assert cosine(mine, theirs) == pytest.approx(expected)
    assert early_share(theirs) < early_share(mine) == early_share(before.credit)
    text = describe(found, "grpo_lambda_recent")
    assert "cosine with the run's advantages" in text
    assert "step-000001.grpo.arrow" in text


def test_a_key_alone_changes_the_rule_of_the_run(run: Path) -> None:
    name, config = other_rule(run, ["algorithm.credit.lambda_=0.5"], RECIPES)
    assert name == "credit.lambda_=0.5"
    assert config.algorithm.credit == replace(TRACE, lambda_=0.5)
    _, fresh = other_rule(run, ["recipe=grpo"], RECIPES)
    assert fresh.algorithm.credit.kind == "broadcast"  # nothing of the run's own rule is left
    with pytest.raises(UserError, match=r"steps=3: another rule is recipe=NAME and keys"):
        other_rule(run, ["steps=3"], RECIPES)


def test_a_rule_that_needs_a_reference_the_run_did_not_have_is_refused(run: Path) -> None:
    other = other_rule(run, ["algorithm.objective.kl=0.1"], RECIPES)
    with pytest.raises(UserError, match="set algorithm.objective.kl=0"):
        replay(run, 1, other)


def test_a_changed_log_is_found(run: Path, tmp_path: Path) -> None:
    copy = _copy(run, tmp_path)
    _rewrite(copy, lambda batches: [_with_other_token(batch) for batch in batches])
    found = replay(copy, 3)
    names = {difference.name for difference in found.differences}
    assert {"grad_norm", "credit/logprobs"} <= names
    assert "credit/advantage" not in names  # rewards were left alone
    assert "numbers differ from the record, by up to" in describe(found, "x")


def test_a_group_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    copy = _copy(run, tmp_path)
    _rewrite(copy, lambda batches: [b for b in batches if b.column("ticket")[0].as_py() != 5])
    with pytest.raises(UserError, match="group 5, trained in step 3, is not in the log"):
        replay(copy, 3)


def test_steps_that_are_not_there_are_refused(run: Path, tmp_path: Path) -> None:
    for step in (0, STEPS + 1):
        with pytest.raises(UserError, match="has steps 1 to 4 on record"):
            replay(run, step)
    with pytest.raises(UserError, match="the ledger has no group that trained in step 5"):
        step_batches(run, range(4, 6))
    with pytest.raises(UserError, match="there is no run"):
        replay(tmp_path, 1)


def _model(run: Path) -> str:
    line = next(x for x in (run / "config.yaml").read_text().splitlines() if "path: /" in x)
    return line.split("path: ")[1]


def _copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def _rewrite(run: Path, change) -> None:
    from common.record.trajectory_log import read_log

    batches = change([*read_log(run / "trajectories")])
    shutil.rmtree(run / "trajectories")
    log = TrajectoryLog(run / "trajectories", batches[0].schema)
    for batch in batches:
        log.append(batch)
    log.close()


def _with_other_token(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = batch.to_pydict()
    columns["token_ids"][0][0] = columns["token_ids"][0][0] % 7 + 3
    return pa.RecordBatch.from_pydict(columns, schema=batch.schema)
