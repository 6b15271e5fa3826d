"""Which rows a prompt can be made of that leaves room for a completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from actors.data.chat import Template
from actors.data.quarantine import Quarantine
from actors.data.schemas import Row
from common.errors import UserError

_CHECK_BATCH = 512


class Screen:
    """Lets the rows through that a prompt can be made of; `lengths` has their tokens by place.

    A row that is trained on may have other prompts beside its own, which have to fit as well
    (`to_train`). A row held out is asked once, behind its own.
    """

    def __init__(
        self,
        template: Template,
        limit: int,
        quarantine: Quarantine,
        others: Mapping[str, Callable[[Row], int]],
    ) -> None:
        """`others`: the longest other prompt that a row has in training, in tokens, by its key."""
        self._template, self._limit, self._quarantine = template, limit, quarantine
        self._others = others
        self.lengths: dict[str, int] = {}

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows whose own prompt fits; all others go to quarantine.

        Raises: `UserError` when the template leaves out what a row says.
        """
        for start in range(0, len(rows), _CHECK_BATCH):
            some = rows[start : start + _CHECK_BATCH]
            for row in some:
                if row.messages:
                    self._template.check_turns(row.conversation, row.place)
            token_ids = self._template.encode_asked([row.conversation for row in some])
            for row, ids in zip(some, token_ids, strict=True):
                self._note(row, len(ids))
        return [row for row in rows if row.place in self.lengths]

    def to_train(self, rows: list[Row]) -> list[Row]:
        """Keep the rows whose other prompts fit too; all others go to quarantine."""
        return [row for row in rows if self._others_fit(row)]

    def _note(self, row: Row, length: int) -> None:
        if 0 < length <= self._limit:
            self.lengths[row.place] = length
        else:
            self._refuse(row, length, f"the prompt has {length} tokens")

    def _others_fit(self, row: Row) -> bool:
        for key, longest in self._others.items():
            if (tokens := longest(row)) > self._limit:
                self._refuse(row, tokens, f"a prompt of {key} may have {tokens} tokens")
                return False
        return True

    def _refuse(self, row: Row, length: int, said: str) -> None:
        error = UserError(
            f"{row.place}: {said} and at most {self._limit} fit "
            "(model.max_length less generator.max_completion_tokens): raise "
            "model.max_length, lower generator.max_completion_tokens, or drop the row"
            if length
            else f"{row.place}: the prompt has no tokens"
        )
        self._quarantine.add(row.place, error, row.question)
