"""Runs commands of somebody else's, each behind walls and at an address of its own.

The process that keeps a command (`actors.endpoint.keeper`) has a network of its own, in which the
endpoint listens on loopback, and nothing else does. Where this host can give it none,
`environment.network=true` lets commands into the host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from actors.endpoint.keeper import MAX_MESSAGE_BYTES
from actors.sandbox.process import WalledProcess
from actors.sandbox.walls import command_paths, find_walls, links
from common.config.environment import EnvironmentConfig
from common.errors import RunError, UserError

START_S, _END_S = 60.0, 5.0
_KEPT_BYTES = 2**16
"""What is kept of what a command prints: the end."""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class Command:
    """What `environment.command` names, found on this machine."""

    def __init__(self, config: EnvironmentConfig) -> None:
        """Look for the program.

        Raises: `UserError` where it is not there.
        """
        assert config.command is not None
        name, *rest = config.command
        found = sys.executable if name == "python" else shutil.which(_located(name))
        if found is None:
            raise UserError(
                f"environment.command: there is no program {name!r} on PATH of this machine: give "
                "its whole path"
            )
        self._config = config
        self.words = [os.path.abspath(found), *map(_located, rest)]
        own = [path for word in self.words for path in _paths_of(word)]
        wished = [str(Path(path).expanduser().resolve()) for path in config.readable]
        self._readable = command_paths([*own, *wished])

    async def start(self, key: str, task: Mapping[str, Any]) -> CommandRun:
        """Start it.

        Args:
            key: of its session.
            task: what it reads from its standard input.

        Raises: `RunError` when it does not start; `UserError` where this host has no network to
            give it.
        """
        run = CommandRun()
        settings = {
            "command": self.words,
            "key": key,
            "cpu_s": 2 * self._config.episode_timeout_s + 5,
            "memory_bytes": int(self._config.memory_gib * 2**30),
            "variables": {n: os.environ[n] for n in _PASSED_ON if n in os.environ},
        }
        data = json.dumps(task, ensure_ascii=False).encode() + b"\n"
        await self._launched(run, settings, data)
        await run.listen()
        return run

    async def check(self) -> None:
        """Try the walls. Raises: as `start`."""
        run = CommandRun()
        await self._launched(run, {"command": [], "key": ""}, b"")
        await run.end()

    async def _launched(self, run: CommandRun, settings: dict[str, Any], data: bytes) -> None:
        launching = asyncio.ensure_future(
            asyncio.to_thread(run.launch, settings, data, self._readable, self._config)
        )
        try:
            await asyncio.shield(launching)
        except BaseException:  # cancelled, too: a thread goes on, and what it has started is ended
            await asyncio.wait([launching])
            await run.end()
            raise


class CommandRun:
    """One run of a command."""

    def __init__(self) -> None:
        self._process: WalledProcess | None = None
        self._control: socket.socket | None = None
        self._pipes: list[IO[bytes]] = []
        self._reading: list[asyncio.Task[bytes]] = []
        self.listener: socket.socket | None = None
        """Where its endpoint listens."""

    def launch(
        self,
        settings: dict[str, Any],
        data: bytes,
        readable: Sequence[str],
        config: EnvironmentConfig,
    ) -> None:
        """Start the keeper and have its listener. May take seconds: it is for a thread."""
        walls = find_walls()
        apart = not config.network
        settings["confined"] = apart
        settings["leave_network"] = apart and walls.bubblewrap is None
        self._control, keepers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        task = os.memfd_create("task")
        with os.fdopen(task, "wb") as given, keepers_end, contextlib.ExitStack() as theirs:
            given.write(data)
            given.seek(0)
            streams = [task]
            for _ in ("standard output", "standard error"):
                ours, written = os.pipe()
                self._pipes.append(os.fdopen(ours, "rb", buffering=0))
                theirs.callback(os.close, written)
                streams.append(written)
            kept = [keepers_end.fileno(), *streams]
            self._process = WalledProcess(
                walls,
                "actors.endpoint.keeper",
                *map(str, kept),
                readable=readable,
                kept=kept,
                network=config.network,
            )
        self._control.settimeout(START_S)
        self._control.send(json.dumps(settings).encode())
        try:
            message, handed, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        except TimeoutError as error:
            raise RunError(f"a command's keeper did not start within {START_S:.0f} s") from error
        told = json.loads(message or b"{}")
        if "failure" in told:
            raise UserError(
                "a command cannot be given a network of its own here, with the endpoint alone in "
                f"it ({told['failure']}): run as root, install bubblewrap, or allow namespaces of "
                "users; or, if you trust it, set environment.network=true"
            )
        if not handed:
            raise RunError(f"a command's keeper ended: {self._process.death(1.0)}")
        self.listener = socket.socket(fileno=handed[0])
        self._control.setblocking(False)

    async def listen(self) -> None:
        """Read what the command prints, from now on."""
        self._reading = [asyncio.create_task(_tail(pipe)) for pipe in self._pipes]
        self._pipes = []  # they belong to who reads them

    async def ended(self) -> str:
        """How the command ended, once it has."""
        assert self._control is not None
        message = await asyncio.get_running_loop().sock_recv(self._control, MAX_MESSAGE_BYTES)
        return str(json.loads(message)["ended"]) if message else "its keeper was killed"

    async def end(self) -> tuple[str, str]:
        """End it with all that it started; returns the ends of its output and of its errors."""
        if self._control is not None:
            with contextlib.suppress(OSError, TimeoutError):
                self._control.send(b'{"end": true}')
                async with asyncio.timeout(_END_S):
                    await self.ended()
            self._control.close()
            self._control = None
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(process.kill)
        for pipe in self._pipes:
            pipe.close()
        for task in self._reading:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(task, _END_S)
        done = [task.result() if not task.cancelled() else b"" for task in self._reading]
        texts = [part.decode(errors="replace") for part in done]
        return (texts[0], texts[1]) if texts else ("", "")


async def _tail(pipe: IO[bytes]) -> bytes:
    """The end of what comes through a pipe, until all that could write into it have ended."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_KEPT_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    kept = b""
    try:
        while part := await reader.read(_KEPT_BYTES):
            kept = (kept + part)[-_KEPT_BYTES:]
    finally:
        transport.close()
    return kept


def _located(word: str) -> str:
    """A word that names a file here, or where modules are looked for, as the file's whole path.

    Links stay: an interpreter finds its environment by the link to it.
    """
    places = (Path(folder, word) for folder in ("", *sys.path))
    return next((str(place.absolute()) for place in places if place.is_file()), word)


def _paths_of(word: str) -> list[str]:
    """What a word of a command is, and the Python environment that it belongs to, if it is one."""
    if not os.path.isfile(word):
        return []
    found = [*links(word), os.path.realpath(word)]
    folder = Path(word).parent.parent
    config = folder / "pyvenv.cfg"
    if config.is_file():
        found.append(str(folder))
        for line in config.read_text().splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "home":
                found.append(str(Path(value.strip()).resolve().parent))
    return found
