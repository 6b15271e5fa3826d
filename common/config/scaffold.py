"""What completions of a group are sampled behind, each something of its own: `scaffold`.

    rubric   criteria of the question's rubric, fewer from one completion to the next and from one
             step to the next; trained without them (RuscaRL)
    tags     one of some texts, drawn for each; trained with it (RC-GRPO's second stage)

    share of the rubric = share (G - i) / (G - 1) / (1 + e^(steepness (step / steps - midpoint)))

for completion i = 1..G. So the last one reads the plain prompt, as all do in the end.

Sources: arXiv 2508.16949 and IANNXANG/RuscaRL@18e2b01 [P], 2602.03025 [3P].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config.bounds import NotNegative, Share
from common.config.contexts import RUBRIC, template_with
from common.config.follow_up import check_single_answers
from common.errors import UserError

_KEY = "algorithm.rollout.scaffold"
_TAGGED = "{prompt} {tag}"


@dataclass
class ScaffoldConfig:
    """What each completion of a group is sampled behind besides its prompt."""

    kind: Literal["none", "rubric", "tags"] = "none"
    """What that is (`common.config.scaffold`). `rubric`: criteria of a rule of `verifier.rules`,
    and the completions are trained without them (RuscaRL). `tags`: one of `tags` for each
    completion, which is trained with it (RC-GRPO)."""
    share: Share = 1.0
    """Share of a rubric that the first completion of a group reads before any decay."""
    decay: Literal["sigmoid", "none"] = "sigmoid"
    """How that share falls over the steps of the run."""
    midpoint: Share = 0.2
    """Share of the run's steps at which half of the decay is over."""
    steepness: NotNegative = 125.0
    """Steepness of the decay there."""
    tags: list[str] = field(default_factory=list)
    """Texts of which each completion draws one, all equally likely."""
    template: str | None = None
    """Text of the prompt, with `{prompt}` and `{rubric}` or `{tag}`. Null takes one of ours."""

    @property
    def slot(self) -> str:
        """What the template has a place for besides the prompt."""
        return "tag" if self.kind == "tags" else "rubric"

    @property
    def text(self) -> str:
        """The template. Raises `UserError` for one that leaves out a slot."""
        usual = _TAGGED if self.kind == "tags" else RUBRIC
        by = f"{_KEY}.kind={self.kind}"
        return template_with((self.slot,), usual, self.template, f"{_KEY}.template", by)

    def share_of(self, place: int, group_size: int, progress: float) -> float:
        """The share of a rubric that completion `place` (0, 1, ...) of a group reads.

        Args:
            progress: share of the run's steps that there have been, this one included.
        """
        of_group = (group_size - 1 - place) / (group_size - 1) if group_size > 1 else 1.0
        return self.share * of_group * self._left(progress)

    def _left(self, progress: float) -> float:
        if self.decay == "none":
            return 1.0
        power = self.steepness * (progress - self.midpoint)
        return 1.0 / (1.0 + math.exp(min(power, 700.0)))  # e^709 is the last that is a float


def check_scaffold(config: Any) -> None:
    """Refuse a scaffold beside what cannot be under it.

    Args:
        config: the whole configuration (`common.config.sections.Config`).

    Raises: `UserError`.
    """
    scaffold, follow_up = config.algorithm.rollout.scaffold, config.algorithm.rollout.follow_up
    if (scaffold.kind == "tags") != bool(scaffold.tags):
        raise UserError(
            f"{_KEY}.kind={scaffold.kind} and {_KEY}.tags={scaffold.tags}: kind=tags needs some, "
            "and no other kind has any"
        )
    if "" in scaffold.tags:
        raise UserError(f"{_KEY}.tags holds an empty text: leave it out")
    if scaffold.kind == "none":
        return
    _ = scaffold.text
    key = f"{_KEY}.kind={scaffold.kind}"
    if follow_up.kind != "none":
        raise UserError(
            f"{key} and algorithm.rollout.follow_up.kind={follow_up.kind} do not go together: each "
            "says what completions are sampled behind. Set one of them to none"
        )
    tagged = scaffold.kind == "tags"
    check_single_answers(config, key, elsewhere=not tagged, mixed=tagged)
