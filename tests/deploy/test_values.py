"""`grpo-lambda values` without Ray: the formula, the file it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.data.quarantine import Quarantine
from actors.data.sources import Rows, load_rows
from actors.generation.engine import Completion
from actors.generation.generator import rollout_batch
from actors.verifiers.base import Verdict
from actors.verifiers.judge import judgement
from actors.verifiers.worker import with_verdicts
from common.config.data import DataConfig
from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from common.record.schema import trajectory_schema
from common.record.trajectory_log import TrajectoryLog
from common.trajectory import GroupRequest
from deploy.eval import values
from deploy.eval.launch import Job
from deploy.eval.values import ValueOptions, make_values, soft_value
from deploy.models.tiny_model import build_tokenizer

HELD_OUT = 3


# The formula


@pytest.mark.parametrize("seed", range(5))
def test_the_value_is_where_the_exponential_rewards_less_it_are_one_on_average(seed: int) -> None:
    draw = random.Random(seed)
    rewards = [draw.uniform(-2, 3) for _ in range(8)]
    beta, shift = draw.uniform(0.05, 4), draw.uniform(-9, 9)
    value = soft_value(rewards, beta)
    assert sum(math.exp((r - value) / beta) for r in rewards) / 8 == pytest.approx(1)
    assert soft_value([r + shift for r in rewards], beta) == pytest.approx(value + shift)
    assert soft_value(rewards, 1e6) == pytest.approx(sum(rewards) / 8, abs=1e-5)  # the mean
    assert soft_value(rewards, 1e-3) == pytest.approx(max(rewards), abs=1e-2)  # the best
    assert max(rewards) >= value >= sum(rewards) / 8


@pytest.mark.parametrize("right", range(9))
def test_rewards_of_zero_and_one_have_the_closed_form_of_the_recipes_page(right: int) -> None:
    found = soft_value([1.0] * right + [0.0] * (8 - right), 0.5)
    assert found == pytest.approx(0.5 * math.log((8 - right + right * math.exp(2)) / 8))


def test_rewards_far_beyond_beta_overflow_nothing() -> None:
    assert soft_value([1e6, -1e6], 0.01) == pytest.approx(1e6, abs=0.01)


# The file


ROWS: dict[str, list[dict[str, Any]]] = {
    "columns": [{"question": f"{n} + 1 =", "answer": n + 1, "level": n % 3} for n in range(9)],
    "trl": [{"prompt": f"{n} + 1 =", "solution": f"{n + 1}"} for n in range(9)],
    "verl": [
        {
            "prompt": [
                {"role": "user", "content": "Sums, please."},
                {"role": "assistant", "content": "Go on."},
                {"role": "user", "content": f"{n} + 1 ="},
            ],
            "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
            "data_source": "sums",
        }
        for n in range(9)
    ],
}
KEYS = {"columns": ["data.prompt_column=question", "data.difficulty_column=level"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    return tmp_path / "model"


def configuration(model: Path, rows: list[dict[str, Any]], *keys: str) -> Config:
    data = model.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(
        [],
        [
            f"model.path={model}",
            f"data.path={data}",
            "data.template=plain",
            f"eval.prompts={HELD_OUT}",
            "verifier.rules=[{name: math_answer}]",
            *keys,
        ],
    )


def sampler(reward: Callable[[int, int], float | None]) -> Callable[..., None]:
    """In the place of Ray: logs what `reward` says of a prompt and a sample of it."""

    def sample_all(jobs: list[Job], notify: object) -> None:
        (job,) = jobs
        log = TrajectoryLog(job.run.path / "trajectories", trajectory_schema(["math_answer"]))
        for number in job.missing:
            index, sample = divmod(number, job.sampling.samples)
            prompt, value = job.prompts[index], reward(index, sample)
            request = GroupRequest(
                group_id=number,
                ticket=-1,
                prompt_id=prompt.prompt_id,
                epoch=-1,
                question=prompt.question,
                prompt_text=prompt.text,
                prompt_ids=prompt.token_ids,
                reference=prompt.reference,
                num_completions=1,
                max_tokens=4,
                temperature=1.0,
                dispatch_version=0,
                dispatched_s=0.0,
            )
            batch = rollout_batch(request, {0: Completion([1], [-0.5], [0], "stop")}, ["x"], "g")
            verdict = Verdict("error", None, "gave up") if value is None else Verdict("pass", value)
            log.append(with_verdicts(batch, ["math_answer"], [judgement([verdict], [1.0])]))
        log.close()

    return sample_all


def read(data: DataConfig) -> Rows:
    return load_rows(data, HELD_OUT, 0, Quarantine(0.0))


@pytest.mark.parametrize("schema", ROWS)
def test_a_run_on_the_file_has_the_rows_as_they_were_and_holds_out_the_same(
    schema: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "sample_all", sampler(lambda index, sample: float(sample % 2)))
    config = configuration(model, ROWS[schema], *KEYS.get(schema, []))
    path = make_values(ValueOptions(config, tmp_path / "out", samples=4))
    before = read(config.data)
    config.data.path = str(path)
    after = read(config.data)
    for old, new in ((before.train, after.train), (before.held_out, after.held_out)):
        assert [row.key for row in new] == [row.key for row in old]
        assert [row.difficulty for row in new] == [row.difficulty for row in old]
        for was, row in zip(old, new, strict=True):
            reference = json.loads(row.reference)
            assert reference.pop("v") == pytest.approx(soft_value([0, 1, 0, 1], 0.5))
            assert reference == json.loads(was.reference)


def test_each_row_has_the_value_of_its_own_answers_and_the_unjudged_are_in_no_mean(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reward(index: int, sample: int) -> float | None:
        if index == 4 or sample == 2:
            return None
        return index + sample / 4

    monkeypatch.setattr(values, "sample_all", sampler(reward))
    config = configuration(model, ROWS["trl"])
    options = ValueOptions(config, tmp_path / "out", samples=3, beta=2.0, column="worth")
    path = make_values(options)
    assert path is not None
    written = [json.loads(line) for line in path.read_text().splitlines()]
    # Prompt 4 is the second row of training: those held out, the last three rows, come first.
    expected = {row["prompt"]: i for i, row in enumerate([*ROWS["trl"][6:], *ROWS["trl"][:6]])}
    assert [row["prompt"] for row in written] == [
        row["prompt"] for row in ROWS["trl"] if expected[row["prompt"]] != 4
    ]
    for row in written:
        index = expected[row["prompt"]]
        assert row["worth"] == pytest.approx(soft_value([index, index + 0.25], 2.0))
    said = capsys.readouterr().out
    assert "9 prompts x 3 answers = 27 answers: at most 1,296 sampled tokens" in said
    assert "1 rows have no answer that could be judged" in said


def test_what_is_sampled_is_not_sampled_again_whatever_is_made_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "sample_all", sampler(lambda index, sample: float(sample)))
    config = configuration(model, ROWS["trl"])
    make_values(ValueOptions(config, tmp_path / "out", samples=2))
    monkeypatch.setattr(values, "sample_all", lambda *_: pytest.fail("it sampled"))
    path = make_values(ValueOptions(config, tmp_path / "out", samples=2, beta=0.1, column="w"))
    assert path is not None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["w"] == pytest.approx(soft_value([0, 1], 0.1)) for row in rows)
    with pytest.raises(UserError, match=r"other settings:\n  sampling.samples"):
        make_values(ValueOptions(config, tmp_path / "out", samples=3))
    hotter = configuration(model, ROWS["trl"], "generator.temperature=0.7")
    with pytest.raises(UserError, match="sampling.temperature"):
        make_values(ValueOptions(hotter, tmp_path / "out", samples=2))


def test_a_dry_run_prints_the_cost_and_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(model, ROWS["trl"], "generator.max_completion_tokens=10")
    assert make_values(ValueOptions(config, tmp_path / "out", dry_run=True)) is None
    assert "72 answers: at most 720 sampled tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# What is refused


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        ({"samples": 0}, [], "--samples 0 must be at least 1"),
        ({"beta": 0.0}, [], "--beta 0.0 must be"),
        ({"beta": math.nan}, [], "--beta nan must be"),
        ({"column": "solution"}, [], "has a column 'solution': choose another --column"),
        (
            {},
            ["verifier.rules=[{name: math_answer}, {name: column, weight: -1, args: {name: v}}]"],
            "leave the rule out",
        ),
        (
            {},
            [
                "data.path=null",
                "data.sources=[{name: a, path: rows.jsonl}, {name: b, path: rows.jsonl}]",
            ],
            "one data set at a time",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], keys: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    config = configuration(model, ROWS["trl"], *keys)
    with pytest.raises(UserError, match=message):
        make_values(ValueOptions(config, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
