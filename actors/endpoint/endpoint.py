"""An agent that nobody here wrote, answered by the policy: one turn for each of its calls.

A harness is given a base URL and a key. It calls as it would call OpenAI, and every call is a turn
of its episode: what it says is rendered (`actors.rendering.renderer`), tokens are sampled, and
their ids and log-probabilities stay here, in the session that the key names. What is sampled, and
how, is the run's: temperature and all such settings of the harness are not followed, and counted.

A turn that fails leaves its session as it was, so a client may ask again.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.chat import ChatCompletion

from actors.endpoint.conversation import Message, plain_messages
from actors.endpoint.refusal import RefusedError, unknown_key
from actors.endpoint.sessions import Segment, Session, Sessions
from actors.generation.engine import Completion
from actors.rendering.frame import call_id
from actors.rendering.renderer import Renderer, Reply
from common.errors import RunError, UserError, first_line

StartRenderer = Callable[[Sequence[Mapping[str, Any]]], Renderer]
"""Schemas of tools -> a renderer that knows them."""

_FOLLOWED = frozenset(
    ("model", "messages", "tools", "n", "stream", "stream_options", "user", "metadata", "store")
)
_KINDS_OF_TOOLS = 32
"""Renderers that are kept. A harness has one set of tools, or one for each of its agents."""


@dataclass(frozen=True)
class Limits:
    """What a session may take."""

    context: int
    """Tokens of a conversation, the turn that is sampled included."""
    turn_tokens: int
    """Tokens of a turn."""
    turns: int
    """Turns of a session, those of all its segments together."""
    concurrent: int = 8
    """Calls of a session beside each other."""
    forks: bool = True
    """Whether a session may have several segments."""
    sample_s: float = 300.0
    """Seconds for a turn."""
    start_s: float = 120.0
    """Seconds to try a template with new tools."""


class Endpoint:
    """Answers calls of harnesses. It knows nothing of HTTP, which is `actors.endpoint.app`."""

    def __init__(self, start_renderer: StartRenderer, limits: Limits, model: str) -> None:
        """Open no session yet.

        Args:
            model: name that is told to those who ask.
        """
        self._start_renderer = start_renderer
        self._limits = limits
        self._renderers: OrderedDict[str, Renderer] = OrderedDict()
        self._starting = asyncio.Lock()
        self.model = model
        self.sessions = Sessions()

    def session(self, key: str) -> Session:
        """The session that a key names.

        Raises: `RefusedError` where it names none that is open.
        """
        session = self.sessions.find(key)
        if session is None:
            raise unknown_key()
        return session

    async def complete(self, key: str, request: Any) -> ChatCompletion:
        """One turn: the answer to a request for a chat completion.

        Raises: `RefusedError` with the reason. The session is then as it was.
        """
        session = self.session(key)
        session.counts["requests"] += 1
        session.begun.set()
        try:
            with session.answering():
                return await self._watched(session, request)
        except RefusedError as refusal:
            session.counts[refusal.code] += 1
            raise

    async def _watched(self, session: Session, request: Any) -> ChatCompletion:
        """A turn within its deadline, which ends with its session or with who asked for it."""
        if len(session.running) >= self._limits.concurrent:
            raise RefusedError(
                429,
                "rate_limit_exceeded",
                f"{self._limits.concurrent} calls of this session are under way",
            )
        left_s = None if session.ends_s == math.inf else session.ends_s - time.monotonic()
        task = asyncio.ensure_future(self._turn(session, request))
        session.running.add(task)
        try:
            await asyncio.wait([task], timeout=left_s)
            if task.cancelled() or not task.done():  # the session was closed, or its time is over
                raise unknown_key()
            return task.result()
        finally:
            session.running.discard(task)
            task.cancel()

    async def _turn(self, session: Session, request: Any) -> ChatCompletion:
        messages, tools = self._read(session, request)
        named = json.dumps(tools, sort_keys=True)
        try:
            segment, new = session.going_on(messages, named)
            given = segment.behind(new)
        except (LookupError, UserError):  # of a template that does not append those
            self._check_fork(session)
            segment, new, given = await self._begun(messages, tools, named), messages, []
        self._check_turns(session)
        segment.busy = True
        try:
            ids = segment.prompt_ids + segment.token_ids + given
            sampled = await self._sampled(session, segment, given)
            reply = segment.renderer.parse(sampled.token_ids)
            if reply.malformed:
                session.counts["malformed"] += 1
            segment.add(given, sampled)
            said = _said(reply, session)
            segment.messages += [*new, said]
            if len(segment.turns) == 1:
                session.segments.append(segment)
            session.limit, session.text = "", reply.text
        finally:
            segment.busy = False
        return _answer(self.model, said, reply, sampled, len(ids))

    def _read(self, session: Session, request: Any) -> tuple[list[Message], list[dict[str, Any]]]:
        if not isinstance(request, Mapping):
            raise RefusedError(400, "invalid_value", "the body must be an object of JSON")
        if request.get("n") not in (None, 1):
            raise RefusedError(400, "unsupported_value", "a call gives one choice (n=1)", "n")
        for name, value in request.items():
            if name not in _FOLLOWED and value is not None:
                session.counts[f"not followed: {name}"] += 1
        tools = request.get("tools") or []
        if not isinstance(tools, list) or not all(map(_is_tool, tools)):
            raise RefusedError(400, "invalid_value", "tools must be a list of functions", "tools")
        return plain_messages(request.get("messages")), tools

    async def _begun(
        self, messages: Sequence[Message], tools: list[dict[str, Any]], named: str
    ) -> Segment:
        """A segment that begins with `messages`, rendered as a whole."""
        try:
            async with asyncio.timeout(self._limits.start_s), self._starting:
                if named not in self._renderers:
                    started = await asyncio.to_thread(self._start_renderer, tools)
                    self._renderers[named] = started
                self._renderers.move_to_end(named)
                renderer = self._renderers[named]
                if len(self._renderers) > _KINDS_OF_TOOLS:
                    self._renderers.popitem(last=False)
        except UserError as error:
            raise RefusedError(400, "invalid_value", first_line(error), "tools") from error
        except TimeoutError as error:
            raise RefusedError(504, "timeout", "the tools were not tried in time") from error
        try:
            return Segment(renderer.prompt(messages), renderer, named)
        except UserError as error:
            raise RefusedError(400, "invalid_value", first_line(error), "messages") from error

    def _check_fork(self, session: Session) -> None:
        if not self._limits.forks and (session.segments or len(session.running) > 1):
            raise RefusedError(
                400,
                "fork_refused",
                "this conversation does not go on from the one that the session holds (a "
                "sub-agent, a summary, two processes at once), and environment.forks=error",
                "messages",
            )

    def _check_turns(self, session: Session) -> None:
        taken = sum(len(segment.turns) for segment in session.segments)
        under_way = len(session.running) - 1
        if taken + under_way >= self._limits.turns:
            session.limit = "turns"
            raise RefusedError(
                400, "turns_exceeded", f"the session has had its {self._limits.turns} turns"
            )

    def _room(self, session: Session, ids: int, given: int) -> int:
        """Tokens that a turn may have behind `ids` tokens, the last `given` of them new."""
        fits, left = self._limits.context - ids, session.left - given
        if fits < 1:
            session.limit = "context"
            raise RefusedError(
                400,
                "context_length_exceeded",
                f"This model's maximum context length is {self._limits.context} tokens. However, "
                f"your messages resulted in {ids} tokens.",
                "messages",
            )
        if left < 1:
            session.limit = "length"
            raise RefusedError(
                400, "tokens_exceeded", f"the session has had its {session.tokens:.0f} tokens"
            )
        return int(min(self._limits.turn_tokens, fits, left))

    async def _sampled(self, session: Session, segment: Segment, given: list[int]) -> Completion:
        ids = segment.prompt_ids + segment.token_ids + given
        room = self._room(session, len(ids), len(given))
        session.reserved += len(given) + room
        sample_s = self._limits.sample_s
        try:
            async with asyncio.timeout(sample_s):
                return await session.sample(ids, room, segment.renderer.stop_token_ids)
        except TimeoutError as error:
            raise RefusedError(
                504, "timeout", f"no turn was sampled within {sample_s:.0f} s"
            ) from error
        except RunError as error:
            raise RefusedError(503, "server_error", first_line(error)) from error
        finally:
            session.reserved -= len(given) + room


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _said(reply: Reply, session: Session) -> Message:
    """The turn as the harness is told of it, and will tell it again."""
    said: Message = {"role": "assistant", "content": reply.text}
    if reply.calls:
        said["tool_calls"] = []
    for call in reply.calls:
        function = {"name": call.name, "arguments": dict(call.arguments)}
        said["tool_calls"].append(
            {"id": call_id(session.calls), "type": "function", "function": function}
        )
        session.calls += 1
    return said


def _answer(
    model: str, said: Message, reply: Reply, sampled: Completion, prompt_tokens: int
) -> ChatCompletion:
    calls = [call | {"function": _as_text(call["function"])} for call in said.get("tool_calls", [])]
    message = {
        "role": "assistant",
        "content": said["content"] or (None if calls else ""),
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning_content": reply.thought} if reply.thought else {}),
    }
    finish = "length" if sampled.finish_reason == "length" else "stop"
    completion_tokens = len(sampled.token_ids)
    return ChatCompletion.model_validate(
        {
            "id": f"chatcmpl-{time.monotonic_ns()}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": "tool_calls" if calls else finish,
                    "logprobs": None,
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )


def _as_text(function: dict[str, Any]) -> dict[str, Any]:
    return function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
