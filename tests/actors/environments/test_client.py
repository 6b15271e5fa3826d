"""Environments in a pool of actors: the same answers as a host's, and what a lost actor costs."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from near_actors import Near, NearHandle
from ray.exceptions import RayActorError, RayTaskError

from actors.environments import client as clients
from actors.environments.actor import EnvironmentActor
from actors.environments.base import Reply, ToolCall
from actors.environments.client import EnvironmentClient
from actors.environments.host import EnvironmentFailure, EnvironmentHost, Observation
from common.config.environment import EnvironmentConfig
from common.errors import RunError, UserError

GUESS = EnvironmentConfig(name="guess", placement="actors", workers=2, step_timeout_s=20.0)
TASK = {"answer": "5"}


@asynccontextmanager
async def pool(count: int = 2) -> AsyncIterator[tuple[EnvironmentClient, list[Near]]]:
    """A started client of plain actors, which play in real processes."""
    actors = [Near(EnvironmentActor(GUESS)) for _ in range(count)]
    client = EnvironmentClient(GUESS, "generator-0", [NearHandle(actor) for actor in actors])
    try:
        await client.start()
        yield client, actors
    finally:
        for actor in actors:
            await actor.plain.shutdown()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


async def played(host: Any, key: str) -> list[Any]:
    answers = [await host.reset(key, TASK, 7)]
    for guess in ("2", "no idea", "5"):
        answers.append(await host.step(key, Reply(guess)))
    host.close(key)
    return [
        (answer.text, answer.reward, answer.done, answer.state)
        for answer in answers
        if isinstance(answer, Observation)
    ]


def test_a_pool_answers_as_a_host_does() -> None:
    async def test() -> None:
        host = EnvironmentHost(EnvironmentConfig(name="guess"))
        await host.start()
        alone = await played(host, "a")
        await host.shutdown()
        async with pool() as (client, _):
            assert client.tools == []
            assert await played(client, "a") == alone
            assert len(alone) == 4

    run(test)


def test_episodes_go_where_there_are_fewest_and_stay_there() -> None:
    async def test() -> None:
        async with pool() as (client, actors):
            for key in ("a", "b", "c", "d"):
                await client.reset(key, TASK, 0)
            assert [await each.plain.open_episodes() for each in actors] == [2, 2]
            assert (await client.step("a", Reply("1"))).state == "1..8"
            assert (await client.step("a", Reply("2"))).state == "2..8"
            assert (await client.reward("b", "")).reward == 0.0
            for key in ("a", "b", "c", "d"):
                client.close(key)
                client.close(key)
            await asyncio.sleep(0)
            assert [await each.plain.open_episodes() for each in actors] == [0, 0]
            gone = await client.step("a", Reply("1"))
            assert isinstance(gone, EnvironmentFailure)
            assert "episode a is not there" in gone.reason

    run(test)


def test_an_actor_that_dies_ends_its_episodes_and_new_ones_go_to_another() -> None:
    async def test() -> None:
        async with pool() as (client, actors):
            await client.reset("a", TASK, 0)
            await client.reset("b", TASK, 0)
            actors[0].fails["step"] = RayActorError()
            lost = await client.step("a", Reply("1"))
            assert isinstance(lost, EnvironmentFailure)
            assert (lost.kind, lost.reason.split(":")[0]) == ("error", "step")
            assert "actor 0 of the environments died" in lost.reason
            assert isinstance(await client.step("b", Reply("1")), Observation)
            actors[0].asked.clear()
            for key in ("c", "d"):
                assert isinstance(await client.reset(key, TASK, 0), Observation)
            assert actors[0].asked == []

    run(test)


def test_a_reset_waits_for_an_actor_that_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_PAUSE_S", 0.01)

    async def test() -> None:
        async with pool(1) as (client, (actor,)):
            actor.fails["reset"] = RayActorError()
            begun = asyncio.ensure_future(client.reset("a", TASK, 0))
            await asyncio.sleep(0.1)
            assert not begun.done()
            del actor.fails["reset"]
            assert isinstance(await begun, Observation)
            assert actor.asked.count("reset") > 2
            actor.fails["reset"] = RayActorError()
            client._back_s = 0.05
            lost = await client.reset("b", TASK, 0)
            assert isinstance(lost, EnvironmentFailure)
            assert "reset: actor 0 of the environments died" in lost.reason

    run(test)


def test_an_actor_without_a_sign_of_life_is_killed_and_starts_again() -> None:
    async def test() -> None:
        async with pool() as (client, actors):
            await client.reset("a", TASK, 0)
            actors[0].hangs |= {"step", "ping"}
            client._step_s = client._alive_s = 0.05
            late = await client.step("a", Reply("1"))
            assert isinstance(late, EnvironmentFailure)
            assert (late.kind, late.seconds) == ("timeout", 0.1)
            assert "gave no sign of life within 0.05 s" in late.reason
            assert actors[0].killed == [True]
            assert actors[1].killed == []

    run(test)


def test_an_actor_that_lives_is_waited_for() -> None:
    """Its host keeps the deadlines: many episodes may have to begin before this one."""

    async def test() -> None:
        async with pool(1) as (client, (actor,)):
            client._step_s = 0.001
            assert isinstance(await client.reset("a", TASK, 0), Observation)
            assert "ping" in actor.asked
            assert actor.killed == []

    run(test)


def test_a_generator_that_comes_back_closes_what_one_of_its_name_left_open() -> None:
    async def test() -> None:
        async with pool(1) as (client, (actor,)):
            other = EnvironmentClient(GUESS, "generator-1", [NearHandle(actor)])
            await other.start()
            await client.reset("a", TASK, 0)
            await other.reset("a", TASK, 0)
            assert await actor.plain.open_episodes() == 2
            again = EnvironmentClient(GUESS, "generator-0", [NearHandle(actor)])
            await again.start()
            assert await actor.plain.open_episodes() == 1
            assert isinstance(await other.step("a", Reply("1")), Observation)
            await other.shutdown()
            await asyncio.sleep(0)
            assert await actor.plain.open_episodes() == 0

    run(test)


def test_an_episode_that_is_closed_before_it_has_begun_is_not_left_open() -> None:
    async def test() -> None:
        async with pool(1) as (client, (actor,)):
            begun = asyncio.ensure_future(client.reset("a", TASK, 0))
            await asyncio.sleep(0)  # the call is under way
            client.close("a")
            closed = await begun
            assert isinstance(closed, EnvironmentFailure)
            assert "was closed" in closed.reason
            assert await actor.plain.open_episodes() == 0

    run(test)


@pytest.mark.parametrize(
    ("raised", "expected", "says"),
    [
        (RayTaskError("begin", "", UserError("there is no such game")), UserError, "no such game"),
        (RayActorError(), RunError, "died while it started"),
    ],
)
def test_a_pool_that_cannot_start_says_why(
    raised: BaseException, expected: type[BaseException], says: str
) -> None:
    async def test() -> None:
        actor = Near(EnvironmentActor(GUESS))
        actor.fails["begin"] = raised
        client = EnvironmentClient(GUESS, "generator-0", [NearHandle(actor)])
        with pytest.raises(expected, match=says):
            await client.start()

    run(test)


def test_an_actor_without_its_host_has_no_episodes() -> None:
    """As after a restart: what was played in it is gone, and the next episode starts a host."""

    async def test() -> None:
        actor = EnvironmentActor(GUESS)
        for gone in (await actor.step("a", Reply("1")), await actor.reward("a", "")):
            assert isinstance(gone, EnvironmentFailure)
            assert "ended with the actor" in gone.reason
        wrong = EnvironmentActor(EnvironmentConfig(name="nowhere:Game"))
        refused = await wrong.reset("a", TASK, 0)
        assert isinstance(refused, EnvironmentFailure)
        assert "nowhere" in refused.reason

    run(test)


def test_what_travels_to_an_actor_arrives_whole() -> None:
    reply = pickle.loads(pickle.dumps(Reply("2 * 3", [ToolCall("times", {"a": 2}, "late")])))
    assert (reply, reply.calls) == ("2 * 3", (ToolCall("times", {"a": 2}, "late"),))
