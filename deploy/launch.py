"""From configuration to result: the calls behind `grpo-lambda train`, comparisons and notebooks.

from deploy.launch import train
result = train("deploy/configs/tiny.yaml", steps=20, **{"batch.group_size": 4})
result.final["reward/mean"], result.metrics().to_pandas()
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common.config.sections import Config
from common.errors import UserError
from common.record.metrics import read_metrics
from deploy.command.presets import load
from deploy.run.lifetime import train_to_end
from deploy.run.metric_sinks import check_sinks
from deploy.run.own_loop import run_to_end
from deploy.run.preemption import Preemption
from deploy.run.service import Service


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    path: Path
    """The run directory."""
    final: dict[str, float]
    """The last step's metrics."""

    def metrics(self) -> pa.Table:
        """The records of metrics.jsonl: a row a step, a column a metric, null where none is."""
        records = read_metrics(self.path / "metrics.jsonl")
        columns = dict.fromkeys(key for record in records for key in record)
        return pa.table({key: [record.get(key) for record in records] for key in columns})


def train(config: Config | str | Path, **overrides: object) -> Result:
    """Run to the end. From a notebook too: where an event loop runs, a thread has one of its own.

    Args:
        config: a checked configuration, or the YAML file of one.
        overrides: of a file: `steps=20, **{"batch.group_size": 4}`.

    Raises:
        UserError: wrong input. RunError: the run cannot go on; its cause is the message.
        KeyboardInterrupt: after everything was ended and the run directory closed.
    """
    if not isinstance(config, Config):
        words = [f"{key}={_as_yaml(value)}" for key, value in overrides.items()]
        config = load(Path(config), words)
    elif overrides:
        raise UserError(
            f"train() got a Config and the overrides {', '.join(overrides)}: give the path of a "
            "YAML file with overrides, or a Config that has them"
        )
    return train_each([config])[0]


def _as_yaml(value: object) -> str:
    """JSON is YAML; a text that is none stays as it is, as on a command line."""
    return os.fspath(value) if isinstance(value, str | Path) else json.dumps(value)


def train_each(configs: Sequence[Config]) -> list[Result]:
    """One run after the other in the same processes; the results in order.

    Raises as `train` does, at the first run that fails; `UserError` too when a run needs other
    actors than the first (see `Service.open`).
    """
    for config in configs:
        check_sinks(config.metrics)
    return run_to_end(_in_turn(configs))


async def _in_turn(configs: Sequence[Config]) -> list[Result]:
    """Every run, until one was told to stop."""
    task = asyncio.current_task()
    assert task is not None
    preemption = Preemption(task, configs[0].checkpoint.stop_grace_s)
    service, results = Service(), []
    for index, config in enumerate(configs):
        last = index == len(configs) - 1
        results.append(Result(*await train_to_end(config, service, preemption, last=last)))
        if preemption.requested.is_set():
            break
    return results
