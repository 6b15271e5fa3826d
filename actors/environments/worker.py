"""One worker process as its host holds it, and the episodes that play in it.

Both belong to one event loop. `EnvironmentWorker.open` gives an `Episode`, to which the host talks
over a socket of its own (`actors.environments.wire`).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from actors.environments.child import MAX_CONTROL_BYTES
from actors.environments.wire import LENGTH, frame
from actors.sandbox.process import WalledProcess
from actors.sandbox.walls import Walls, find_walls, rule_paths
from common.errors import RunError, UserError

START_TIMEOUT_S = 120.0


def _gaps(walls: Walls) -> list[str]:
    """How a program that the policy writes could reach what only its environment may know.

    The program shares the walls of its environment, and has Landlock alone between them.
    """
    open_files = ["files that the environment may read (this needs a kernel with Landlock)"]
    return walls.gaps() or ([] if walls.landlock else open_files)


class EndedError(Exception):
    """The process of an episode, or of its worker, has ended; the message says how."""


class NonsenseError(Exception):
    """An episode's process sent what is no answer."""


class Episode:
    """The process of one episode."""

    def __init__(self, key: str, worker: EnvironmentWorker, most_bytes: int) -> None:
        self.key = key
        self.worker = worker
        self.began = False
        """Whether its process is known to be there."""
        self.spent_s = 0.0
        """Seconds that its answers have taken."""
        self._most_bytes = most_bytes
        self._asked = 0
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def connect(self, end: socket.socket) -> None:
        """Talk over `end` from now on."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=end)

    def has_ended(self, how: str) -> None:
        """Take note of it: whoever waits for an answer is told."""
        if not self._ended.done():
            self._ended.set_result(how)

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Raises:
            EndedError: there will be none.
            NonsenseError: what came is none.
        """
        self._asked += 1
        answer = asyncio.ensure_future(self._exchange({**message, "number": self._asked}))
        try:
            await asyncio.wait((answer, self._ended), return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and not isinstance(answer.exception(), OSError | EOFError):
                return answer.result()
            # The socket closes before the worker has waited for the process.
            how = await asyncio.shield(self._ended)
            raise EndedError(how)
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self._writer.write(frame(message))
        await self._writer.drain()
        (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if size > self._most_bytes:
            raise NonsenseError(f"a message of {size} bytes was announced")
        try:
            answer = json.loads(await self._reader.readexactly(size))
        except ValueError as error:
            raise NonsenseError("it sent something that is not JSON") from error
        if not isinstance(answer, dict) or answer.get("number") != message["number"]:
            raise NonsenseError("it sent an answer that nobody had asked for")
        return answer

    async def end(self, politely_s: float) -> None:
        """End the process; give it `politely_s` to close what it has opened."""
        try:
            if politely_s > 0 and not self._ended.done():
                async with asyncio.timeout(politely_s):
                    await self.ask({"verb": "close"})
        except (TimeoutError, EndedError, NonsenseError):
            pass  # it is killed in any case
        finally:
            self.worker.kill_episode(self.key)
            self._writer.close()


class EnvironmentWorker:
    """A child process behind walls that forks a process for every episode."""

    def __init__(self, settings: Mapping[str, Any], readable: Sequence[str]) -> None:
        """Keep the settings; `start` starts the process."""
        self._settings = dict(settings)
        self._readable = readable
        self._process: WalledProcess | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outbox: deque[tuple[bytes, socket.socket | None]] = deque()
        self.episodes: dict[str, Episode] = {}
        self.lost = ""
        """Why it cannot be used any more; empty while it can."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Return when it has imported the environment.

        Raises: `UserError` for an environment that cannot be used; `RunError` when it does not come
        up.
        """
        await asyncio.to_thread(self._launch)
        assert self._control is not None
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._hear)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready
        except TimeoutError as error:
            await self.close("it was not ready in time")
            raise RunError(
                f"the environment's process was not ready within {START_TIMEOUT_S:.0f} s: its "
                "module takes too long to import; let it load less, or later"
            ) from error
        except BaseException:
            await self.close("it did not start")
            raise

    def _launch(self) -> None:
        self._control, childs_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        walls = find_walls()
        with childs_end:
            self._process = WalledProcess(
                walls,
                "actors.environments.child",
                str(childs_end.fileno()),
                readable=rule_paths(self._readable),
                inherited=("HOME",),
                kept=[childs_end.fileno()],
                network=self._settings["network"],
            )
        self._control.setblocking(False)
        self._control.send(json.dumps({**self._settings, "gaps": _gaps(walls)}).encode())

    async def open(self, key: str, most_bytes: int) -> Episode:
        """Have a process forked for the episode `key`.

        Raises: `EndedError` when this worker is lost.
        """
        episode = Episode(key, self, most_bytes)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.episodes[key] = episode
        self._tell({"open": key}, theirs)
        if self.lost:
            ours.close()
            raise EndedError(self.lost)
        await episode.connect(ours)
        return episode

    def kill_episode(self, key: str) -> None:
        """Have the episode's process ended, if it is there."""
        if self.episodes.pop(key, None) is not None:
            self._tell({"kill": key})

    async def close(self, why: str = "it was closed") -> None:
        """End the worker and every episode in it."""
        self._lose(why)
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(process.kill)

    def _tell(self, message: Mapping[str, str], handed: socket.socket | None = None) -> None:
        """Send a message, and a socket that is the worker's from now on."""
        self._outbox.append((json.dumps(message).encode(), handed))
        if self._control is None:
            self._drop()
        else:
            self._send()

    def _send(self) -> None:
        """Send what waits. What does not fit is sent when a busy worker has listened: who waits
        for it has a deadline."""
        assert self._control is not None
        while self._outbox:
            data, handed = self._outbox[0]
            try:
                socket.send_fds(self._control, [data], [handed.fileno()] if handed else [])
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(self._control.fileno(), self._send)
                return
            except OSError as error:
                self._lose(f"its worker does not listen ({error})")
                return
            if handed is not None:
                handed.close()
            self._outbox.popleft()
        asyncio.get_running_loop().remove_writer(self._control.fileno())

    def _drop(self) -> None:
        """Nobody will read what waits."""
        while self._outbox:
            _, handed = self._outbox.popleft()
            if handed is not None:
                handed.close()

    def _hear(self) -> None:
        assert self._control is not None
        try:
            data = self._control.recv(MAX_CONTROL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        message = json.loads(data) if data else None
        match message:
            case None:
                how = "" if self._process is None else self._process.death(0)
                self._lose(f"its worker ended: {how}")
            case {"ready": _} if not self._ready.done():
                self._ready.set_result(None)
            case {"failure": str(reason)} if not self._ready.done():
                self._ready.set_exception(UserError(reason))
            case {"began": str(key)} if key in self.episodes:
                self.episodes[key].began = True
            case {"ended": str(key), "how": str(how)} if key in self.episodes:
                self.episodes.pop(key).has_ended(how)

    def _lose(self, why: str) -> None:
        """Nobody can be reached any more: every episode in it has ended."""
        if self.lost:
            return
        self.lost = why
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            asyncio.get_running_loop().remove_writer(self._control.fileno())
            self._control.close()
            self._control = None
        self._drop()
        for episode in self.episodes.values():
            episode.has_ended(why)
        self.episodes.clear()
        if not self._ready.done():
            self._ready.set_exception(RunError(f"the environment's process did not start: {why}"))
