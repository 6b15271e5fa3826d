"""An OpenEnv environment behind its server, over one web socket an episode.

    environment.name=deploy.examples.environments.openenv_client:OpenEnv environment.network=true
    environment.args='{url: "ws://localhost:8000/ws", action: message, shown: echoed_message}'

Start the server as its own documentation says, in an environment of its own: OpenEnv's packages and
ours want different versions. Nothing of OpenEnv is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from websockets.sync.client import connect

from actors.environments.base import Environment, Step


class OpenEnv(Environment):
    """Puts a reply into one field of the action, and shows one field of what is observed."""

    def __init__(self, url: str, action: str = "message", shown: str | None = None) -> None:
        """Take the server's address and two fields; without `shown` all is shown, as JSON."""
        self._url, self._action, self._field = url, action, shown

    def reset(self, task: Mapping[str, Any], seed: int) -> str:
        self._socket = connect(self._url)
        return self._asked("reset", {"seed": seed}).observation

    def step(self, reply: str) -> Step:
        return self._asked("step", {self._action: reply})

    def close(self) -> None:
        self._socket.send(json.dumps({"type": "close"}))
        self._socket.close()

    def _asked(self, verb: str, data: Mapping[str, Any]) -> Step:
        self._socket.send(json.dumps({"type": verb, "data": data}))
        answer = json.loads(self._socket.recv())
        if answer["type"] != "observation":
            raise RuntimeError(f"{verb}: {answer['data']}")
        data = answer["data"]
        seen = data["observation"]
        text = json.dumps(seen) if self._field is None else str(seen[self._field])
        return Step(text, reward=data.get("reward"), done=bool(data.get("done")))
