"""Actors as plain objects in the test's own loop, behind handles like Ray's."""

from __future__ import annotations

import asyncio
from typing import Any

from common.supervision.calls import Handle


class _Method:
    def __init__(self, actor: Near, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._actor.answer(self._name, args, kwargs))


class Near:
    """An object behind a handle. `fails` and `hangs` name methods that do not answer."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.fails: dict[str, BaseException] = {}
        self.hangs: set[str] = set()
        self.asked: list[str] = []
        self.killed: list[bool] = []
        """One a kill: whether it is to start again."""

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    async def answer(self, name: str, args: Any, kwargs: Any) -> Any:
        self.asked.append(name)
        if name in self.fails:
            raise self.fails[name]
        if name in self.hangs:
            await asyncio.Event().wait()
        return await getattr(self.plain, name)(*args, **kwargs)


class NearHandle(Handle[Any]):
    """A handle whose actor is `Near`."""

    def kill(self, *, again: bool = False) -> None:
        self.actor.killed.append(again)
