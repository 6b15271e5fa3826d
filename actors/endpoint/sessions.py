"""What the calls of one harness add up to: segments of tokens, given and sampled.

A harness sends its whole conversation with every call. Where that is what a segment holds and new
messages behind it, the segment goes on: its tokens stay as they are, and only what is new is
rendered. Any other conversation, a sub-agent's or one that was compacted, begins a segment.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.endpoint.conversation import Message, same_message
from actors.generation.engine import Completion
from actors.rendering.renderer import Renderer

Sample = Callable[[list[int], int, Sequence[int]], Awaitable[Completion]]
"""Token ids, the most tokens to sample behind them, and those that end a turn -> what was said."""


@dataclass(frozen=True)
class Turn:
    """Sampled tokens of a segment: from `begin` to `end`, and why sampling stopped."""

    begin: int
    end: int
    finish_reason: str


@dataclass
class Segment:
    """A conversation that only grew. Lists are over the tokens behind the prompt.

    Tokens that were given have no log-probability (NaN) and carry the version of the turn that
    follows them.
    """

    prompt_ids: list[int]
    renderer: Renderer
    tools: str
    messages: list[Message] = field(default_factory=list)
    """What the harness has said and was told."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    """A turn is being sampled."""

    @property
    def sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(turn.end - turn.begin for turn in self.turns)

    def behind(self, messages: Sequence[Message]) -> list[int]:
        """Tokens to give before the next turn."""
        if not self.turns:
            return []
        return self.renderer.behind(messages, ended=self.renderer.ended(self.token_ids))

    def add(self, given: list[int], turn: Completion) -> None:
        """Take what was given and then sampled."""
        if not len(turn.token_ids) == len(turn.logprobs) == len(turn.weight_versions) > 0:
            raise ValueError(
                f"a turn has {len(turn.token_ids)} tokens, {len(turn.logprobs)} log-probabilities "
                f"and {len(turn.weight_versions)} versions"
            )
        self.token_ids += [*given, *turn.token_ids]
        self.logprobs += [*([math.nan] * len(given)), *turn.logprobs]
        self.weight_versions += [*(turn.weight_versions[:1] * len(given)), *turn.weight_versions]
        end = len(self.token_ids)
        self.turns.append(Turn(end - len(turn.token_ids), end, turn.finish_reason))


@dataclass
class Session:
    """One run of a harness: the segments of its episode."""

    label: str
    sample: Sample
    tokens: float = math.inf
    """Most tokens behind the prompts of all its segments, given ones included."""
    ends_s: float = math.inf
    """When it is over whatever happens, by time.monotonic()."""
    segments: list[Segment] = field(default_factory=list)
    """Those in which something was sampled, oldest first."""
    counts: Counter[str] = field(default_factory=Counter)
    """Requests, refusals by code, malformed turns, and settings of the harness that were not
    followed, by name."""
    calls: int = 0
    """Calls of tools so far: each has an id of its own."""
    running: set[asyncio.Task[Any]] = field(default_factory=set)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the first request has come."""
    limit: str = ""
    """The limit that refused the last call: `length`, `turns` or `context`."""
    text: str = ""
    """The words of the last turn."""
    reserved: int = 0
    """Tokens that turns under way may still take."""
    _busy: int = 0
    _busy_since_s: float = 0.0
    _busy_s: float = 0.0

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Note that the harness is being answered: that time is not its own."""
        if not self._busy:
            self._busy_since_s = time.monotonic()
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._busy_s += time.monotonic() - self._busy_since_s

    @property
    def answered_s(self) -> float:
        """Seconds in which a call of the harness was being answered."""
        return self._busy_s + (time.monotonic() - self._busy_since_s if self._busy else 0.0)

    @property
    def left(self) -> float:
        """Tokens that it may still have, those under way taken off."""
        taken = sum(len(segment.token_ids) for segment in self.segments)
        return self.tokens - taken - self.reserved

    def shares(self) -> list[float]:
        """Share of each segment in what was sampled; a row's weight in its episode."""
        total = sum(segment.sampled for segment in self.segments)
        return [segment.sampled / total for segment in self.segments]

    def going_on(self, messages: Sequence[Message], tools: str) -> tuple[Segment, list[Message]]:
        """The segment that `messages` go on from, and what is new in them.

        Raises: `LookupError` where they go on from none.
        """
        for segment in sorted(self.segments, key=lambda one: len(one.messages), reverse=True):
            held = len(segment.messages)
            new = list(messages[held:])
            if (
                segment.tools == tools
                and not segment.busy
                and new
                and all(message["role"] in ("user", "tool") for message in new)
                and all(map(same_message, segment.messages, messages))
            ):
                return segment, new
        raise LookupError


class Sessions:
    """Open sessions by their keys."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}

    def open(
        self,
        label: str,
        sample: Sample,
        *,
        tokens: float = math.inf,
        deadline_s: float = math.inf,
    ) -> tuple[str, Session]:
        """A new session and its key, which nobody can guess.

        Args:
            sample: gives its turns.
            tokens: most of all its segments together, behind their prompts.
            deadline_s: seconds until it is over; whoever opens it may close it before.
        """
        key = f"sk-{secrets.token_urlsafe(24)}"
        self._open[key] = Session(label, sample, tokens, time.monotonic() + deadline_s)
        return key, self._open[key]

    def find(self, key: str) -> Session | None:
        """The open session of a key; None where there is none, or its time is over."""
        session = self._open.get(key)
        return session if session and time.monotonic() < session.ends_s else None

    def close(self, key: str) -> Session:
        """End a session and what it is waiting for; its key is worth nothing from here on."""
        session = self._open.pop(key)
        for task in session.running:
            task.cancel()
        return session

    def __len__(self) -> int:
        return len(self._open)
