"""The sinks of other packages against small doubles of these: faults, ids, steps sent once."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from metric_doubles import Memory, fail

from common.config.load import load_config
from common.config.sections import Config
from common.errors import UserError
from common.record.metrics import read_metrics
from deploy.run.metric_sinks import AtMostOnceSink, check_sinks, open_metrics

REMOTE = ["wandb", "mlflow", "trackio"]


class Service:
    """What the three services have stored, and at what call they fail."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, Callable[[], object]] = {}

    def reached(self, call: str) -> None:
        if call in self.faults:
            self.faults[call]()

    def open(self, run: str, config: Mapping[str, Any]) -> None:
        self.reached("open")
        stored = self.runs.setdefault(run, {"steps": [], "summary": {}, "end": None})
        stored["config"] = dict(config)

    def take(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        self.reached("write")
        values = {key: value for key, value in metrics.items() if not key.startswith("summary/")}
        if values:
            self.runs[run]["steps"].append((step, values))
        self.runs[run]["summary"] |= {k: v for k, v in metrics.items() if k not in values}

    def end(self, run: str, status: Any) -> None:
        self.reached("close")
        self.runs[run]["end"] = status

    @property
    def only(self) -> dict[str, Any]:
        (run,) = self.runs.values()
        return run


def wandb_double(service: Service) -> ModuleType:
    def init(*, id: str, config: Mapping[str, Any], resume: str, **_: Any) -> SimpleNamespace:
        assert resume == "allow"
        service.open(id, config)
        return SimpleNamespace(
            log=lambda metrics, step: service.take(id, step, metrics),
            summary=SimpleNamespace(update=lambda values: service.take(id, -1, values)),
            finish=lambda exit_code: service.end(id, exit_code),
        )

    module = ModuleType("wandb")
    settings = SimpleNamespace(mode="online")
    module.__dict__.update(
        init=init,
        Settings=SimpleNamespace,
        setup=lambda: SimpleNamespace(settings=settings),
        login=lambda prompt, verify: True,
        Error=ConnectionError,
        settings=settings,
    )
    return module


def mlflow_double(service: Service) -> list[ModuleType]:
    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def create_run(self, experiment: str, run_name: str) -> Any:
            run = f"{experiment}.{len(service.runs)}"
            service.open(run, {})
            return SimpleNamespace(info=SimpleNamespace(run_id=run))

        def update_run(self, run: str, status: str) -> None:
            service.open(run, service.runs[run]["config"])

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            service.runs[run]["config"] |= {p.key: p.value for p in params}
            assert len(params) <= 100
            if metrics:
                (step,) = {metric.step for metric in metrics}
                service.take(run, step, {metric.key: metric.value for metric in metrics})

        def set_terminated(self, run: str, status: str) -> None:
            service.end(run, {"FINISHED": 0, "FAILED": 1}[status])

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.__dict__.update(MlflowClient=MlflowClient)
    entities.__dict__.update(
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
        Metric=lambda key, value, ms, step: SimpleNamespace(key=key, value=value, step=step),
    )
    return [module, entities]


def trackio_double(service: Service) -> ModuleType:
    def init(*, name: str, config: Mapping[str, Any], resume: str, **_: Any) -> SimpleNamespace:
        assert resume == "allow"
        service.open(name, config)
        return SimpleNamespace(
            log=lambda metrics, step: service.take(name, step, metrics),
            finish=lambda: service.end(name, 0),
        )

    module = ModuleType("trackio")
    module.__dict__.update(init=init)
    return module


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """One store behind doubles of all three packages."""
    found = Service()
    for module in (wandb_double(found), *mlflow_double(found), trackio_double(found)):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def config(sinks: str, *overrides: str) -> Config:
    return load_config([], ["model.path=none", f"metrics.sinks=[{sinks}]", *overrides])


def record(steps: range, asked: Config, folder: Path, last_step: int | None = None) -> list[str]:
    """A run's records; the warnings."""
    said: list[str] = []
    with open_metrics(asked, folder, last_step, said.append) as metrics:
        for step in steps:
            metrics.write(step, {"reward/mean": step / 10, "grad_norm": float("nan")})
    return said


@pytest.mark.parametrize("name", REMOTE)
def test_a_sink_has_the_configuration_the_steps_and_the_summary(
    name: str, service: Service, tmp_path: Path
) -> None:
    assert record(range(5), config(name, "batch.group_size=6"), tmp_path) == []
    run = service.only
    assert str(run["config"]["batch.group_size"]) == "6"
    assert [step for step, _ in run["steps"]] == [0, 1, 2, 3, 4]
    assert run["steps"][3][1] == {"reward/mean": 0.3, "sinks/dropped": 0.0}
    assert run["summary"]["summary/reward"] == 0.4
    assert run["end"] == 0


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("call", ["open", "write", "close"])
@pytest.mark.parametrize("hangs", [False, True])
def test_no_run_fails_because_a_sink_does(
    name: str, call: str, hangs: bool, service: Service, tmp_path: Path
) -> None:
    never = threading.Event()
    service.faults[call] = never.wait if hangs else fail(ConnectionError("the server is gone"))
    said = record(range(30), config(name, "metrics.timeout_s=0.3"), tmp_path)
    never.set()
    (line,) = said
    assert f"metrics sink {name} is switched off" in line
    assert ("did not close" if hangs else "ConnectionError: the server is gone") in line
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(30))
    assert [r["reward/mean"] for r in records] == [step / 10 for step in range(30)]


