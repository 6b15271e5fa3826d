"""Episodes of one turn: the policy replies once, and rules judge the reply.

The rules are those of `verifier.rules`. They run in a child process that can be killed
(`actors.sandbox`). The reward is their weighted sum. R stands for the number of rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from actors.environments.base import Step
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.base import Verdict, fits_float32
from actors.verifiers.registry import JUDGE, verifier_names
from common.config.sections import VerifierConfig
from common.errors import UserError


class SingleTurn:
    """An `Environment` whose every step is done."""

    def __init__(self, config: VerifierConfig) -> None:
        """Start the child without waiting for it; `wait_ready` does."""
        if not config.rules:
            raise UserError("verifier.rules is empty: give at least one rule")
        specs = [
            RuleSpec(name, rule.name, dict(rule.args))
            for name, rule in zip(verifier_names(config), config.rules, strict=True)
        ]
        self._weights = [rule.weight for rule in config.rules]
        self._sandbox = Sandbox(
            JUDGE,
            specs,
            config.timeout_s,
            network=config.network,
            trusted=config.sandbox == "trusted",
            readable=config.readable,
        )
        self._tasks: list[str] = []
        self._prompts: list[str] = []

    def wait_ready(self) -> None:
        """Returns when the child has imported its rules.

        Raises: `UserError` for a rule that cannot be used; `VerifierError` when the child does not
        start.
        """
        self._sandbox.wait_ready()

    def reset(self, tasks: Sequence[str], prompts: Sequence[str] = ()) -> list[str]:
        """Take the references that the rules judge by, JSON objects. The prompt says it all."""
        self._tasks = list(tasks)
        self._prompts = list(prompts) or [""] * len(self._tasks)
        return [""] * len(self._tasks)

    def step(self, replies: Sequence[str], finish_reasons: Sequence[str] = ()) -> list[Step]:
        """Judge every reply by every rule, and end its episode.

        Raises: as `wait_ready`; `RunError` when the environment is closed.
        """
        rules = len(self._weights)
        asked = [
            Task(rule, reply, task, ending, prompt)
            for reply, task, ending, prompt in zip(
                replies,
                self._tasks,
                finish_reasons or [""] * len(self._tasks),
                self._prompts,
                strict=True,
            )
            for rule in range(rules)
        ]
        verdicts = self._sandbox.score(asked)
        each = [verdicts[first : first + rules] for first in range(0, len(verdicts), rules)]
        return [last_step(of_reply, self._weights) for of_reply in each]

    def close(self) -> None:
        """End the child."""
        self._sandbox.close()


def last_step(verdicts_R: Sequence[Verdict], weights_R: Sequence[float]) -> Step:
    """The end of an episode that rules have judged: their weighted sum is its reward.

    There is no reward where a rule could not judge, or where the sum is not finite in float32.
    """
    known = [verdict.reward for verdict in verdicts_R if verdict.reward is not None]
    reward = None
    if len(known) == len(verdicts_R):
        total = math.fsum(w * r for w, r in zip(weights_R, known, strict=True))
        reward = total if fits_float32(total) else None
    return Step(done=True, reward=reward, verdicts=tuple(verdicts_R))
