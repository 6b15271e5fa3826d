"""The judge of completions: rules in a child process, and the reward that their verdicts make.

The rules are those of `verifier.rules`, of several data sets those that judge the reply's. They run
in a child process that can be killed (`actors.sandbox`). The reward is their weighted sum. R stands
for the number of rules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.data.schemas import DATA_SET
from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.verifiers.base import Verdict, fits_float32
from actors.verifiers.registry import JUDGE, verifier_names
from common.config.environment import ENVIRONMENT_RULE
from common.config.sections import VerifierConfig
from common.record.schema import ERROR, SKIPPED, TIMEOUT


@dataclass(frozen=True)
class Judgement:
    """What the rules together say of one completion."""

    reward: float | None
    """None, and never 0: nobody could tell."""
    verdicts: tuple[Verdict, ...]
    """What the reward was made of, one verdict a rule."""


@dataclass(frozen=True)
class Played:
    """What an environment said of an episode: the columns `environment_*` of its row."""

    verdict: str = ""
    """`error` or `timeout` where it failed: then no rule is asked. Empty without a reward."""
    reason: str = ""
    reward: float | None = None

    @property
    def failed(self) -> bool:
        return self.verdict in (ERROR, TIMEOUT)

    def as_verdict(self) -> Verdict:
        """What the rule `environment` says."""
        if self.failed:
            return Verdict(self.verdict, None, self.reason)
        if self.reward is None:
            return Verdict(ERROR, None, "the environment gave no reward")
        if not fits_float32(self.reward):
            return Verdict(ERROR, None, f"the environment gave {self.reward} as reward")
        return Verdict.scored(self.reward)


class Judge:
    """Judges batches of completions. One thread calls it; `close` may come from any."""

    def __init__(self, config: VerifierConfig) -> None:
        """Start the child without waiting for it; `wait_ready` does."""
        specs = {
            rule: RuleSpec(name, spec.name, dict(spec.args))
            for rule, (name, spec) in enumerate(
                zip(verifier_names(config), config.rules, strict=True)
            )
            if spec.name != ENVIRONMENT_RULE
        }
        self._weights = [rule.weight for rule in config.rules]
        self._sources = [frozenset(rule.sources) for rule in config.rules]
        self._place = {rule: place for place, rule in enumerate(specs)}  # in the child
        self._sandbox: Sandbox | None = None
        if specs:
            self._sandbox = Sandbox(
                JUDGE,
                list(specs.values()),
                config.timeout_s,
                network=config.network,
                trusted=config.sandbox == "trusted",
                readable=config.readable,
            )

    def wait_ready(self) -> None:
        """Returns when the child has imported its rules.

        Raises: `UserError` for a rule that cannot be used; `VerifierError` when the child does not
        start.
        """
        if self._sandbox is not None:
            self._sandbox.wait_ready()

    def judge(
        self,
        texts: Sequence[str],
        references: Sequence[str],
        finish_reasons: Sequence[str] = (),
        prompts: Sequence[str] = (),
        played: Sequence[Played] = (),
    ) -> list[Judgement]:
        """Judge every completion by every rule, in one exchange with the child.

        Args:
            references: JSON objects that the rules judge by, one a completion.
            finish_reasons: why the completions ended, `stop` or `length`; empty: nobody knows.
            prompts: what the policy has read, templates included; empty: nobody knows.
            played: what the environments of the completions said; empty: there was none.

        Raises: as `wait_ready`; `RunError` when the judge is closed.
        """
        nobody = [""] * len(texts)
        played = played or [Played()] * len(texts)
        rules = [self._rules_of(reference) for reference in references]
        asked = [
            Task(self._place[rule], text, reference, ending, prompt)
            for text, reference, ending, prompt, own, said in zip(
                texts,
                references,
                finish_reasons or nobody,
                prompts or nobody,
                rules,
                played,
                strict=True,
            )
            for rule in own
            if self._asks(rule, said)
        ]
        verdicts = iter(self._sandbox.score(asked) if self._sandbox is not None else ())
        return [
            self._judgement(
                {
                    rule: next(verdicts) if self._asks(rule, said) else said.as_verdict()
                    for rule in own
                }
            )
            for own, said in zip(rules, played, strict=True)
        ]

    def _asks(self, rule: int, said: Played) -> bool:
        """Whether the child judges by a rule: not where an environment has, or has failed."""
        return rule in self._place and not said.failed

    def _rules_of(self, reference: str) -> list[int]:
        """The rules that judge the data set of a reference."""
        if not any(self._sources):
            return list(range(len(self._sources)))
        source = json.loads(reference)[DATA_SET]
        return [rule for rule, own in enumerate(self._sources) if not own or source in own]

    def _judgement(self, verdicts: dict[int, Verdict]) -> Judgement:
        """What the verdicts of some rules make."""
        every = [verdicts.get(rule, Verdict(SKIPPED, None)) for rule in range(len(self._weights))]
        return judgement(every, self._weights)

    def close(self) -> None:
        """End the child."""
        if self._sandbox is not None:
            self._sandbox.close()


def judgement(verdicts_R: Sequence[Verdict], weights_R: Sequence[float]) -> Judgement:
    """What verdicts make: their weighted sum is the reward.

    There is no reward where a rule could not judge, or where the sum is not finite in float32.
    Rules that were not asked do not count.
    """
    asked = [
        (weight, verdict.reward)
        for weight, verdict in zip(weights_R, verdicts_R, strict=True)
        if verdict.kind != SKIPPED
    ]
    known = [(weight, score) for weight, score in asked if score is not None]
    reward = None
    if len(known) == len(asked):
        total = math.fsum(weight * score for weight, score in known)
        reward = total if fits_float32(total) else None
    return Judgement(reward, tuple(verdicts_R))
