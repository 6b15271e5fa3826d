"""Hosts of real environment processes, for tests that ask them one thing after another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from actors.environments.base import Reply
from actors.environments.host import Answer, EnvironmentHost
from common.config.environment import EnvironmentConfig

T = TypeVar("T")


class Played:
    """A host and its event loop, which runs while something is asked."""

    def __init__(self, runner: asyncio.Runner, host: EnvironmentHost) -> None:
        self._runner, self.host = runner, host
        self._begun = 0

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    def begin(self, task: Mapping[str, Any] | None = None, seed: int = 0) -> tuple[str, Answer]:
        """A new episode: its key, and what its reset gave."""
        self._begun += 1
        key = f"episode-{self._begun}"
        return key, self.wait(self.host.reset(key, task or {}, seed))

    def step(self, key: str, reply: str | Reply = "") -> Answer:
        return self.wait(self.host.step(key, reply if isinstance(reply, Reply) else Reply(reply)))

    def reward(self, key: str, reply: str = "") -> Answer:
        return self.wait(self.host.reward(key, reply))

    def close(self, key: str) -> None:
        async def closed() -> None:
            self.host.close(key)

        self.wait(closed())

    def rest(self, seconds: float) -> None:
        """Let the loop run, as a busy actor's does."""
        self.wait(asyncio.sleep(seconds))


@contextmanager
def playing(name: str, args: dict[str, Any] | None = None, **settings: Any) -> Iterator[Played]:
    """A started host of the environment `name`."""
    config = EnvironmentConfig(name=name, args=args or {}, **settings)
    with asyncio.Runner() as runner:
        played = Played(runner, runner.run(_made(config)))
        try:
            yield played
        finally:
            runner.run(played.host.shutdown())


async def _made(config: EnvironmentConfig) -> EnvironmentHost:
    host = EnvironmentHost(config)
    try:
        await host.start()
    except BaseException:
        await host.shutdown()
        raise
    return host
