"""The tools of an MCP server (Model Context Protocol), as an environment.

The server is a command that speaks the protocol over its standard input and output. Every episode
starts one, behind the same walls as the episode; it ends with it. `verifier.rules` judge the
episode.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import PaginatedRequestParams

from actors.environments.tools import ToolEnvironment


class McpTools(ToolEnvironment):
    """Offers what a server offers."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        """Keep the command; `reset` starts it.

        Args:
            command: its words; `python` is the interpreter of the run.
            environment: variables of the server, on top of a few usual ones.
        """
        if not command:
            raise ValueError("command is empty: give the words of the server's command line")
        imports = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        self._server = StdioServerParameters(
            command=sys.executable if command[0] == "python" else command[0],
            args=list(command[1:]),
            env={**imports, **(environment or {})},
        )
        self._ended = asyncio.Event()

    async def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self.task = task
        await self._connect()
        return ""

    async def tools(self) -> list[dict[str, Any]]:
        await self._connect()
        found, cursor = [], None
        while True:
            page = await self._session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                break
        await self.close()
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in found
        ]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        result = await self._session.call_tool(name, dict(arguments))
        text = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
        if result.is_error:
            raise ValueError(text)
        return text

    async def close(self) -> None:
        self._ended.set()
        await self._serving

    async def _connect(self) -> None:
        """Start the server, and talk to it from a task of its own: what is opened there has to be
        closed there."""
        ready: asyncio.Future[ClientSession] = asyncio.get_running_loop().create_future()
        self._ended.clear()
        self._serving = asyncio.create_task(self._serve(ready))
        await asyncio.wait((ready, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await self._serving  # raises why the server did not come up
        self._session = ready.result()

    async def _serve(self, ready: asyncio.Future[ClientSession]) -> None:
        async with (
            stdio_client(self._server) as (answers, requests),
            ClientSession(answers, requests) as session,
        ):
            await session.initialize()
            ready.set_result(session)
            await self._ended.wait()
