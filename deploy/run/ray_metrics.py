"""A run's numbers as Prometheus gauges, exported by Ray beside its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RaySink:
    """One gauge a key, `grpo_lambda_reward_mean` for `reward/mean`, labelled with the run."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in {"step": float(step), **metrics}.items():
            if math.isfinite(value):
                self._gauge(key).set(value, tags={"run": self._run})

    def close(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Ray drops the gauges with the process."""

    def _gauge(self, key: str) -> Gauge:
        name = gauge_name(key)
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=key, tag_keys=("run",))
        return self._gauges[name]


def gauge_name(key: str) -> str:
    """A metric's name in Prometheus."""
    return "grpo_lambda_" + re.sub(r"\W", "_", key, flags=re.ASCII)
