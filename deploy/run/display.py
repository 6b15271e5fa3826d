"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from common.supervision.waits import Waits


class Display(Protocol):
    """Shows events as they happen, and a summary of every step."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None: ...

    def event(self, text: str) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def follow(self, status: Callable[[], str]) -> None:
        """Show from now on what `status` says, as often as the display is drawn."""
        ...


def make_display(total_steps: int, waits: Waits) -> Display:
    """Live on a terminal, plain otherwise."""
    console = Console()
    if console.is_terminal:
        return LiveDisplay(console, total_steps, waits)
    return PlainDisplay(total_steps)


class PlainDisplay:
    """Prints one line for each event or step."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Nothing to restore."""

    def event(self, text: str) -> None:
        """Print a line. Where nobody reads any more, the run goes on without."""
        if self._closed:
            return
        try:
            print(f"[{time.monotonic() - self._started:6.1f} s] {text}", flush=True)
        except OSError:
            self._closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered goes there at the end

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.event(f"step {step:>4}/{self._total_steps}  {summary(metrics)}")

    def follow(self, status: Callable[[], str]) -> None:
        """Show nothing: a line that is printed cannot change any more."""


def summary(metrics: Mapping[str, float]) -> str:
    """The few numbers of a step that say whether it goes well."""
    parts = []
    if "reward/mean" in metrics:
        seconds = metrics["time/step"]
        parts += [
            f"reward {metrics['reward/mean']:.3f}",
            f"staleness {metrics['staleness/max']:.0f}",
            f"{metrics['tokens/generated'] / seconds:.0f} tokens/s",
            f"step {seconds:.1f} s (waited for groups {metrics['time/wait_data']:.1f}, "
            f"trained {metrics['time/train']:.1f}, published {metrics['time/publish']:.1f})",
            f"grad {metrics['grad_norm']:.2f}",
        ]
    if "eval/accuracy" in metrics:
        parts.append(f"held-out accuracy {100 * metrics['eval/accuracy']:.1f} %")
    return "  ".join(parts)


class LiveDisplay:
    """Bar, last steps, and who waits for whom, redrawn four times a second."""

    def __init__(self, console: Console, total_steps: int, waits: Waits) -> None:
        self._console = console
        self._waits = waits
        self._status: Callable[[], str] = lambda: "starting"
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("steps", total=total_steps)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._live.stop()

    def event(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step)
        self._rows = [*self._rows[-7:], (step, metrics)]
        if "eval/accuracy" in metrics:
            self.event(f"step {step}: held-out accuracy {100 * metrics['eval/accuracy']:.1f} %")

    def follow(self, status: Callable[[], str]) -> None:
        self._status = status

    def _render(self) -> Group:
        steps = Table("step", "reward", "staleness", "tokens/s", "step s", "waited", "trained")
        for step, metrics in self._rows:
            if "reward/mean" not in metrics:
                continue
            seconds = metrics["time/step"]
            steps.add_row(
                str(step),
                f"{metrics['reward/mean']:.3f}",
                f"{metrics['staleness/max']:.0f}",
                f"{metrics['tokens/generated'] / seconds:.0f}",
                f"{seconds:.1f}",
                f"{metrics['time/wait_data']:.1f}",
                f"{metrics['time/train']:.1f}",
            )
        now = time.monotonic()
        waits = Table("who waits", "for", "since", title=Text(self._status()))
        for wait in self._waits.under_way()[:8]:
            since = f"{now - wait.since:.1f} s"
            waits.add_row(*map(Text, (wait.owner, wait.cause, since)))
        return Group(steps, waits, self._progress)
