"""Makes what completions of a group are sampled behind, as `algorithm.rollout.scaffold` says.

Which criteria, and which tag, is drawn from (seed, ticket, place in the group): the same in every
process of a run. How many criteria follows from the step, so a checkpoint has nothing to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.data.chat import Template
from actors.data.contexts import asked_as, showing
from actors.data.rubrics import check_rubrics, of_source, rubric_of
from actors.data.schemas import Row
from common.config.scaffold import ScaffoldConfig
from common.config.sections import VerifierSpec
from common.trajectory import Behind


@dataclass(frozen=True)
class Scaffold:
    """What completions are sampled behind, of the rows of a run."""

    template: Template
    config: ScaffoldConfig
    rules: Sequence[VerifierSpec]
    seed: int
    steps: int
    """Learner steps of the run."""

    @classmethod
    def of(
        cls,
        template: Template,
        config: ScaffoldConfig | None,
        rules: Sequence[VerifierSpec],
        seed: int,
        steps: int,
        sources: Sequence[str],
    ) -> Scaffold | None:
        """The scaffold of a run; None where there is none.

        Args:
            sources: names of the data sets.

        Raises:
            UserError: the rules of a data set have no criteria to show.
        """
        if config is None or config.kind == "none":
            return None
        if config.kind == "rubric":
            check_rubrics("algorithm.rollout.scaffold.kind=rubric", rules, sources)
        return cls(template, config, rules, seed, steps)

    def longest(self, row: Row, rules: Sequence[VerifierSpec]) -> int:
        """Tokens of the longest prompt that a completion of the row can have.

        Args:
            rules: those that judge the row.
        """
        shown = list(self.config.tags)
        if self.config.kind == "rubric":
            shown = ["\n".join(rubric_of(rules, row))]
        return max((len(self._ids(row, text)) for text in shown if text), default=0)

    def behind(self, row: Row, ticket: int, version: int, group_size: int) -> tuple[Behind, ...]:
        """What each completion of a group is sampled behind.

        Args:
            version: of the weights that sample, which is the number of steps before this one.
        """
        if self.config.kind == "tags":
            return tuple(self._tagged(row, self._draw(ticket, i)) for i in range(group_size))
        lines = rubric_of(of_source(self.rules, row.source), row)
        progress = (version + 1) / self.steps
        found = []
        for place in range(group_size):
            share = self.config.share_of(place, group_size, progress)
            count = round(share * len(lines))
            kept = sorted(self._draw(ticket, place).sample(range(len(lines)), count))
            shown = "\n".join(lines[number] for number in kept)
            found.append(Behind(self._ids(row, shown) if shown else ()))
        return tuple(found)

    def _tagged(self, row: Row, draw: random.Random) -> Behind:
        tag = draw.choice(self.config.tags)
        text = self.template.render(asked_as(row, self.config.text, {"tag": tag}))
        return Behind(self._ids(row, tag), text)

    def _ids(self, row: Row, shown: str) -> tuple[int, ...]:
        return showing(self.template, row, self.config.text, {self.config.slot: shown})

    def _draw(self, ticket: int, place: int) -> random.Random:
        return random.Random(f"{self.seed}/{ticket}/{place}")
