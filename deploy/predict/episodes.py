"""What `plan` says of episodes: their tokens against the limits, their seconds against the budget.

Symbols: S = `generator.max_staleness`, the steps that a group may take before the learner waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.sections import Config


@dataclass(frozen=True)
class Trial:
    """What was found out about the environment by asking it, and the template."""

    between_tokens: int
    """Tokens that the template puts around an observation."""
    speaks_first: bool
    """Whether the policy reads an observation before its first turn."""
    reset_s: float
    turn_s: float
    """Seconds of an answer, on average."""
    longest_prompt: int
    """Tokens of the longest prompt."""


@dataclass(frozen=True)
class Shape:
    """An episode of the longest turns and observations."""

    turns: int
    turn_tokens: int
    observations: int
    observation_tokens: int
    """Tokens of an observation, with those that the template puts around it."""

    @classmethod
    def of(cls, config: Config, trial: Trial) -> Shape:
        """The longest episode of `config`."""
        environment = config.environment
        return cls(
            environment.max_turns,
            environment.turn_tokens,
            environment.max_turns - (not trial.speaks_first),
            environment.observation_tokens + trial.between_tokens,
        )

    @property
    def tokens(self) -> int:
        """Tokens of all of it, behind the prompt."""
        return self.turns * self.turn_tokens + self.observations * self.observation_tokens

    def cut(self, room: int) -> tuple[int, int] | None:
        """The turn that `room` tokens cut, from 1, and the tokens that are left for it.

        Without a token left it is not sampled. None where the whole episode fits.
        """
        used = 0
        for turn in range(1, self.turns + 1):
            if turn > self.turns - self.observations:
                used += self.observation_tokens
            left = room - used
            if left < self.turn_tokens:
                return turn, max(0, left)
            used += self.turn_tokens
        return None


def episode_lines(config: Config, trial: Trial, step_s: float | None = None) -> list[str]:
    """Lines on the episodes of a run that has an environment.

    Args:
        step_s: seconds of a learner step, where they were predicted.
    """
    return [*_tokens(config, trial), *_seconds(config, trial, step_s)]


def _tokens(config: Config, trial: Trial) -> list[str]:
    shape, environment = Shape.of(config, trial), config.environment
    room, context = config.generator.max_completion_tokens, config.model.max_length
    lines = [
        f"tokens of an episode   {shape.turns} turns x environment.turn_tokens "
        f"{shape.turn_tokens} + {shape.observations} observations x "
        f"(environment.observation_tokens {environment.observation_tokens} + "
        f"{trial.between_tokens} of the template) = {shape.tokens}, of "
        f"generator.max_completion_tokens {room}"
        + (
            "; a turn that calls several tools has an observation of each"
            if environment.role == "tool"
            else ""
        ),
        f"context                {trial.longest_prompt} tokens of the longest prompt + "
        f"generator.max_completion_tokens {room} = {trial.longest_prompt + room} of "
        f"model.max_length {context}",
    ]
    cut = shape.cut(room)
    if cut is None:
        return lines
    turn, left = cut
    what = (
        f"has {left} tokens of {shape.turn_tokens}"
        if left
        else "is not reached, and it ends as `length`"
    )
    needed = trial.longest_prompt + shape.tokens
    remedy = f"generator.max_completion_tokens={shape.tokens}"
    if needed > context:
        remedy += f" and model.max_length={needed}"
    return [
        *lines,
        f"note                   generator.max_completion_tokens {room} cuts an episode of the "
        f"longest turns and observations: its turn {turn} {what}. {remedy} would leave all turns "
        "their room",
    ]


def _seconds(config: Config, trial: Trial, step_s: float | None) -> list[str]:
    environment, staleness = config.environment, config.generator.max_staleness
    turns, groups = environment.max_turns, config.groups_per_step
    expected_s = trial.reset_s + turns * trial.turn_s
    # The answers to `reset`, to every turn, and to `reward` have the time of a step each.
    longest_s = min(environment.episode_timeout_s, (turns + 2) * environment.step_timeout_s)
    lines = [
        f"seconds of an episode  {expected_s:.3g} in the environment: reset {trial.reset_s:.2g} + "
        f"{turns} turns x {trial.turn_s:.2g}, as tried here; {longest_s:g} at most, by "
        "environment.episode_timeout_s and step_timeout_s",
    ]
    if staleness == 0:
        return [
            *lines,
            "staleness budget       generator.max_staleness 0: every step waits for the slowest of "
            f"its {config.completions_per_step} episodes, so for {expected_s:.3g} s in the "
            f"environment, and {longest_s:g} s where it hangs",
        ]
    lines += [
        f"staleness budget       an episode has the time of generator.max_staleness {staleness} "
        f"step(s) before the learner waits for it: steps of {groups} groups that are shorter than "
        f"{expected_s / staleness:.3g} s wait, and than {longest_s / staleness:.3g} s where an "
        "environment hangs",
    ]
    if step_s is None or expected_s <= staleness * step_s:
        return lines
    return [
        *lines,
        f"note                   {expected_s:.3g} s in the environment are more than the "
        f"{staleness * step_s:.3g} s that {staleness} predicted step(s) of {step_s:.3g} s give: "
        f"the learner waits for episodes. A faster environment, fewer environment.max_turns, or "
        f"generator.max_staleness={_steps_for(expected_s, step_s)} would not hold it up",
    ]


def _steps_for(seconds: float, step_s: float) -> int:
    return int(-(-seconds // step_s))
