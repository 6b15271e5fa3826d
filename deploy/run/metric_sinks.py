"""The sinks of `metrics.sinks`: TensorBoard, Weights & Biases, MLflow, Trackio; and Ray's gauges.

Where they write is theirs to know (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID and the like).
A run keeps its id with each of them, and the last step that it sent, in its directory:

    runs/NAME/sinks/wandb.json    {"id": "3f9c1a", "step": 40}

A resumed run goes on under the same id. A step is noted before it is sent, so that none is sent
twice; after a kill the steps up to there stay as they were first sent, while metrics.jsonl holds
what the resumed run made of them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from common.config.names import names_own_rule
from common.config.sections import Config, MetricsConfig
from common.errors import UserError
from common.record.metric_names import METRICS
from common.record.metrics import IsolatedSink, Metrics, MetricSink, Scalar, flatten

_PARAMS_A_CALL, _LONGEST_PARAM = 100, 6000
"""MLflow's limits."""


@dataclass(frozen=True)
class RunInfo:
    """What a sink is told about the run."""

    name: str
    project: str
    folder: Path
    config: Mapping[str, Scalar]
    """Every key of the configuration, flat: `batch.group_size`."""
    timeout_s: float
    last_step: int | None
    """Step of the checkpoint that a resumed run goes on from, or -1; None for a new run."""


class RemoteSink(MetricSink, Protocol):
    """A sink that knows runs by an id."""

    id: str


def check_sinks(config: MetricsConfig) -> None:
    """Raise `UserError`, with what to install or set, for a sink that cannot be used."""
    for name in config.sinks:
        if name == "tensorboard":  # a dependency of the project
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"metrics.sinks names {name}, which cannot be imported ({error}): "
                f"pip install 'grpo-lambda[{name}]', or take it out"
            ) from error
        if name == "wandb":
            _check_login(module)


def _check_login(wandb: Any) -> None:
    """W&B would ask for its key on the terminal, from within the run. Asks no server."""
    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    remedy = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(
            f"metrics.sinks names wandb, whose login is wrong ({error}): {remedy}"
        ) from error
    if not logged_in:
        raise UserError(f"metrics.sinks names wandb, and nobody is logged in: {remedy}")


def open_metrics(
    config: Config, folder: Path, last_step: int | None, warn: Callable[[str], None]
) -> Metrics:
    """The sinks of a run in `folder`; with Ray's gauges where somebody else's cluster has them."""
    keys = config.metrics
    flat = flatten(asdict(config))
    info = RunInfo(folder.name, keys.project, folder, flat, keys.timeout_s, last_step)
    makers: dict[str, Callable[[], MetricSink]] = {
        "tensorboard": lambda: TensorBoardSink(info),
        **{name: _once(name, make, info) for name, make in _REMOTE.items()},
    }
    wanted: dict[str, Callable[[], MetricSink]] = {name: makers[name] for name in keys.sinks}
    if config.ray.address != "local":  # nobody scrapes a cluster of our own
        wanted["prometheus"] = lambda: _ray_sink(folder.name)
    sinks = [IsolatedSink(name, make, keys.timeout_s, warn) for name, make in wanted.items()]
    # A rule of the user's own records metrics under names of its own.
    known = None if names_own_rule(config.algorithm) else METRICS
    return Metrics(folder / "metrics.jsonl", sinks, last_step, keys.timeout_s, known)


def _ray_sink(run: str) -> MetricSink:
    from deploy.run.ray_metrics import RaySink

    return RaySink(run)


def _once(
    name: str, make: Callable[[RunInfo, str | None], RemoteSink], info: RunInfo
) -> Callable[[], MetricSink]:
    return lambda: AtMostOnceSink(
        info.folder / "sinks" / f"{name}.json", lambda known: make(info, known)
    )


class AtMostOnceSink:
    """Hands each step to a remote sink at most once, through kills and resumes."""

    def __init__(self, path: Path, make: Callable[[str | None], RemoteSink]) -> None:
        known: dict[str, Any] = {"id": None, "step": -1}
        if path.is_file():
            known = json.loads(path.read_text())
        self._path = path
        self._last = int(known["step"])
        self._sink = make(known["id"])
        self._note(self._last)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._last:
            self._note(step)
            self._sink.write(step, metrics)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._sink.close(summary, failed=failed)

    def _note(self, step: int) -> None:
        self._path.parent.mkdir(exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"id": self._sink.id, "step": step}))
        os.replace(partial, self._path)
        self._last = step


class TensorBoardSink:
    """Scalars under `tensorboard/`; hyperparameters with the summary, for its HParams tab."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if info.last_step is None else info.last_step + 1
        folder = str(info.folder / "tensorboard")
        self._config = dict(info.config)
        self._writer = SummaryWriter(folder, purge_step=purge, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in _finite(metrics).items():
            self._writer.add_scalar(key, value, step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        shown = {key: "" if value is None else value for key, value in self._config.items()}
        self._writer.add_hparams(shown, dict(summary), run_name=".")
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; its files are in the run directory."""

    def __init__(self, info: RunInfo, known: str | None) -> None:
        import wandb

        self.id = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=info.project,
            id=self.id,
            name=info.name,
            dir=str(info.folder),
            config=dict(info.config),
            allow_val_change=True,  # a resumed run may have more steps=
            resume="allow",
            reinit="create_new",  # one process may train several runs
            # Its own deadline is 90 s, and the process would not end before that.
            settings=wandb.Settings(console="off", silent=True, init_timeout=info.timeout_s),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_finite(metrics), step=step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(failed))


class MlflowSink:
    """A run of MLflow, in the experiment of the project's name."""

    def __init__(self, info: RunInfo, known: str | None) -> None:
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        if known is not None:
            client.update_run(known, status="RUNNING")
            self.id = known
            return
        experiment = client.get_experiment_by_name(info.project)
        number = experiment.experiment_id if experiment else client.create_experiment(info.project)
        self.id = client.create_run(number, run_name=info.name).info.run_id
        self._log_params(info.config)

    def _log_params(self, config: Mapping[str, Scalar]) -> None:
        """Of the beginning: MLflow's parameters cannot be changed."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in config.items()]
        for start in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self.id, params=params[start : start + _PARAMS_A_CALL])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = [Metric(key, value, now_ms, step) for key, value in _finite(metrics).items()]
        self._client.log_batch(self.id, metrics=values)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self.write(int(summary.get("summary/steps", 0)), summary)
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


class TrackioSink:
    """A run of Trackio, which knows runs by their names: the name carries the id."""

    def __init__(self, info: RunInfo, known: str | None) -> None:
        import trackio

        self.id = known or f"{info.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=info.project,
            name=self.id,
            config=dict(info.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_finite(metrics), step=step)

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Trackio has no place for a summary: it stands with the last step, as in MLflow."""
        self._run.log(dict(summary), step=int(summary.get("summary/steps", 0)))
        self._run.finish()


_REMOTE: dict[str, Callable[[RunInfo, str | None], RemoteSink]] = {
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if math.isfinite(value)}
