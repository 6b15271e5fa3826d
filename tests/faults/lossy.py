"""`grpo-lambda` with a coordinator whose messages get lost or come late.

    python tests/faults/lossy.py '{"lose": ["learner step"], "late_s": 0.3}' train ...

`lose`: one after the other, an answer to a wait whose owner and cause contain this. The actor did
what it was asked; the coordinator never hears of it. The deadline of a lost answer is two seconds,
because it is what follows that matters. Before the next is lost that deadline has passed, and two
learner steps are done.
`late_s`: every answer comes up to so many seconds late.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Awaitable
from typing import Any

from common.supervision.waits import Waits
from deploy.cli import main

_on = Waits.on
_MANY = 10**9


class Mail:
    """Decides what becomes of an answer."""

    def __init__(self, lose: list[str], late_s: float) -> None:
        self._lose = lose
        self._late_s = late_s
        self._draw = random.Random(0)
        self._steps = 0

    async def on(
        self, waits: Waits, awaitable: Awaitable[Any], owner: str, cause: str, deadline_s: float
    ) -> Any:
        answer = await _on(waits, awaitable, owner=owner, cause=cause, deadline_s=deadline_s)
        self._steps += owner == "learner step"
        if self._lose and self._steps >= 2 and self._lose[0] in f"{owner}: {cause}":
            print("lost:", self._lose.pop(0), flush=True)
            self._steps = -_MANY  # what is written beside the steps is missed while they go on
            try:
                await _on(waits, asyncio.Event().wait(), owner=owner, cause=cause, deadline_s=2.0)
            finally:
                self._steps = 0
        await asyncio.sleep(self._late_s * self._draw.random())
        return answer


def install(mail: Mail) -> None:
    async def on(waits: Waits, awaitable: Any, *, owner: str, cause: str, deadline_s: float) -> Any:
        return await mail.on(waits, awaitable, owner, cause, deadline_s)

    Waits.on = on  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Mail(**{"lose": [], "late_s": 0.0, **json.loads(sys.argv[1])}))
    sys.exit(main(sys.argv[2:]))
