"""What a scorer or a later completion has in the place of a prompt: the same turns, and some help.

Token ids are made where those of prompts are, under the same template. What is known only after
sampling has a hole in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from actors.data.chat import Template
from actors.data.controls import Controls, control_tokens
from actors.data.schemas import Message, Row
from common.config.algorithm import AdvantageConfig
from common.config.contexts import FILLED_LATER, HOLE, context_template
from common.config.follow_up import FollowUpConfig
from common.errors import UserError

_MARK = "grpolambdahole"
"""Letters that no template and no tokenizer treats in a way of its own."""


class Contexts:
    """Makes what is read in the place of a row's prompt."""

    def __init__(
        self,
        template: Template,
        text: str,
        slots: Sequence[str],
        source: str,
        key: str,
        *,
        or_answer: bool = True,
    ) -> None:
        """Keep the template of turns and that of the question.

        Args:
            text: has `{prompt}` and the slots in braces.
            source: what fills the slot: `solution`, `answer`, or one of `FILLED_LATER`, under which
                every slot has a hole.
            key: the key that asks for it and its value, for an error.
            or_answer: the right answer stands for a solution that a row does not have.
        """
        self._template, self._text = template, text
        self._slots, self._source, self._key = slots, source, key
        self._or_answer = or_answer

    @classmethod
    def of_scorer(cls, template: Template, config: AdvantageConfig) -> Contexts:
        """What a scorer reads, as `algorithm.advantage.context` says."""
        name = config.context
        text = context_template(name, config.context_template)
        return cls(template, text, [name], name, f"algorithm.advantage.context={name}")

    @classmethod
    def of_follow_up(cls, template: Template, config: FollowUpConfig) -> Contexts:
        """What later completions of a group are sampled behind."""
        source = "draft" if "draft" in config.slots else config.hint
        key = f"algorithm.rollout.follow_up.kind={config.kind}"
        # The answer must not slip into a hint that was to be a solution.
        return cls(template, config.text, config.slots, source, key, or_answer=False)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `UserError` where no row has what shall be shown."""
        if self._source in FILLED_LATER or any(map(self._known, rows)):
            return
        columns = {"solution": "data.solution_column"}.get(self._source, "data.answer_column")
        if self._source == "solution" and self._or_answer:
            columns += ", or data.answer_column"
        raise UserError(
            f"{self._key}: no row of the data has what is to be shown: set {columns}, or another "
            "value"
        )

    def of(self, row: Row) -> tuple[int, ...]:
        """Token ids; a hole alone where the row has nothing that helps."""
        helping = _MARK if self._source in FILLED_LATER else self._known(row)
        return showing(self._template, row, self._text, dict.fromkeys(self._slots, helping))

    def longest(self, row: Row, room: Mapping[str, int]) -> int:
        """Tokens of the longest prompt that later completions of a row can have; 0: there are none.

        Args:
            room: the most tokens of what fills a slot later.
        """
        ids = self.of(row)
        if ids == (HOLE,):
            return 0
        holes = ids.count(HOLE)
        return len(ids) - holes + (sum(room[slot] for slot in self._slots) if holes else 0)

    def _known(self, row: Row) -> str:
        """What the row itself has to show; empty where it has nothing."""
        if self._source == "solution" and (row.solution or not self._or_answer):
            return row.solution or ""
        return _answer(row)


def showing(template: Template, row: Row, text: str, shown: Mapping[str, str]) -> tuple[int, ...]:
    """Token ids of a row's turns, the question in a template; a hole alone where it shows nothing.

    Args:
        text: has `{prompt}` and the slots in braces.
        shown: what fills them, by slot.
    """
    if not all(shown.values()):
        return (HOLE,)
    turns = asked_as(row, text, shown)
    head, *tails = template.encode_around(turns, _MARK)
    ids = list(head)
    for tail in tails:
        ids += [HOLE, *tail]
    return tuple(ids)


def asked_as(row: Row, text: str, shown: Mapping[str, str]) -> list[Message]:
    """A row's turns with the question in a template: see `showing`."""
    *before, asked = row.conversation
    # Not str.format: a template may hold other braces, and so may the question.
    values = {"{prompt}": asked["content"], **{f"{{{slot}}}": shown[slot] for slot in shown}}
    return [*before, {**asked, "content": _filled(text, values)}]


def with_feedback(context_ids: Sequence[int], said: str, tokenizer: Any) -> list[int]:
    """A context with what an environment said in its hole; as it is where nothing was said."""
    return filled_in(context_ids, said, tokenizer) if said else list(context_ids)


def filled_in(
    context_ids: Sequence[int], said: str, tokenizer: Any, most: int | None = None
) -> list[int]:
    """Token ids with those of a text in their first hole; as they are where they have none.

    Args:
        most: tokens of the text that are kept, the first ones; None keeps all.
    """
    if HOLE not in context_ids:
        return list(context_ids)
    controls = Controls(control_tokens(tokenizer))
    text, words = controls.hide(said)
    ids = controls.encode(tokenizer, text, words, add_special_tokens=False)
    place = list(context_ids).index(HOLE)
    return [*context_ids[:place], *ids[:most], *context_ids[place + 1 :]]


def _filled(text: str, values: dict[str, str]) -> str:
    """`text` with its slots filled, each once; what fills one is not looked at for others."""
    parts, rest = [], text
    while found := [(rest.find(slot), slot) for slot in values if slot in rest]:
        place, slot = min(found)
        parts += [rest[:place], values.pop(slot)]
        rest = rest[place + len(slot) :]
    return "".join([*parts, rest])


def _answer(row: Row) -> str:
    """The right answer of a row; empty where it has none."""
    answer: Any = json.loads(row.reference)["answer"]
    if answer is None:
        return ""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
