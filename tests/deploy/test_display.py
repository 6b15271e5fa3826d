"""The live table shows what it is given, whatever brackets are in it."""

from __future__ import annotations

import asyncio
import io

from rich.console import Console

from common.supervision.waits import Waits
from deploy.run.display import LiveDisplay

ODD = "row 3: found a list: ['[/INST]'] in /data/[exp]/step-3 [bold]"


def test_brackets_are_shown_and_not_obeyed() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    waits = Waits()

    async def shown() -> None:
        waiting = asyncio.ensure_future(
            waits.on(asyncio.Event().wait(), owner="[/a]", cause=ODD, deadline_s=60.0)
        )
        await asyncio.sleep(0)
        with LiveDisplay(console, 3, waits) as display:
            display.follow(lambda: f"status {ODD}")
            display.event(ODD)
        waiting.cancel()

    asyncio.run(shown())
    text = console.file.getvalue()
    assert text.count(ODD) >= 3  # the event, the title and a cell
    assert "[/a]" in text
