"""An endless, resumable stream of prompts.

`build_prompt_source` loads and checks the data; `PromptSource` serves them epoch after epoch, in
*tickets*: ticket t is place t % size of epoch t // size, and the order of an epoch is a function of
(seed, epoch). So a ticket says which prompt it is, in every process of a run, and the next ticket
with those to be served again is the whole cursor. `common.record.ledger` keeps it.

Of several data sets each has its own epochs, and `actors.data.mixture` says whose turn it is.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from actors.data.chat import Template, Tokenizer
from actors.data.contexts import Contexts
from actors.data.mixture import Mixture
from actors.data.quarantine import Quarantine
from actors.data.schemas import Row
from actors.data.sources import Rows, load_rows, together
from actors.verifiers.registry import reference_checks
from common.config.algorithm import AdvantageConfig
from common.config.contexts import HOLE
from common.config.environment import ENVIRONMENT_RULE
from common.config.follow_up import FollowUpConfig
from common.config.sections import Config, DataConfig, PromptOrder, VerifierSpec
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
    source: str = ""
    """Name of its data set, among several."""
    context_ids: tuple[int, ...] = ()
    """What a scorer reads in the place of `token_ids`, where it reads anything else."""
    follow_up_ids: tuple[int, ...] = ()
    """What later completions of the group are sampled behind, where that is anything else."""


@dataclass(frozen=True)
class _DataSet:
    """The training rows of one data set: `size` of them from `first` on."""

    name: str
    first: int
    size: int


class PromptSource:
    """Serves the training rows once an epoch, in an order of its own each epoch.

    Attributes: `size`, training prompts an epoch; `removed`, training rows left out because
    their question is held out; `quarantine`, the rows that could not be used; `rows`, all others;
    `lengths`, the tokens of every training prompt, where they were counted; `identity`, a digest of
    what the order of serving depends on.
    """

    def __init__(
        self,
        rows: Rows,
        template: Template,
        seed: int,
        order: PromptOrder = "shuffle",
        quarantine: Quarantine | None = None,
        weights: Mapping[str, float] | None = None,
        contexts: Contexts | None = None,
        follow_ups: Contexts | None = None,
    ) -> None:
        """`weights`: of several data sets by name, in the order in which their rows stand.

        Args:
            contexts: makes what a scorer reads; None where it reads the prompts.
            follow_ups: makes what later completions of a group are sampled behind; None where that
                is the prompts.
        """
        self.rows = rows
        self._rows, self._held_out = rows.train, rows.held_out
        self._template, self._contexts, self._follow_ups = template, contexts, follow_ups
        self._seed, self._how = seed, order
        self._again: deque[int] = deque()
        self._next_ticket = 0
        self._sets = _data_sets(rows.train)
        of_sets = [(weights or {}).get(one.name, 1.0) for one in self._sets]
        self._mixture = Mixture(of_sets or [1.0])
        self.identity = _identity(rows.train, seed, order, self._mixture.counts)
        self.size = len(rows.train)
        self.removed = rows.removed
        self.quarantine = quarantine or Quarantine(0.0)
        self.lengths: list[int] = []
        self._order_of = lru_cache(maxsize=max(2, 2 * len(of_sets)))(self._make_order)
        for one in self._sets:
            self._order_of(one, 0)

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

    def first(self) -> Prompt:
        """The prompt of the first ticket, without serving it."""
        return self._at(0)

    def encode(self, solution: str) -> list[int]:
        """Token ids of a reference solution."""
        return self._template.encode_solution(solution)

    def eval_prompts(self, count: int) -> list[Prompt]:
        """`count` held-out prompts, always the same; epoch is -1.

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
        which, position = self._mixture.at(ticket)
        one = self._sets[which]
        epoch, place = divmod(position, one.size)
        index = self._order_of(one, epoch)[place]
        return self._make(self._rows[index], index, epoch, ticket)

    def _make_order(self, one: _DataSet, epoch: int) -> list[int]:
        order = list(range(one.first, one.first + one.size))
        if self._how == "shuffle":
            # A string seed is hashed by SHA-512: near seeds and epochs give unrelated orders.
            own = f"/{one.name}" if one.name else ""
            random.Random(f"{self._seed}/{epoch}{own}").shuffle(order)
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
            source=row.source,
            context_ids=_made(self._contexts, row, ticket),
            follow_up_ids=_made(self._follow_ups, row, ticket),
        )


