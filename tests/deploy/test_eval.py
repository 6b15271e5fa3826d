"""`grpo-lambda eval` without Ray: settings, folders, the loop on fakes, the numbers of a log."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from actors.data.prompts import Prompt
from actors.generation.engine import Completion
from actors.generation.rows import rollout_batch
from actors.rollout.episodes import Episodes
from actors.rollout.guidance import GuidedStart
from actors.rollout.pools import GroupLostError
from actors.verifiers import math_answer
from actors.verifiers.base import Verdict
from actors.verifiers.judge import judgement
from actors.verifiers.worker import with_verdicts
from common.config.load import load_config
from common.config.sections import VerifierSpec
from common.errors import RunError, StallError, UserError
from common.record.schema import trajectory_schema
from common.record.trajectory_log import TrajectoryLog, read_log
from common.trajectory import GroupRequest, ticket_seed
from deploy.cli import main
from deploy.eval import launch, report
from deploy.eval.runner import SuiteRunner, logged, sample_seed
from deploy.eval.settings import (
    Options,
    Sampling,
    context_length,
    differences,
    evaluation_config,
    fingerprint,
    for_suite,
    sampling_of,
    settings_of,
)
from deploy.eval.suite import load_suite
from deploy.placement.memory import estimate
from deploy.placement.options import actor_options, plan_cores
from deploy.placement.reservation import LEARNER, wishes

OPTIONS = Options(model="m", suites=["arithmetic-small"])
SAMPLING = Sampling(samples=3, temperature=1.0, max_tokens=8, seed=5)
GRADER = VerifierSpec(name="math_answer")
PROBLEMS = 4


# Options and settings


def test_one_sample_is_greedy_unless_a_temperature_is_given() -> None:
    suite = load_suite("math500")
    assert sampling_of(OPTIONS, suite, 7) == Sampling(4, suite.temperature, 8192, 7)
    assert sampling_of(replace(OPTIONS, samples=1), suite, 7).temperature == 0.0
    assert sampling_of(replace(OPTIONS, samples=1, temperature=0.5), suite, 7).temperature == 0.5
    assert sampling_of(replace(OPTIONS, max_tokens=9), suite, 7).max_tokens == 9
    for wrong in (
        {"samples": 0},
        {"samples": 2, "temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": 0.001},
        {"temperature": 2.5},
        {"temperature": math.nan},
    ):
        with pytest.raises(UserError):
            sampling_of(replace(OPTIONS, **wrong), suite, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.group_size=2", "no meaning for eval"),
        ("learner.ranks=2", "no meaning for eval"),
        ("generator.temperature=1", "decided by --temperature"),
        ("verifier.rules=[]", "decided by another suite"),
        ("model.max_length=9", "decided by --max-tokens"),
        ("generator.max_staleness=1", "one version"),
        ("generator.cont=2", "did you mean count"),
        ("seed", "write key=value"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluation_config(replace(OPTIONS, overrides=[override]))


def test_the_parts_are_those_of_a_synchronous_run_without_a_learner() -> None:
    overrides = ["generator.count=2", "generator.max_concurrent_sequences=3", "verifier.workers=2"]
    base = evaluation_config(replace(OPTIONS, overrides=overrides))
    suite = load_suite("humaneval")
    config = for_suite(base, suite, SAMPLING)
    assert config.generator.max_staleness == 0  # a seed for each request
    assert config.in_flight == 6
    assert config.verifier.rules == [suite.grader]
    assert config.verify_timeout_s >= 6 * suite.verdict_timeout_s
    trained = load_config([], ["model.path=m", *overrides, "generator.max_staleness=0"])
    plans = [plan_cores(each, [0, 1], []) for each in (config, trained)]
    assert [plan.generator_threads for plan in plans] == [1, 1]
    assert [plan.learner_cores for plan in plans] == [[], [[0, 1]]]
    of_run = [wish.name for wish in wishes(trained, actor_options(trained, plans[1], cuda=False))]
    found = [wish.name for wish in wishes(config, actor_options(config, plans[0], cuda=False))]
    assert found == [name for name in of_run if name != LEARNER] != of_run
    serving, training = estimate(config, 10**9), estimate(trained, 10**9)
    assert serving.learner == serving.checkpoint == serving.transfer == 0
    assert serving.generators == training.generators > 0
    assert training.learner > 16 * 10**9


def test_a_suite_is_played_in_its_environment_and_the_command_line_comes_last() -> None:
    suite = load_suite("calculator")
    options = replace(OPTIONS, overrides=["environment.max_turns=5", "environment.workers=3"])
    config = for_suite(evaluation_config(options, suite), suite, SAMPLING)
    assert config.environment == replace(suite.environment, max_turns=5, workers=3)
    assert [rule.name for rule in config.verifier.rules] == ["environment"]
    answered = load_suite("algebra")
    assert evaluation_config(OPTIONS, answered).environment.name is None
    with_tool = replace(OPTIONS, overrides=["environment.name=python"])
    assert evaluation_config(with_tool, answered).environment.name == "python"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("environment.name=calculater", "did you mean calculator"),
        ("environment.step_timeout_s=500", "longer than all turns together"),
        ("environment.name=null", "graded by the environment|are those of environment.name"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(override: str, message: str) -> None:
    suite = load_suite("calculator")
    with pytest.raises(UserError, match=message):
        options = replace(OPTIONS, overrides=[override])
        for_suite(evaluation_config(options, suite), suite, SAMPLING)


def test_what_changes_no_episode_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    suite = load_suite("calculator")

    def settings(*overrides: str) -> dict[str, Any]:
        options = Options(model=str(tmp_path), suites=[], overrides=overrides)
        config = evaluation_config(options, suite)
        return settings_of(options, suite, SAMPLING, [], config)

    plain = settings()
    assert differences(plain, settings("environment.workers=4")) == []
    (line,) = differences(plain, settings("environment.max_turns=2"))
    assert line == "environment.max_turns: 3 there, 2 now"
    moved = replace(suite, path="/elsewhere/calculator.jsonl")
    config = evaluation_config(Options(model=str(tmp_path), suites=[]), moved)
    again = settings_of(Options(model=str(tmp_path), suites=[]), moved, SAMPLING, [], config)
    assert differences(plain, again) == []
    config = evaluation_config(Options(model=str(tmp_path), suites=[]))
    answered = settings_of(OPTIONS, load_suite("math500"), SAMPLING, [], config)
    assert "environment" not in answered | answered["suite"]  # a folder of before goes on


def test_without_a_learner_a_split_gives_every_core_to_a_generator() -> None:
    overrides = ["generator.count=2", "placement.cores=split"]
    config = evaluation_config(replace(OPTIONS, overrides=overrides))
    plan = plan_cores(config, [0, 1, 2, 3, 4], [])
    assert (plan.generator_cores, plan.learner_cores) == ([[0, 2, 4], [1, 3]], [])


def test_the_configuration_is_written_down(tmp_path: Path) -> None:
    config = evaluation_config(replace(OPTIONS, overrides=["generator.threads=3"]))
    launch.open_folder(tmp_path / "out", config, {}).release()
    written = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert (written.generator.threads, written.model.path) == (3, "m")
    assert "learner" not in written


def test_a_context_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    assert context_length(tmp_path, 100) == 100
    with pytest.raises(UserError, match="lower --max-tokens"):
        context_length(tmp_path, 101)


def test_a_chat_template_of_ones_own_counts_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "mine.jinja"
    keys = [f"data.chat_template={file}", "data.chat_template_kwargs.enable_thinking=false"]

    def settings(overrides: list[str], text: str = "a") -> dict[str, Any]:
        file.write_text(text)
        options = Options(model=str(tmp_path), suites=[], overrides=overrides)
        config = evaluation_config(options)
        return settings_of(options, load_suite("math500"), SAMPLING, [], config)

    plain = settings([])
    assert "chat_template" not in plain  # a folder of before goes on
    assert settings(keys)["chat_template_kwargs"] == {"enable_thinking": False}
    assert len({settings(keys, text)["chat_template"] for text in ("a", "b", "a")}) == 2
    assert [line.split(":")[0] for line in differences(plain, settings(keys))] == [
        "chat_template",
        "chat_template_kwargs",
    ]


def test_differences_are_named_at_any_depth() -> None:
    stored = {"a": 1, "b": {"c": [1], "d": 2}, "e": 3}
    assert differences(stored, json.loads(json.dumps(stored))) == []
    found = differences(stored, {"a": 1, "b": {"c": [2], "d": 2}, "f": 3})
    assert [line.split(":")[0] for line in found] == ["b.c", "e", "f"]


def test_a_fingerprint_sees_other_weights_and_not_other_folders(tmp_path: Path) -> None:
    def folder(name: str, weights: bytes, config: str = "{}") -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "model.safetensors").write_bytes(weights)
        (made / "config.json").write_text(config)
        return made

    one = fingerprint(folder("one", b"\1" * 3_000_000))
    assert one == fingerprint(folder("copy", b"\1" * 3_000_000))
    others = [
        folder("first", b"\2" + b"\1" * 2_999_999),
        folder("last", b"\1" * 2_999_999 + b"\2"),
        folder("longer", b"\1" * 3_000_001),
        folder("config", b"\1" * 3_000_000, "{ }"),
    ]
    assert len({one, *map(fingerprint, others)}) == 5


def test_seeds_are_those_of_synchronous_training() -> None:
    for problem in range(20):
        of_ticket = ticket_seed(5, problem)
        assert [sample_seed(5, problem, s) for s in range(3)] == [of_ticket + s for s in range(3)]
    seeds = {sample_seed(seed, p, s) for seed in range(3) for p in range(50) for s in range(8)}
    assert len(seeds) == 3 * 50 * 8


# The folder


def test_a_folder_goes_on_with_its_settings_and_refuses_others(tmp_path: Path) -> None:
    config = evaluation_config(OPTIONS)
    path, settings = tmp_path / "out", {"a": 1, "limits": (1, 2)}
    run = launch.open_folder(path, config, settings)
    with pytest.raises(UserError, match="another process"):
        launch.open_folder(path, config, settings)
    run.release()
    assert path.is_dir()  # settings.json is there: the folder is an evaluation
    launch.open_folder(path, config, settings).release()
    with pytest.raises(UserError, match=r"a: 1 there, 2 now[^$]*choose another --out"):
        launch.open_folder(path, config, {**settings, "a": 2})
    launch.open_folder(path, config, settings).release()  # the refusal left no lock
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text("a training run")
    with pytest.raises(UserError, match="is no evaluation"):
        launch.open_folder(other, config, settings)


def test_folders_are_named_by_model_and_suite(tmp_path: Path) -> None:
    of = launch.folder_of
    assert of(replace(OPTIONS, model="builtin:tiny"), "s") == Path("runs/eval-builtin-tiny-s")
    assert of(replace(OPTIONS, model="runs/a/step-3/"), "s") == Path("runs/eval-runs-a-step-3-s")
    assert of(replace(OPTIONS, model="../x"), "s") == Path("runs/eval-x-s")
    assert of(replace(OPTIONS, out=tmp_path), "s") == tmp_path
    assert of(replace(OPTIONS, out=tmp_path, suites=["s", "t"]), "s") == tmp_path / "s"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--suite", "math50"], "did you mean math500"),
        (["/nowhere", "--suite", "arithmetic-small"], "no such folder"),
        (["m", "--suite", "algebra", "--suite", "algebra"], "no --suite twice"),
        (["m", "--suite", "algebra", "--suite", "logic", "--data", "x.jsonl"], "one --suite"),
        (["m", "--suite", "aime24", "--data", "no.jsonl"], "no.jsonl does not exist"),
        (["m", "--suite", "algebra", "learner.ranks=1"], "no meaning for eval"),
        (["m", "--suite", "algebra", "--limit", "0"], "--limit 0"),
    ],
)
def test_mistakes_end_before_anything_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["eval", "m"], ["eval", "m", "--suite", "a", "--bogus"]])
def test_unknown_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


# The loop, on fakes of the pools and a real log

STORED = ["7", "1/2", "3", "9"]
SAMPLES = {
    # problem: what its three samples say, with None for a grader that gave up
    0: ["The answer is 7", r"\boxed{7}", r"\boxed{8}"],
    1: [r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{2}"],
    2: [r"\boxed{4}", r"\boxed{4}", r"\boxed{3}"],
    3: ["no idea at all of it", None, r"\boxed{9}"],
}


def prompts() -> list[Prompt]:
    return [
        Prompt(
            ticket=-1,
            prompt_id=f"p{index}",
            index=index,
            epoch=-1,
            question=f"question {index}",
            text=f"question {index}",
            token_ids=[1, 2],
            reference=json.dumps({"prompt": f"question {index}", "answer": stored}),
            solution=None,
            difficulty=None,
        )
        for index, stored in enumerate(STORED)
    ]


class Generators:
    """Answers from `SAMPLES`; the first request of `dies` is lost with its generator."""

    version = 0

    def __init__(self, dies: int | None = None) -> None:
        self.asked: list[GroupRequest] = []
        self.under_way = self.most = 0
        self._dies = dies

    async def generate(self, request: GroupRequest, deadline_s: float) -> AsyncIterator[Any]:
        self.asked.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0.001 * (request.group_id % 3))
            if request.group_id == self._dies:
                self._dies = None
                raise GroupLostError("it died")
            text = SAMPLES[request.group_id // 3][request.group_id % 3]
            length = 8 if text is None else len(text.split())
            reason = "length" if text is None else "stop"
            sampled = Completion([1] * length, [-0.5] * length, [0] * length, reason)
            yield rollout_batch(request, {0: sampled}, [text or ""], "generator-0")
        finally:
            self.under_way -= 1


class Verifiers:
    """Math-verify's verdicts in this process; nothing is an `error`."""

    async def score(self, group_id: int, batch: pa.RecordBatch, deadline_s: float) -> Any:
        (text,) = batch.column("text").to_pylist()
        reference = json.loads(batch.column("reference")[0].as_py())
        verdict = Verdict("error", None, "gave up")
        if text:
            verdict = math_answer.score(text, reference)
        return with_verdicts(batch, ["math_answer"], [judgement([verdict], [1.0])])


