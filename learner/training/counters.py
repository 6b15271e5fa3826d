"""What a step asked of a CUDA device: its share of the peak, memory, and waits for weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from common.devices import find_device
from learner.training.fsdp import sharded_modules

Event = Callable[[], Any]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


class Counters:
    """The counters of a rank. On a CPU there are none.

    Args:
        parameters: how many the model has.
        trained: how many of them are trained.
        ranks: how many ranks share the work of a step.
    """

    def __init__(
        self, device: torch.device, model: nn.Module, parameters: int, trained: int, ranks: int
    ) -> None:
        self._device = device
        # A frozen weight is multiplied forward and backward, and has no gradient of its own.
        self._operations = 4.0 * parameters + 2.0 * trained
        self._ranks = ranks
        self._waits = Waits(model) if device.type == "cuda" and ranks > 1 else None

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def metrics(self, tokens: float, seconds: float) -> dict[str, float]:
        """Metrics of the step that began last.

        Args:
            tokens: trained ones and those of prompts. Work that is done twice, as what is
                recomputed, does not count, and neither does attention.
            seconds: that the step took.
        """
        if self._device.type != "cuda":
            return {}
        rate = self._operations * tokens / (self._ranks * seconds)
        found = {
            "learner/tflops": rate / 1e12,
            "memory/peak": float(torch.cuda.max_memory_allocated(self._device)),
        }
        known = find_device(torch.cuda.get_device_name(self._device))
        if known is not None:
            found["learner/mfu"] = rate / known.flops
        if self._waits is not None:
            found["time/exposed_communication"] = self._waits.seconds()
        return found


class Waits:
    """Time for which the device's own stream waits for gathered weights.

    Each wait of FSDP gets an event before and after it. Where the weights were there already, it is
    the time to put them in their place.
    """

    def __init__(self, model: nn.Module, event: Event = _event) -> None:
        self._event = event
        self._pairs: list[tuple[Any, Any]] = []
        for module in sharded_modules(model):
            group: Any = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group.wait_for_unshard = self._timed(group.wait_for_unshard)

    def _timed(self, wait: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            before, after = self._event(), self._event()
            before.record()
            wait()
            after.record()
            self._pairs.append((before, after))

        return timed

    def seconds(self) -> float:
        """Seconds of all waits since the last call; waits for the device."""
        pairs, self._pairs = self._pairs, []
        if pairs:
            pairs[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in pairs) / 1e3
