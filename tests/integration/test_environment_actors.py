"""Environments in Ray's actors: one is killed while episodes are played."""

from __future__ import annotations

import asyncio

import pytest

from actors.environments.actor import EnvironmentActor
from actors.environments.base import Reply
from actors.environments.client import EnvironmentClient
from actors.environments.host import EnvironmentFailure, Observation
from common.config.environment import EnvironmentConfig
from common.supervision.calls import start_actor

OPTIONS = {"num_cpus": 0, "max_concurrency": 100, "max_restarts": -1}


@pytest.mark.usefixtures("local_ray")
def test_a_killed_actor_ends_its_episodes_and_comes_back() -> None:
    config = EnvironmentConfig(name="guess", placement="actors", workers=2)

    async def main() -> None:
        actors = [start_actor(EnvironmentActor, OPTIONS, config) for _ in range(2)]
        client = EnvironmentClient(config, "generator-0", actors)
        await client.start()
        for key in ("a", "b"):
            assert isinstance(await client.reset(key, {"answer": "5"}, 0), Observation)
        actors[0].kill(again=True)
        assert (await _lost(client, "a")).kind == "error"
        assert isinstance(await client.step("b", Reply("1")), Observation)
        actors[1].kill(again=True)  # there may be none, until Ray has started one again
        assert (await _lost(client, "b")).kind == "error"
        assert isinstance(await client.reset("c", {"answer": "5"}, 0), Observation)
        found = await client.step("c", Reply("5"))
        assert isinstance(found, Observation)
        assert found.done
        assert found.reward == 1.0
        for actor in actors:
            actor.kill()

    asyncio.run(main())


async def _lost(client: EnvironmentClient, key: str) -> EnvironmentFailure:
    """What an episode says whose actor is killed. Ray kills some moments after it was asked to."""
    async with asyncio.timeout(60):
        while isinstance(answer := await client.step(key, Reply("1")), Observation):
            await asyncio.sleep(0.05)
    return answer
