"""Guided rollouts of G2RPO-A, arXiv 2508.13023: how many, and how long the guidance is.

Of a group's G completions a fraction `ratio` is *guided*: the first l tokens of a reference
solution follow the prompt, and the policy goes on from there [P]. l adapts to the reward: rising
reward, less guidance [P, direction; D, form from the released code]:

    l_{k+1} = clip( l_k * mean(r_{k-1} .. r_{k-m}) / r_k , 1, l_max ),   m = min(T, k)

r_k is the mean accuracy of all completions of learner step k, format rewards excluded; k counts
learner steps, not arrivals, so that an asynchronous run is reproducible.

    cycle         T steps of history, then one update from them; the released code, T = 2 [P]
    sliding       an update every step over the last T; the published reproduction [P]
    fixed         l_max for ever; an ablation of the paper [P]
    linear_decay  from l_max to 1 over the run; an ablation of the paper [P]

An update that would divide by a reward of zero, or by a history of zeros, is skipped [P].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.data.prompts import Prompt
from common.config.algorithm import GuidanceConfig
from common.errors import UserError


@dataclass(frozen=True)
class GuidedStart:
    """The first tokens of a group's last `num_completions` completions."""

    token_ids: tuple[int, ...] = ()
    num_completions: int = 0
    mask: bool = True
    """Whether these tokens stay out of the loss."""


UNGUIDED = GuidedStart()


def num_guided(group_size: int, ratio: float) -> int:
    """Guided completions of a group: the nearest whole number to ratio * G."""
    return round(group_size * ratio)


def adapted_length(length: float, history: list[float], reward: float, longest: int) -> float:
    """The next guidance length l_{k+1} from l_k, the rewards before step k, and r_k.

    It stays where a mean is zero.
    """
    if not history or reward <= 0:
        return length
    before = sum(history) / len(history)
    if before <= 0:
        return length
    return min(max(length * before / reward, 1.0), float(longest))


class Guidance:
    """The adaptive length, as state of the run."""

    def __init__(self, config: GuidanceConfig, total_steps: int, room: int) -> None:
        """`room`: the most tokens that leave a guided completion one of its own."""
        self._config = config
        self._longest = min(config.max_tokens, room)
        self._total_steps = total_steps
        self._length = float(self._longest)
        self._history: list[float] = []
        self._step = 0

    @property
    def length(self) -> int:
        """Guidance tokens of a guided completion dispatched now."""
        return max(1, round(self._length)) if self._config.ratio > 0 else 0

    def start(
        self, prompt: Prompt, encode: Callable[[str], list[int]], group_size: int
    ) -> GuidedStart:
        """How a group of `prompt` that is dispatched now begins.

        A solution shorter than `length` guides with all of its tokens; one without any with none.

        Args:
            encode: token ids of a solution.

        Raises:
            UserError: the prompt has no solution to guide with.
        """
        length = self.length
        if length < 1:
            return GuidedStart(mask=self._config.mask)
        if prompt.solution is None:
            raise UserError(
                f"prompt {prompt.prompt_id} has no reference solution to guide with: set "
                "data.solution_column, or algorithm.rollout.guidance.ratio=0"
            )
        token_ids = tuple(encode(prompt.solution)[:length])
        guided = num_guided(group_size, self._config.ratio) if token_ids else 0
        return GuidedStart(token_ids, guided, self._config.mask)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt to the metrics of a learner step; the guidance's own metrics, if there is any."""
        if self._config.ratio == 0:
            return {}
        self.observe(step, metrics["reward/accuracy"])
        return {"guidance/length": float(self.length)}

    def observe(self, step: int, accuracy: float) -> None:
        """The mean accuracy of learner step `step` (1, 2, ...). Raises on a step out of order."""
        if step != self._step + 1:
            raise ValueError(f"guidance saw step {step} after step {self._step}")
        self._step = step
        _SCHEDULES[self._config.schedule](self, accuracy)

    def _sliding(self, reward: float) -> None:
        window = self._config.window
        self._length = adapted_length(self._length, self._history[-window:], reward, self._longest)
        self._history = [*self._history, reward][-window:]

    def _cycle(self, reward: float) -> None:
        """Whole tokens, as in the released code: 1 stays where the mean is not twice the reward."""
        if len(self._history) < self._config.window:
            self._history.append(reward)
            return
        adapted = adapted_length(self._length, self._history, reward, self._longest)
        self._length = float(int(adapted))
        self._history = []

    def _fixed(self, reward: float) -> None:
        """Nothing adapts."""

    def _linear_decay(self, reward: float) -> None:
        left = 1.0 - self._step / self._total_steps
        self._length = max(1.0, self._longest * left)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"length": self._length, "history": list(self._history)}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on from `state_dict`.

        Args:
            step: the learner's. A run that had no guidance until then has observed no step.
        """
        self._length = min(float(state["length"]), float(self._longest))
        self._history = [float(reward) for reward in state["history"]]
        self._step = step


_SCHEDULES: dict[str, Callable[[Guidance, float], None]] = {
    "cycle": Guidance._cycle,
    "sliding": Guidance._sliding,
    "fixed": Guidance._fixed,
    "linear_decay": Guidance._linear_decay,
}
