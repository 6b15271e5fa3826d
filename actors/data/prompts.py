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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

from actors.data.chat import Template, Tokenizer
from actors.data.contexts import Contexts
from actors.data.mixture import Mixture
from actors.data.quarantine import Quarantine
from actors.data.rubrics import check_feedback, of_source
from actors.data.scaffold import Scaffold
from actors.data.schemas import Row
from actors.data.screen import Screen
from actors.data.sources import Rows, load_rows, together
from actors.verifiers.registry import reference_checks
from common.config.algorithm import AdvantageConfig
from common.config.environment import ENVIRONMENT_RULE
from common.config.follow_up import FollowUpConfig
from common.config.scaffold import ScaffoldConfig
from common.config.sections import Config, DataConfig, PromptOrder, VerifierSpec
from common.errors import UserError
from common.trajectory import Behind


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
        scaffold: Scaffold | None = None,
    ) -> None:
        """`weights`: of several data sets by name, in the order in which their rows stand.

        Args:
            contexts: makes what a scorer reads; None where it reads the prompts.
            follow_ups: makes what later completions of a group are sampled behind; None where that
                is the prompts.
            scaffold: makes what each completion of a group is sampled behind; None likewise.
        """
        self.rows, self._scaffold = rows, scaffold
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

    def behind(self, prompt: Prompt, version: int, group_size: int) -> tuple[Behind, ...]:
        """What each completion of a group is sampled behind; empty where that is the prompt.

        Args:
            version: of the weights that sample.
        """
        if self._scaffold is None:
            return ()
        row = self._rows[prompt.index]
        return self._scaffold.behind(row, prompt.ticket, version, group_size)

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
    scaffold: ScaffoldConfig | None = None,
    steps: int = 1,
) -> PromptSource:
    """The prompts of a run, every one checked against `max_prompt_tokens` and by `rules`: an answer
    that a rule would not accept when it is given back goes to quarantine.

    Args:
        tools: JSON schemas of the tools that prompts tell the policy of.
        scorer: says what a scorer reads; None: there is no scorer.
        follow_up: says what later completions are sampled behind; None: there are none. A row of
            which that does not fit goes to quarantine as well, unless it is held out.
        draft_tokens: the most that a draft has.
        scaffold: says what completions are sampled behind; None: the prompts. As for `follow_up`.
        steps: those of the run, over which a scaffold decays.

    Raises: `UserError` for anything wrong with the data or the template.
    """
    template = Template(config, tokenizer, tools)
    quarantine = Quarantine(config.max_bad_rows)
    names = [one.name for one in config.each]
    follow_ups = _follow_ups(template, follow_up, rules, names)
    made = Scaffold.of(template, scaffold, rules, seed, steps, names)
    room = {"draft": draft_tokens, "feedback": follow_up.feedback_tokens if follow_up else 0}
    each: dict[str, Rows] = {}
    lengths: dict[str, int] = {}
    for one, held_out in zip(config.each, config.held_out(eval_prompts), strict=True):
        own = of_source(rules, one.name)
        others = _longest(follow_ups, room, made, own)
        screen = Screen(template, max_prompt_tokens, quarantine, others)
        each[one.name] = load_rows(
            *(one, held_out, seed, quarantine, reference_checks(own), screen),
            to_train=screen.to_train,
            answerless=bool(own) and all(rule.name == ENVIRONMENT_RULE for rule in own),
        )
        lengths |= screen.lengths
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
        rows, template, seed, config.order, quarantine, weights, contexts, follow_ups, made
    )
    source.lengths = [lengths[row.place] for row in rows.train]
    return source


def _longest(
    follow_ups: Contexts | None,
    room: Mapping[str, int],
    scaffold: Scaffold | None,
    rules: Sequence[VerifierSpec],
) -> dict[str, Callable[[Row], int]]:
    """What gives the tokens of the longest other prompt of a row, by the key that asks for it."""
    found: dict[str, Callable[[Row], int]] = {}
    if follow_ups is not None:
        found["algorithm.rollout.follow_up"] = partial(follow_ups.longest, room=room)
    if scaffold is not None:
        found["algorithm.rollout.scaffold"] = partial(scaffold.longest, rules=rules)
    return found


def _follow_ups(
    template: Template,
    config: FollowUpConfig | None,
    rules: Sequence[VerifierSpec],
    names: Sequence[str],
) -> Contexts | None:
    """What makes the prompts of later completions; None where they have the first ones'.

    Args:
        names: of the data sets.
    """
    if config is None or not config.text:
        return None
    if config.kind == "critique":
        check_feedback("algorithm.rollout.follow_up.kind=critique", rules, names)
    return Contexts.of_follow_up(template, config)


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
        config.algorithm.rollout.scaffold,
        config.steps,
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