class Log:
    def __init__(self, folder: Path, fails_at: int | None = None) -> None:
        self.log = TrajectoryLog(folder, trajectory_schema(["math_answer"]))
        self._fails_at = fails_at
        self.count = 0

    async def append(self, group_id: int, refs: list[Any]) -> None:
        if self.count == self._fails_at:
            raise StallError("the log waited")
        self.count += 1
        for batch in refs:
            self.log.append(batch)


def sample(
    folder: Path,
    numbers: list[int],
    *,
    dies: int | None = None,
    fails_at: int | None = None,
    **more: Any,
) -> Generators:
    generators, log = Generators(dies), Log(folder, fails_at)
    runner = SuiteRunner(
        prompts(),
        SAMPLING,
        episodes=Episodes(
            generators,  # type: ignore[arg-type]
            Verifiers(),  # type: ignore[arg-type]
            sample_timeout_s=9.0,
            judge_timeout_s=9.0,
        ),
        log=log,  # type: ignore[arg-type]
        in_flight=2,
        progress=lambda done: None,
        **more,
    )
    try:
        asyncio.run(runner.run(numbers))
    finally:
        log.log.close()
    return generators


ALL = list(range(PROBLEMS * 3))


def test_every_sample_is_asked_once_under_its_own_seed_and_few_at_a_time(tmp_path: Path) -> None:
    generators = sample(tmp_path, ALL)
    assert sorted(request.group_id for request in generators.asked) == ALL
    assert generators.most == 2
    for request in generators.asked:
        problem, number = divmod(request.group_id, 3)
        assert request.seed == sample_seed(5, problem, number)
        assert request.prompt_text == f"question {problem}"
        assert (request.num_completions, request.temperature, request.max_tokens) == (1, 1.0, 8)
    assert logged(tmp_path) == set(ALL)


