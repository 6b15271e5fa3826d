"""A small OpenEnv server, run by a Python that has openenv-core: `openenv_server.py PORT`."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Say(Action):
    message: str


class Heard(Observation):
    echoed_message: str


class Echo(Environment):
    """Says the seed, then counts what it hears, and gives the count as a reward."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **other: Any) -> Heard:
        self.count = 0
        return Heard(echoed_message=f"seed {seed}", done=False, reward=None)

    def step(self, action: Say, **other: Any) -> Heard:
        self.count += 1
        said = f"{self.count} {action.message}"
        return Heard(echoed_message=said, done=action.message == "bye", reward=float(self.count))

    @property
    def state(self) -> State:
        return State(step_count=self.count)


if __name__ == "__main__":
    app = create_fastapi_app(Echo, Say, Heard, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