def build_prompt_source(
    config: DataConfig,
    eval_prompts: int,
    seed: int,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    rules: Sequence[VerifierSpec] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    scorer: AdvantageConfig | None = None,
    follow_up: FollowUpConfig | None = None,
    draft_tokens: int = 0,
) -> PromptSource:
    """The prompts of a run, every one checked against `max_prompt_tokens` and by `rules`: an answer
    that a rule would not accept when it is given back goes to quarantine.

    Args:
        tools: JSON schemas of the tools that prompts tell the policy of.
        scorer: says what a scorer reads; None: there is no scorer.
        follow_up: says what later completions are sampled behind; None: there are none. A row of
            which that does not fit goes to quarantine as well.
        draft_tokens: the most that a draft has.

    Raises: `UserError` for anything wrong with the data or the template.
    """
    template = Template(config, tokenizer, tools)
    quarantine = Quarantine(config.max_bad_rows)
    follow_ups = None
    if follow_up is not None and follow_up.text:
        follow_ups = Contexts.of_follow_up(template, follow_up)
    screen = _Screen(template, max_prompt_tokens, quarantine, follow_ups, draft_tokens)
    each: dict[str, Rows] = {}
    for one, held_out in zip(config.each, config.held_out(eval_prompts), strict=True):
        own = [rule for rule in rules if not rule.sources or one.name in rule.sources]
        each[one.name] = load_rows(
            one,
            held_out,
            seed,
            quarantine,
            reference_checks(own),
            screen,
            answerless=bool(own) and all(rule.name == ENVIRONMENT_RULE for rule in own),
        )
    quarantine.check()
    rows = together(each)
    weights = {one.name: one.weight for one in config.each}
    contexts = None
    if scorer is not None and scorer.context != "prompt":
        contexts = Contexts.of_scorer(template, scorer)
        contexts.check(rows.train)
    if follow_ups is not None:
        follow_ups.check(rows.train)
    source = PromptSource(
        rows, template, seed, config.order, quarantine, weights, contexts, follow_ups
    )
    source.lengths = [screen.lengths[row.place] for row in rows.train]
    return source


def prompt_source_of(
    config: Config, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]
) -> PromptSource:
    """The prompts of the run of `config`. Raises what `build_prompt_source` raises."""
    return build_prompt_source(
        config.data,
        config.eval.prompts,
        config.seed,
        tokenizer,
        config.model.max_length - config.generator.max_completion_tokens,
        config.verifier.rules,
        tools,
        config.algorithm.advantage,
        config.algorithm.rollout.follow_up,
        config.generator.max_completion_tokens,
    )


def _made(contexts: Contexts | None, row: Row, ticket: int) -> tuple[int, ...]:
    """What is read in the place of the prompt of a ticket; nothing outside of training."""
    return () if contexts is None or ticket < 0 else contexts.of(row)


def _data_sets(rows: Sequence[Row]) -> list[_DataSet]:
    """The data sets of rows that stand together by data set."""
    found, first = [], 0
    for name, own in groupby(rows, key=lambda row: row.source):
        size = len(list(own))
        found.append(_DataSet(name, first, size))
        first += size
    return found


class _Screen:
    """Lets the rows through that a prompt can be made of; `lengths` has their tokens by place."""

    def __init__(
        self,
        template: Template,
        limit: int,
        quarantine: Quarantine,
        follow_ups: Contexts | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self._template, self._limit, self._quarantine = template, limit, quarantine
        self._follow_ups, self._draft_tokens = follow_ups, draft_tokens
        self.lengths: dict[str, int] = {}

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows that fit; all others go to quarantine.

        Raises: `UserError` when the template leaves out what a row says.
        """
        for start in range(0, len(rows), _CHECK_BATCH):
            some = rows[start : start + _CHECK_BATCH]
            for row in some:
                if row.messages:
                    self._template.check_turns(row.conversation, row.place)
            token_ids = self._template.encode_asked([row.conversation for row in some])
            for row, ids in zip(some, token_ids, strict=True):
                self._note(row, len(ids), self._later(row))
        return [row for row in rows if row.place in self.lengths]

    def _later(self, row: Row) -> int:
        """Tokens of the longest prompt that later completions of the row can have."""
        if self._follow_ups is None:
            return 0
        ids = self._follow_ups.of(row)
        if ids == (HOLE,):  # it has nothing to be shown, so there is no later one
            return 0
        return len(ids) + ids.count(HOLE) * (self._draft_tokens - 1)

    def _note(self, row: Row, length: int, later: int) -> None:
        if 0 < length <= self._limit and later <= self._limit:
            self.lengths[row.place] = length
            return
        said = f"the prompt has {length} tokens"
        if 0 < length <= self._limit:
            said = (
                f"the prompt of a follow-up (algorithm.rollout.follow_up) may have {later} tokens"
            )
        error = UserError(
            f"{row.place}: {said} and at most {self._limit} fit "
            "(model.max_length less generator.max_completion_tokens): raise "
            "model.max_length, lower generator.max_completion_tokens, or drop the row"
            if length
            else f"{row.place}: the prompt has no tokens"
        )
        self._quarantine.add(row.place, error, row.question)


def _difficulty(row: Row) -> float:
    if row.difficulty is None:
        raise UserError(
            f"{row.place} has no difficulty, and data.order=curriculum goes by it: set "
            "data.difficulty_column (data.source file or hub), or use another data.order"
        )
    return row.difficulty


def _identity(rows: Sequence[Row], seed: int, how: PromptOrder, mixed: Sequence[int]) -> str:
    """A digest of what an order of serving depends on."""
    content = "\0".join(_content(row) + "\0" + row.reference for row in rows)
    order = f"seed {seed}" if how == "shuffle" else how
    mixture = f" mixed {':'.join(map(str, mixed))}" if len(mixed) > 1 else ""
    return f"{len(rows)} prompts{mixture}, {order}, {_digest(content)[:16]}"


def _content(row: Row) -> str:
    """What a row asks, as its order and its id depend on it."""
    return row.key if row.messages else row.question


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