def test_what_dies_with_its_generator_is_sampled_again_alike(tmp_path: Path) -> None:
    generators = sample(tmp_path, ALL, dies=4)
    again = [request for request in generators.asked if request.group_id == 4]
    assert len(again) == 2
    assert again[0].seed == again[1].seed
    assert sum(1 for _ in read_log(tmp_path)) == len(ALL)


def test_samples_go_on_from_their_start_and_none_begins_when_the_time_is_over(
    tmp_path: Path,
) -> None:
    starts = [GuidedStart(tuple(range(n)), int(n > 0)) for n in range(PROBLEMS)]
    for request in sample(tmp_path / "starts", ALL, starts=starts).asked:
        assert request.guidance_ids == tuple(range(request.group_id // 3))
        assert request.num_guided == int(request.group_id >= 3) and request.mask_guidance
    asked = sample(tmp_path / "cut", ALL, seconds=0.0).asked
    assert asked == [] and not logged(tmp_path / "cut")


def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        sample(tmp_path / "cut", ALL, fails_at=5)
    assert caught.group_contains(StallError)
    there = logged(tmp_path / "cut")
    assert len(there) == 5
    with pytest.raises(RunError, match="7 samples are not in"):
        report.collect(tmp_path / "cut", PROBLEMS, 3, GRADER)
    # A crash in the midst of a record leaves a torn tail.
    with (tmp_path / "cut" / "segment-000001.arrow").open("wb") as file:
        file.write(b"\xff\xff\xff\xff\x10\x00")
    missing = [number for number in ALL if number not in there]
    assert sorted(r.group_id for r in sample(tmp_path / "cut", missing).asked) == missing
    sample(tmp_path / "whole", ALL)
    found = [report.collect(tmp_path / name, PROBLEMS, 3, GRADER) for name in ("cut", "whole")]
    assert report.metrics_of(found[0], 1) == report.metrics_of(found[1], 1)
    assert found[0].completions.equals(found[1].completions)


# The numbers


def test_the_numbers_of_a_log_by_hand(tmp_path: Path) -> None:
    sample(tmp_path / "log", ALL)
    samples = report.collect(tmp_path / "log", PROBLEMS, 3, GRADER)
    right = [[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
    np.testing.assert_array_equal(samples.correct_PN, np.array(right, bool))
    metrics = report.metrics_of(samples, seed=1)
    assert list(metrics) == ["avg@3", "pass@2", "pass@3", "maj@3", "length", "truncated"]
    values = {name: estimate.value for name, estimate in metrics.items()}
    assert values["avg@3"] == pytest.approx(6 / 12)
    # Of three pairs none misses where two are right, one where one is.
    assert values["pass@2"] == pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4)
    assert values["pass@3"] == 1.0
    # 7 wins; 0.5 and \frac12 are one answer and win; 4 wins; of problem 3 one sample commits itself
    # to nothing and one has no text: 9 has the only vote.
    assert values["maj@3"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    lengths = [8 if text is None else len(text.split()) for p in range(4) for text in SAMPLES[p]]
    assert values["length"] == pytest.approx(sum(lengths) / 12)
    assert values["truncated"] == pytest.approx(1 / 12)
    assert all(each.low <= each.value <= each.high for each in metrics.values())


def test_verdicts_that_are_none_count_as_wrong_and_are_named(tmp_path: Path) -> None:
    sample(tmp_path / "log", ALL)
    samples = report.collect(tmp_path / "log", PROBLEMS, 3, GRADER)
    settings = {
        "suite": {"name": "mine"},
        "model": "m",
        "problems": PROBLEMS,
        "sampling": {"samples": 3, "seed": 5},
    }
    results = report.results_of(samples, settings, {"gave up": 1})
    report.write(tmp_path, samples, results)
    stored = json.loads((tmp_path / report.RESULTS).read_text())
    assert stored == json.loads(json.dumps(results))
    assert stored["verdicts"] == {"pass": 6, "fail": 5, "error": 1}
    assert stored["unscored"]["count"] == 1
    assert stored["unscored"]["completions"] == [{"problem": 3, "sample": 1, "verdict": "error"}]
    rows = pq.read_table(tmp_path / report.COMPLETIONS).to_pylist()
    assert [(row["problem"], row["sample"]) for row in rows] == [divmod(n, 3) for n in ALL]
    assert [row["reward"] for row in rows if row["verdict"] == "error"] == [None]
    by_hand = sum(row["verdict"] == "pass" for row in rows) / len(rows)
    assert stored["metrics"]["avg@3"]["value"] == pytest.approx(by_hand)
    shown = report.table(stored)
    assert "avg@3" in shown
    assert "50.0 %" in shown
    assert "1 of 12 (1 error, 0 timeout), counted as wrong" in shown
    assert "1 times: gave up" in shown
    assert list(tmp_path.glob("*.partial")) == []


def test_one_greedy_sample_has_no_vote_and_no_pass_at_two(tmp_path: Path) -> None:
    sample(tmp_path / "log", [n for n in ALL if n % 3 == 0])
    # Numbers 0, 3, 6, 9 of k = 3; of k = 1 they are problems of their own.
    samples = report.collect(tmp_path / "log", 4, 1, GRADER)
    metrics = report.metrics_of(samples, seed=0)
    assert list(metrics) == ["avg@1", "length", "truncated"]
    assert not math.isnan(metrics["avg@1"].value)


def test_a_done_folder_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(tmp_path / "out" / "trajectories", ALL)
    config, settings = evaluation_config(OPTIONS), {"suite": {"name": "mine"}, "model": "m"}
    settings |= {"problems": PROBLEMS, "sampling": {"samples": 3, "seed": 5}}
    (tmp_path / "out" / "config.yaml").write_text("")
    (tmp_path / "out" / launch.SETTINGS).write_text(json.dumps(settings))
    config = replace(config, verifier=replace(config.verifier, rules=[GRADER]))
    run = launch.open_folder(tmp_path / "out", config, settings)
    job = launch.Job("mine", SAMPLING, prompts(), config, settings, run, [])
    monkeypatch.setattr(launch, "_prepare", lambda options, say: [job])
    monkeypatch.setattr(launch, "sample_all", lambda jobs, say: pytest.fail("it sampled"))
    (first,) = launch.evaluate(OPTIONS)
    assert first["metrics"]["avg@3"]["value"] == pytest.approx(0.5)
    made = (tmp_path / "out" / report.RESULTS).stat().st_mtime_ns
    (second,) = launch.evaluate(OPTIONS)
    assert second == first
    assert (tmp_path / "out" / report.RESULTS).stat().st_mtime_ns == made
    assert capsys.readouterr().out.count("avg@3") == 2
