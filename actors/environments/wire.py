"""What host and episode say to each other: the messages, and how they travel.

A message is four bytes of length and a JSON value. The host asks, an episode's process answers:

    reset   task, seed, schemas of the tools  ->  observation
    step    text, calls                       ->  observation, reward, done, state, results
    reward  text                              ->  reward
    describe                                  ->  tools
    close                                     ->  nothing more

An answer that has `failure` says why there is no other. Neither side believes the other: what an
environment returns is checked where it is made, for a good message, and again by the host.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from numbers import Real
from typing import Any

from actors.environments.base import Step, ToolResult

LENGTH = struct.Struct(">I")
_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of float32, in which rewards travel."""
_STATE_CHARACTERS = 1000


def frame(message: Any) -> bytes:
    """A message as it travels."""
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def read_message(channel: socket.socket) -> Any:
    """The next message; None when the other side has closed its end."""
    header = _read(channel, LENGTH.size)
    return None if header is None else json.loads(_read(channel, *LENGTH.unpack(header)) or b"null")


def _read(channel: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        chunk = channel.recv(size - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def checked_text(value: object, what: str, limit: int) -> str:
    """A text that can be encoded, of at most `limit` characters.

    Raises: `TypeError` when it is no text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} is of type {type(value).__name__}, not a text")
    return cut_middle(value, limit).encode("utf-8", "replace").decode()


def checked_reward(value: object, what: str) -> float | None:
    """A reward, or None for none.

    Raises: `TypeError` or `ValueError` for what is no finite number; a boolean is none either.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is of type {type(value).__name__}, not a number")
    if not abs(float(value)) <= _LARGEST:
        raise ValueError(f"{what} is {float(value)}, not a finite number in float32")
    return float(value)


def checked_step(step: object, limit: int) -> dict[str, Any]:
    """A `Step` as a message. Raises: as `checked_text` and `checked_reward`."""
    if not isinstance(step, Step):
        raise TypeError(f"step returned a {type(step).__name__}, not a Step")
    if not isinstance(step.done, bool) and str(getattr(step.done, "dtype", "")) != "bool":
        raise TypeError(f"done is of type {type(step.done).__name__}, not a boolean")
    state = step.state
    if state is not None:
        state = checked_text(state, "the state", _STATE_CHARACTERS)
    return {
        "observation": checked_text(step.observation, "the observation", limit),
        "reward": checked_reward(step.reward, "the reward"),
        "done": bool(step.done),
        "state": state,
        "results": [
            [result.name, checked_text(result.text, "a result", limit), bool(result.failed)]
            for result in step.results
        ],
    }


def read_step(answer: Mapping[str, Any], limit: int) -> Step:
    """The `Step` of a message that may be anything. Raises: as `checked_step`; `KeyError` too."""
    results = tuple(ToolResult(str(name), text, failed) for name, text, failed in answer["results"])
    step = Step(answer["observation"], answer["reward"], answer["done"], answer["state"], results)
    checked_step(step, limit)
    return step


def cut_middle(text: str, limit: int) -> str:
    """`text` with its middle left out, and a word on how much, where it is longer than `limit`."""
    left_out = len(text) - limit
    if left_out <= 0:
        return text
    tail = len(text) - limit // 2
    return f"{text[: limit - limit // 2]}{gap(left_out, 'characters')}{text[tail:]}"


def gap(count: int, unit: str) -> str:
    """What stands in place of what was left out."""
    return f"\n[... {count} {unit} left out ...]\n"
