"""What adds up over the micro-batches, ranks and updates of a learner step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from learner.algorithm.loss import Metrics
from learner.training import fsdp


@dataclass
class Totals:
    """Additive results of one rank; the sum over ranks is the step's."""

    metrics: Metrics = field(default_factory=dict)
    surrogate_sums_B: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add_metrics(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            old_value, old_weight = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (old_value + value, old_weight + weight)

    def over_ranks(self) -> Totals:
        """Totals of all ranks, summed in rank order: the same on every rank. Collective."""
        total = Totals({}, np.zeros_like(self.surrogate_sums_B))
        for part in fsdp.gather_objects(self):
            total.add_metrics(part.metrics)
            total.surrogate_sums_B += part.surrogate_sums_B
        return total

    def means(self, updates: int) -> dict[str, float]:
        return {name: value / (weight or updates) for name, (value, weight) in self.metrics.items()}