@pytest.mark.parametrize("name", REMOTE)
def test_a_resumed_run_goes_on_in_the_same_place_and_sends_no_step_twice(
    name: str, service: Service, tmp_path: Path
) -> None:
    """Killed after step 7, the checkpoint of step 5: metrics.jsonl takes 6 and 7 back."""
    record(range(8), config(name), tmp_path)
    record(range(6, 12), config(name, "steps=50"), tmp_path, last_step=5)
    assert [step for step, _ in service.only["steps"]] == list(range(12))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(12))


@pytest.mark.parametrize("name", REMOTE)
def test_two_runs_are_two(name: str, service: Service, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        record(range(3), config(name), tmp_path / folder)
    assert [len(run["steps"]) for run in service.runs.values()] == [3, 3]


def test_all_of_them_at_once_and_one_broken(service: Service, tmp_path: Path) -> None:
    sys.modules["trackio"].__dict__["init"] = fail(OSError("read-only"))
    said = record(range(4), config("wandb,mlflow,trackio"), tmp_path)
    assert len(said) == 1
    assert [len(run["steps"]) for run in service.runs.values()] == [4, 4]


class Remembering(Memory):
    def __init__(self, known: str | None, at: Mapping[int, Callable[[], object]] | None) -> None:
        super().__init__(at)
        self.id = known or "first"


def test_a_step_is_noted_before_it_is_sent(tmp_path: Path) -> None:
    """Killed between the two, it is missing there; the other way round it would be there twice."""
    path, made = tmp_path / "sinks" / "x.json", list[Remembering]()

    def make(known: str | None) -> Remembering:
        made.append(Remembering(known, None if made else {2: fail(OSError("killed here"))}))
        return made[-1]

    first = AtMostOnceSink(path, make)
    assert json.loads(path.read_text()) == {"id": "first", "step": -1}
    first.write(0, {})
    first.write(1, {})
    with pytest.raises(OSError, match="killed here"):
        first.write(2, {})
    again = AtMostOnceSink(path, make)
    for step in (1, 2, 3):
        again.write(step, {})
    assert made[1].id == "first"
    assert [sink.steps for sink in made] == [[0, 1], [3]]


@pytest.mark.parametrize("name", REMOTE)
def test_a_package_that_is_missing_is_an_error_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{name}.*pip install 'grpo-lambda\[{name}\]'"):
        check_sinks(config(f"tensorboard,{name}").metrics)
    check_sinks(config("tensorboard").metrics)


def test_a_login_that_is_missing_is_one_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_sinks(config("wandb").metrics)
    for answer in (lambda **_: False, lambda **_: fail(ConnectionError("bad key"))()):
        monkeypatch.setattr(sys.modules["wandb"], "login", answer)
        with pytest.raises(UserError, match="wandb login.*WANDB_MODE=offline"):
            check_sinks(config("wandb").metrics)
    sys.modules["wandb"].settings.mode = "offline"  # type: ignore[attr-defined]
    check_sinks(config("wandb").metrics)


def test_a_sink_that_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match=r"metrics\.sinks.*weights_and_biases.*tensorboard"):
        config("weights_and_biases")


def test_tensorboard_has_scalars_once_hyperparameters_and_the_summary(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(range(8), config("tensorboard"), tmp_path)
    record(range(6, 12), config("tensorboard", "steps=50"), tmp_path, last_step=5)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("reward/mean")] == list(range(12))
    assert "grad_norm" not in found.Tags()["scalars"]
    assert found.Scalars("summary/reward")[-1].value == pytest.approx(1.1)
    shown = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"batch.group_size" in shown


def test_only_a_rule_of_the_users_own_may_record_a_metric_of_its_own(tmp_path: Path) -> None:
    own = {"advantage/tied": 0.2}
    asked = config("", "algorithm.baseline.kind=deploy.examples.advantage:by_rank")
    with open_metrics(asked, tmp_path, None, print) as metrics:
        metrics.write(1, own)
    with (
        pytest.raises(ValueError, match="advantage/tied"),
        open_metrics(config(""), tmp_path, None, print) as metrics,
    ):
        metrics.write(2, own)
