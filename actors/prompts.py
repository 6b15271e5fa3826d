"""An endless, resumable stream of prompts.

`build_prompt_source` loads and checks the data; `PromptSource` serves them epoch after epoch. The
cursor is small: the order of an epoch is a function of (seed, epoch), so an epoch, an offset and
the prompts that must be served again say everything.

    next():       returned prompts, oldest first; else the next of the epoch's order
    give_back():  a prompt whose group was dropped joins the returned ones
    state_dict(): the cursor; prompts outstanding (served, neither trained nor given back) are
                  recorded as returned, and so are served again after a resume
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.chat import Template, Tokenizer
from actors.data_sources import Row, Rows, load_rows
from common.config import DataConfig, PromptOrder
from common.errors import UserError

_CHECK_BATCH = 512


@dataclass(frozen=True)
class Prompt:
    """A question as a generator takes it.

    `prompt_id` is the same in every epoch and run over the same data. `reference` is a JSON
    object with what the verifiers need: `prompt` (the question alone), `answer`, and for
    reasoning-gym `task`, `params` and `entry`.
    """

    prompt_id: str
    index: int
    epoch: int
    text: str
    token_ids: list[int]
    reference: str
    solution: str | None
    difficulty: float | None


class PromptSource:
    """Serves the training rows once an epoch, in an order of its own each epoch.

    Attributes: `size`, training prompts an epoch; `removed`, training rows left out because
    their question is held out.
    """

    def __init__(
        self, rows: Rows, template: Template, seed: int, order: PromptOrder = "shuffle"
    ) -> None:
        self._rows, self._held_out = rows.train, rows.held_out
        self._template = template
        self._seed, self._how = seed, order
        self._returned: deque[tuple[int, int]] = deque()
        self._identity = _identity(rows.train, seed, order)
        self.size = len(rows.train)
        self.removed = rows.removed
        self._seek(epoch=0, offset=0)

    def next(self) -> Prompt:
        """The next prompt; there always is one."""
        if self._returned:
            epoch, index = self._returned.popleft()
            return self._make(self._rows[index], index, epoch)
        if self._offset == self.size:
            self._seek(self._epoch + 1, 0)
        index = self._order[self._offset]
        self._offset += 1
        return self._make(self._rows[index], index, self._epoch)

    def encode(self, solution: str) -> list[int]:
        """Token ids of a reference solution."""
        return self._template.encode_solution(solution)

    def give_back(self, prompt: Prompt) -> None:
        """Serve `prompt` again, before new ones.

        Raises: `ValueError` when it is already waiting, or has not been served.
        """
        place = (prompt.epoch, prompt.index)
        if place in self._returned or not self._was_served(*place):
            raise ValueError(f"prompt {prompt.prompt_id} of epoch {prompt.epoch} is not out")
        self._returned.append(place)

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, always the same; epoch is -1.

        Raises: `ValueError` when fewer are held out.
        """
        if count > len(self._held_out):
            raise ValueError(f"{count} evaluation prompts wanted, {len(self._held_out)} held out")
        return [self._make(row, i, -1) for i, row in enumerate(self._held_out[:count])]

    def state_dict(self, outstanding: Sequence[Prompt] = ()) -> dict[str, Any]:
        """The cursor in JSON values. `outstanding` prompts are served again after a resume.

        Raises: `ValueError` when one of them is listed twice or was given back.
        """
        again = [(prompt.epoch, prompt.index) for prompt in outstanding]
        returned = [*again, *self._returned]
        if len(set(returned)) < len(returned):
            raise ValueError("a prompt is outstanding twice, or outstanding and given back")
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "returned": [list(place) for place in returned],
            "identity": self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises: `UserError` when the training data, their split, order or seed are others.
        """
        if state["identity"] != self._identity:
            raise UserError(
                "the training prompts are not those of the checkpoint "
                f"(now {self._identity}, then {state['identity']}): resume with the same "
                "data, seed, data.order and eval.prompts, or start a new run"
            )
        self._seek(state["epoch"], state["offset"])
        self._returned = deque((epoch, index) for epoch, index in state["returned"])

    def _seek(self, epoch: int, offset: int) -> None:
        order = list(range(self.size))
        if self._how == "shuffle":
            # A string seed is hashed by SHA-512: near seeds and epochs give unrelated orders.
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        elif self._how == "curriculum":
            order.sort(key=lambda index: _difficulty(self._rows[index]))
        self._epoch, self._offset, self._order = epoch, offset, order

    def _was_served(self, epoch: int, index: int) -> bool:
        if epoch == self._epoch:
            return index in self._order[: self._offset]
        return 0 <= epoch < self._epoch

    def _make(self, row: Row, index: int, epoch: int) -> Prompt:
        text = self._template.render(row.question)
        return Prompt(
            prompt_id=f"{_digest(row.question)[:12]}-{index}",
            index=index,
            epoch=epoch,
            text=text,
            token_ids=self._template.encode([text])[0],
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
) -> PromptSource:
    """The prompts of a run, every one checked against `max_prompt_tokens`.

    Raises: `UserError` for anything wrong with the data or the template.
    """
    template = Template(config, tokenizer)
    rows = load_rows(config, eval_prompts, seed)
    _check_lengths([*rows.train, *rows.held_out], template, max_prompt_tokens)
    return PromptSource(rows, template, seed, config.order)


def _check_lengths(rows: Sequence[Row], template: Template, limit: int) -> None:
    for start in range(0, len(rows), _CHECK_BATCH):
        some = rows[start : start + _CHECK_BATCH]
        token_ids = template.encode([template.render(row.question) for row in some])
        for row, ids in zip(some, token_ids, strict=True):
            if len(ids) > limit:
                raise UserError(
                    f"{row.place}: the prompt has {len(ids)} tokens and at most {limit} fit "
                    "(model.max_length less generator.max_completion_tokens): raise "
                    "model.max_length, lower generator.max_completion_tokens, or drop the row"
                )
            if not ids:
                raise UserError(f"{row.place}: the prompt has no tokens")


def _difficulty(row: Row) -> float:
    if row.difficulty is None:
        raise UserError(
            f"{row.place} has no difficulty, and data.order=curriculum goes by it: set "
            "data.difficulty_column (data.source file or hub), or use another data.order"
        )
    return row.difficulty


def _identity(rows: Sequence[Row], seed: int, how: PromptOrder) -> str:
    """A digest of what an order of serving depends on."""
    content = "\0".join(row.question + "\0" + row.reference for row in rows)
    order = f"seed {seed}" if how == "shuffle" else how
    return f"{len(rows)} prompts, {order}, {_digest(content)[:16]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
