"""Whether an environment says again what it said in an episode on record.

An episode that goes on from a record (`common.trajectory.Begun`) is worth something only where it
is in the same place. So what the environment says there is compared, token by token.
"""

from __future__ import annotations

from typing import Any, Protocol

from common.errors import UserError
from common.trajectory import Begun

_ADVICE = (
    "An episode can be gone on with only in an environment that does the same again for a task, a "
    "seed and what the policy said: have it draw from the seed that reset is given, and look at no "
    "clock"
)


class Decodes(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any: ...


def check_repeats(begun: Begun, turn: int, token_ids: list[int], tokenizer: Decodes) -> None:
    """Compare the tokens before turn `turn`, from 0, with those on record.

    Args:
        token_ids: all of the episode so far. The turns in it are those on record.

    Raises:
        UserError: the environment said something else.
    """
    before = begun.turns[turn - 1][1] if turn else 0
    recorded, found = list(begun.token_ids[before : begun.turns[turn][0]]), token_ids[before:]
    if recorded != found:
        recorded_text, text = (
            repr(tokenizer.decode(ids, skip_special_tokens=False)) for ids in (recorded, found)
        )
        raise UserError(
            f"the environment does not repeat itself: {_behind(turn)} it gave the policy {text}, "
            f"and {recorded_text} is on record. {_ADVICE}"
        )


def check_reached(begun: Begun, turns: int) -> None:
    """Raise `UserError` where an episode ended behind `turns` turns, before the record does."""
    if turns < len(begun.turns):
        raise UserError(
            f"the environment does not repeat itself: the episode ended {_behind(turns)}, and "
            f"{len(begun.turns)} turns are on record. {_ADVICE}"
        )


def _behind(turns: int) -> str:
    return f"behind turn {turns}" if turns else "at the beginning"
