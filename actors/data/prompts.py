"""An endless, resumable stream of prompts.

`build_prompt_source` loads and checks the data; `PromptSource` serves them epoch after epoch, in
*tickets*: ticket t is place t % size of epoch t // size, and the order of an epoch is a function of
(seed, epoch). So a ticket says which prompt it is, in every process of a run, and the next ticket
with those to be served again is the whole cursor. `common.record.ledger` keeps it.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from actors.data.chat import Template, Tokenizer
from actors.data.quarantine import Quarantine
from actors.data.schemas import Row
from actors.data.sources import Rows, load_rows
from actors.verifiers.registry import reference_checks
from common.config.sections import DataConfig, PromptOrder, VerifierSpec
from common.errors import UserError

_CHECK_BATCH = 512


@dataclass(frozen=True)
class Prompt:
    """A question as a generator takes it.

    `prompt_id` is the same in every epoch and run over the same data. `reference` is a JSON
    object with what the verifiers need: `prompt` (the question alone), `answer`, and for
    reasoning-gym `task`, `params` and `entry`.
    """

    ticket: int
    """The place in the order of serving, over all epochs; -1 for evaluation."""
    prompt_id: str
    index: int
    epoch: int
    question: str
    """As the data set has it."""
    text: str
    """The question in its template: all that the model reads."""
    token_ids: list[int]
    reference: str
    solution: str | None
    difficulty: float | None


class PromptSource:
    """Serves the training rows once an epoch, in an order of its own each epoch.

    Attributes: `size`, training prompts an epoch; `removed`, training rows left out because
    their question is held out; `quarantine`, the rows that could not be used; `rows`, all others;
    `identity`, a digest of what the order of serving depends on.
    """

    def __init__(
        self,
        rows: Rows,
        template: Template,
        seed: int,
        order: PromptOrder = "shuffle",
        quarantine: Quarantine | None = None,
    ) -> None:
        self.rows = rows
        self._rows, self._held_out = rows.train, rows.held_out
        self._template = template
        self._seed, self._how = seed, order
        self._again: deque[int] = deque()
        self._next_ticket = 0
        self.identity = _identity(rows.train, seed, order)
        self.size = len(rows.train)
        self.removed = rows.removed
        self.quarantine = quarantine or Quarantine(0.0)
        self._order_of = lru_cache(maxsize=2)(self._make_order)
        self._order_of(0)

    def next(self) -> Prompt:
        """The next prompt, those to be served again first; there always is one."""
        if self._again:
            return self._at(self._again.popleft())
        self._next_ticket += 1
        return self._at(self._next_ticket - 1)

    def seek(self, next_ticket: int, again: Sequence[int] = ()) -> None:
        """Serve the tickets `again`, then go on from `next_ticket`."""
        self._next_ticket, self._again = next_ticket, deque(again)

    def give_back(self, ticket: int) -> None:
        """Serve a ticket once more, before new ones: its group was lost.

        Raises: `ValueError` when it has not been served, or is waiting already.
        """
        if not 0 <= ticket < self._next_ticket or ticket in self._again:
            raise ValueError(f"ticket {ticket} is not out")
        self._again.append(ticket)

    def encode(self, solution: str) -> list[int]:
        """Token ids of a reference solution."""
        return self._template.encode_solution(solution)

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, always the same; epoch is -1.

        Raises: `ValueError` when fewer are held out.
        """
        if count > len(self._held_out):
            raise ValueError(f"{count} evaluation prompts wanted, {len(self._held_out)} held out")
        return self.some_prompts(count)

    def some_prompts(self, count: int) -> list[Prompt]:
        """`count` prompts, always the same: held-out ones, then those of training; epoch is -1."""
        rows = [*self._held_out, *self._rows[:count]]
        return [self._make(row, i, -1, -1) for i, row in enumerate(rows[:count])]

    def _at(self, ticket: int) -> Prompt:
        epoch, place = divmod(ticket, self.size)
        index = self._order_of(epoch)[place]
        return self._make(self._rows[index], index, epoch, ticket)

    def _make_order(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        if self._how == "shuffle":
            # A string seed is hashed by SHA-512: near seeds and epochs give unrelated orders.
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        elif self._how == "curriculum":
            order.sort(key=lambda index: _difficulty(self._rows[index]))
        return order

    def _make(self, row: Row, index: int, epoch: int, ticket: int) -> Prompt:
        text = self._template.render(row.conversation)
        return Prompt(
            ticket=ticket,
            prompt_id=f"{_digest(_content(row))[:12]}-{index}",
            index=index,
            epoch=epoch,
            question=row.question,
            text=text,
            token_ids=self._template.encode_asked([row.conversation])[0],
            reference=row.reference,
            solution=row.solution,
            difficulty=row.difficulty,
        )


def build_prompt_source(
    config: DataConfig,
    eval_prompts: int,
    seed: int,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    rules: Sequence[VerifierSpec] = (),
) -> PromptSource:
    """The prompts of a run, every one checked against `max_prompt_tokens` and by `rules`: an answer
    that a rule would not accept when it is given back goes to quarantine.

    Raises: `UserError` for anything wrong with the data or the template.
    """
    template = Template(config, tokenizer)
    quarantine = Quarantine(config.max_bad_rows)
    rows = load_rows(config, eval_prompts, seed, quarantine, reference_checks(rules))
    for row in (*rows.train, *rows.held_out):
        if row.messages:
            template.check_turns(row.conversation, row.place)
    _check_lengths(rows.held_out, template, max_prompt_tokens, None)
    bad = _check_lengths(rows.train, template, max_prompt_tokens, quarantine)
    quarantine.check()
    rows = replace(rows, train=[row for row in rows.train if row.place not in bad])
    if not rows.train:
        quarantine.refuse("no row is left to train on")
    return PromptSource(rows, template, seed, config.order, quarantine)


def _check_lengths(
    rows: Sequence[Row], template: Template, limit: int, quarantine: Quarantine | None
) -> set[str]:
    """Places of rows whose prompt does not fit; without a quarantine the first is an error."""
    bad = set()
    for start in range(0, len(rows), _CHECK_BATCH):
        some = rows[start : start + _CHECK_BATCH]
        token_ids = template.encode_asked([row.conversation for row in some])
        for row, ids in zip(some, token_ids, strict=True):
            if 0 < len(ids) <= limit:
                continue
            error = UserError(
                f"{row.place}: the prompt has {len(ids)} tokens and at most {limit} fit "
                "(model.max_length less generator.max_completion_tokens): raise "
                "model.max_length, lower generator.max_completion_tokens, or drop the row"
                if ids
                else f"{row.place}: the prompt has no tokens"
            )
            if quarantine is None:
                raise error
            quarantine.add(row.place, error, row.question)
            bad.add(row.place)
    return bad


def _difficulty(row: Row) -> float:
    if row.difficulty is None:
        raise UserError(
            f"{row.place} has no difficulty, and data.order=curriculum goes by it: set "
            "data.difficulty_column (data.source file or hub), or use another data.order"
        )
    return row.difficulty


def _identity(rows: Sequence[Row], seed: int, how: PromptOrder) -> str:
    """A digest of what an order of serving depends on."""
    content = "\0".join(_content(row) + "\0" + row.reference for row in rows)
    order = f"seed {seed}" if how == "shuffle" else how
    return f"{len(rows)} prompts, {order}, {_digest(content)[:16]}"


def _content(row: Row) -> str:
    """What a row asks, as its order and its id depend on it."""
    return row.key if row.messages else row.question


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
