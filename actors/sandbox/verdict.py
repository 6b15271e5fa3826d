"""What one rule says of one completion: the answer of a sandbox, and of every verifier."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.record.schema import ERROR, FAIL, PASS, SKIPPED, TIMEOUT


@dataclass(frozen=True)
class Verdict:
    """One rule's judgement of one completion.

    `pass` is a reward above 0 and `fail` one of 0 or less: a graded rule passes with any credit
    at all, so that "never solved" means exactly "nothing to learn from". `error` and `timeout`
    say that the rule could not judge; they carry no reward, and never 0. `skipped` says that it
    was not asked.
    """

    kind: str
    reward: float | None
    reason: str = ""
    suspicious: str = ""
    """Walls that the completion's program touched, by kind, joined by commas; mostly empty."""
    feedback: str = ""
    """What the completion lacks, in words for a policy that is to do better; mostly empty."""

    def __post_init__(self) -> None:
        if self.kind not in (PASS, FAIL, ERROR, TIMEOUT, SKIPPED):
            raise ValueError(f"verdict {self.kind!r} is none of the kinds there are")
        if not isinstance(self.feedback, str):
            raise TypeError(f"feedback {self.feedback!r} is no text")
        if self.kind in (ERROR, TIMEOUT, SKIPPED):
            if self.reward is not None:
                raise ValueError(f"verdict {self.kind} carries the reward {self.reward!r}")
        elif not isinstance(self.reward, float) or not math.isfinite(self.reward):
            raise ValueError(f"verdict {self.kind} carries the reward {self.reward!r}")

    @classmethod
    def scored(
        cls, reward: float, reason: str = "", suspicious: str = "", feedback: str = ""
    ) -> Verdict:
        return cls(PASS if reward > 0 else FAIL, float(reward), reason, suspicious, feedback)
