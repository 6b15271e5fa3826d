"""An agent that knows OpenAI's client alone: what it says and hears, and what is kept of it."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import openai
import pytest
from chat_templates import FAMILIES
from transformers.utils import get_json_schema

from actors.endpoint.app import build_app
from actors.endpoint.endpoint import Endpoint, Limits
from actors.endpoint.server import LoopbackServer
from actors.endpoint.sessions import Session
from actors.generation.engine import Completion
from actors.rendering.renderer import Renderer
from common.config.sections import DataConfig
from common.errors import RunError, UserError


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first
        b: the second
    """
    return a * b


TOOLS: Any = [get_json_schema(multiply)]
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 12, "b": 34}}\n</tool_call>'
LIMITS = Limits(context=4000, turn_tokens=400, turns=20)
HANGS = "hangs"


class Sampler:
    """Says what a script says, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, script: list[Any]) -> None:
        self._tokenizer = tokenizer
        self._script = list(script)
        self.asked: list[list[int]] = []
        self.rooms: list[int] = []
        self.sampled: list[Completion] = []
        self.cancelled = 0

    async def __call__(self, ids: list[int], max_tokens: int, stop: Any = ()) -> Completion:
        assert tuple(stop)  # the renderer's, without which a turn would run on
        self.asked.append(list(ids))
        self.rooms.append(max_tokens)
        said = self._script.pop(0)
        if isinstance(said, Exception):
            raise said
        if said == HANGS:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        # A token a letter, which no encoding gives: what is kept must be these.
        words, end = said.removesuffix("<|im_end|>"), said.endswith("<|im_end|>")
        tokens = [t for letter in words for t in encoded(self._tokenizer, letter)]
        tokens += encoded(self._tokenizer, "<|im_end|>") if end else []
        turn = len(self.sampled)
        self.sampled.append(
            Completion(
                token_ids=tokens,
                logprobs=[-0.5 - turn] * len(tokens),
                weight_versions=[turn] * len(tokens),
                finish_reason="stop" if end else "length",
            )
        )
        return self.sampled[-1]


@cache
def tokenizer_of(name: str) -> Any:
    return FAMILIES[name].tokenizer()


@cache
def renderer_of(name: str, tools: str) -> Renderer:
    return Renderer.start(tokenizer_of(name), DataConfig(), tools=json.loads(tools))


@pytest.fixture(scope="module", autouse=True)
def _vllm_is_imported() -> None:
    """Its parsers take longer to import than a client of these tests waits."""
    renderer_of("hermes", json.dumps(TOOLS))


def encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Played:
    """An endpoint that is served, a session of it, and its client."""

    def __init__(self, endpoint: Endpoint, sampler: Sampler, url: str) -> None:
        self.endpoint, self.sampler, self.url = endpoint, sampler, url
        self.key, self.session = self.open("group 1, index 0")
        self.client = self.client_of(self.key)

    def open(self, label: str, **limits: float) -> tuple[str, Session]:
        return self.endpoint.sessions.open(label, self.sampler, **({"deadline_s": 60} | limits))

    def client_of(self, key: str, retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=retries, timeout=20)

    async def ask(self, messages: list[Any], tools: Any = None, **settings: Any) -> Any:
        settings |= {"tools": tools} if tools else {}
        return await self.client.chat.completions.create(model="any", messages=messages, **settings)


@asynccontextmanager
async def served(
    script: list[Any], name: str = "hermes", limits: Limits = LIMITS
) -> AsyncIterator[Played]:
    tokenizer = tokenizer_of(name)
    sampler = Sampler(tokenizer, script)

    def start(tools: Any) -> Renderer:
        return renderer_of(name, json.dumps(tools))

    endpoint = Endpoint(start, limits, "the-policy")
    server = await LoopbackServer.start(build_app(endpoint))
    try:
        yield Played(endpoint, sampler, server.url)
    finally:
        await server.stop()


def play(
    script: list[Any], test: Callable[[Played], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), served(script, **options) as played:
            await test(played)

    asyncio.run(run())


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def rows(session: Session) -> list[tuple[list[int], list[bool]]]:
    """Of each segment its tokens behind the prompt, and which of them were sampled."""
    found = []
    for segment in session.segments:
        spans = {i for turn in segment.turns for i in range(turn.begin, turn.end)}
        sampled = [i in spans for i in range(len(segment.token_ids))]
        assert [not math.isnan(logprob) for logprob in segment.logprobs] == sampled
        assert len(segment.weight_versions) == len(sampled)
        assert segment.weight_versions == sorted(segment.weight_versions)
        found.append((segment.token_ids, sampled))
    return found


def test_an_agent_with_a_tool_plays_one_episode() -> None:
    """Every token that is kept as sampled was sampled, and all together reads as the template."""

    async def test(played: Played) -> None:
        messages: list[Any] = [{"role": "developer", "content": "Be brief."}, user("12 * 34?")]
        tokenizer = tokenizer_of("hermes")
        for _ in range(3):
            answer = await played.ask(messages, TOOLS)
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                messages.append(
                    user([{"type": "text", "text": "Sure"}, {"type": "text", "text": "?"}])
                )
                continue
            assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
            (call,) = message.tool_calls
            result = multiply(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "content": str(result), "tool_call_id": call.id})
        (segment,) = played.session.segments
        ((ids, sampled),) = rows(played.session)
        turns = [turn for completion in played.sampler.sampled for turn in completion.token_ids]
        assert [id_ for id_, is_sampled in zip(ids, sampled, strict=True) if is_sampled] == turns
        for turn, asked in zip(segment.turns, played.sampler.asked, strict=True):
            assert asked == segment.prompt_ids + ids[: turn.begin]
        assert answer.choices[0].finish_reason == "length"  # of the third, which was cut
        assert answer.usage is not None and answer.usage.prompt_tokens == len(asked)
        whole = tokenizer.decode(segment.prompt_ids + ids)
        assert whole == tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "Be brief."},
                user("12 * 34?"),
                {"role": "assistant", "content": CALL},
                {"role": "tool", "content": "408"},
                {"role": "assistant", "content": "It is 408."},
                user("Sure?"),
                {"role": "assistant", "content": "Yes"},
            ],
            tools=TOOLS,
            tokenize=False,
        ).removesuffix("<|im_end|>\n")
        assert [turn.finish_reason for turn in segment.turns] == ["stop", "stop", "length"]
        assert encoded(tokenizer, whole) != segment.prompt_ids + ids

    play([CALL + "<|im_end|>", "It is 408.<|im_end|>", "Yes"], test)


def test_a_client_may_write_its_history_in_its_own_way() -> None:
    async def test(played: Played) -> None:
        await played.ask([user("12 * 34?")], TOOLS)
        (segment,) = played.session.segments
        (call,) = segment.messages[-1]["tool_calls"]
        said = {
            "role": "assistant",
            "content": "  ",
            "refusal": None,
            "tool_calls": [
                call | {"function": {"name": "multiply", "arguments": '{ "b":34,   "a":12}'}}
            ],
        }
        told = {"role": "tool", "content": "408", "tool_call_id": call["id"]}
        await played.ask([user([{"type": "text", "text": "12 * 34?"}]), said, told], TOOLS)
        assert len(played.session.segments) == 1 and len(segment.turns) == 2

    play([CALL + "<|im_end|>", "408<|im_end|>"], test)


def test_what_does_not_go_on_is_a_segment_of_its_own() -> None:
    async def test(played: Played) -> None:
        asked = [user("a?")]
        first = (await played.ask(asked)).choices[0].message.content
        said = {"role": "assistant", "content": first}
        await played.ask([*asked, said, user("b?")])
        await played.ask([*asked, said, user("c?")])  # the first was taken further: a fork
        await played.ask([user("a summary of it all"), user("d?")])  # compacted
        await played.ask([*asked, {"role": "assistant", "content": "other"}, user("b?")])
        await played.ask(asked, TOOLS)  # a sub-agent with tools
        shared = [len(segment.turns) for segment in played.session.segments]
        assert shared == [2, 1, 1, 1, 1]
        for segment, (ids, sampled) in zip(
            played.session.segments, rows(played.session), strict=True
        ):
            assert sum(sampled) == segment.sampled
            assert ids[-segment.turns[-1].end + segment.turns[-1].begin :]
        shares = played.session.shares()
        assert math.isclose(sum(shares), 1.0)
        assert shares[0] == played.session.segments[0].sampled / sum(
            len(completion.token_ids) for completion in played.sampler.sampled
        )

    play(["one<|im_end|>", "two<|im_end|>", *["three"] * 4], test)


def test_where_a_template_does_not_append_a_segment_begins() -> None:
    """Tools stand before the last question there, so a second question moves them."""

    async def test(played: Played) -> None:
        first = (await played.ask([user("a?")], TOOLS)).choices[0].message.content
        said = {"role": "assistant", "content": first}
        await played.ask([user("a?"), said, user("b?")], TOOLS)
        one, two = played.session.segments
        assert len(one.turns) == len(two.turns) == 1
        text = tokenizer_of("brackets").decode(two.prompt_ids)
        assert text.index("[AVAILABLE_TOOLS]") > text.index(str(first))

    play(["one", "two"], test, name="brackets")


def test_a_key_names_one_open_session() -> None:
    async def test(played: Played) -> None:
        other, session = played.open("group 1, index 1")
        await played.client_of(other).chat.completions.create(model="m", messages=[user("b?")])
        assert len(session.segments) == 1 and not played.session.segments
        played.endpoint.sessions.close(other)
        late, _ = played.open("no time", deadline_s=0)
        for key in ("sk-guessed", other, late, played.key[:-1]):
            with pytest.raises(openai.AuthenticationError, match="no open session"):
                await played.client_of(key).chat.completions.create(
                    model="m", messages=[user("b?")]
                )
            with pytest.raises(openai.AuthenticationError):
                await played.client_of(key).models.list()
        assert len(played.sampler.asked) == 1
        assert [model.id async for model in played.client.models.list()] == ["the-policy"]
        with pytest.raises(KeyError):
            played.endpoint.sessions.close(other)

    play(["so"], test)


def test_settings_of_a_harness_are_counted_and_not_followed() -> None:
    async def test(played: Played) -> None:
        await played.ask([user("a?")], temperature=0.0, top_p=0.1, max_tokens=1, seed=3)
        await played.ask([user("a?")], temperature=1.0)
        counts = played.session.counts
        assert counts["not followed: temperature"] == 2
        assert counts["not followed: max_tokens"] == counts["not followed: top_p"] == 1
        assert played.sampler.rooms == [LIMITS.turn_tokens] * 2
        with pytest.raises(openai.BadRequestError, match="one choice"):
            await played.ask([user("a?")], n=2)

    play(["so", "so"], test)


def test_a_stream_has_the_same_as_one_chunk() -> None:
    async def test(played: Played) -> None:
        stream = await played.ask(
            [user("a?")], TOOLS, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        (choice,) = chunks[0].choices
        (call,) = choice.delta.tool_calls
        assert (choice.finish_reason, call.index) == ("tool_calls", 0)
        assert json.loads(call.function.arguments) == {"a": 12, "b": 34}
        assert choice.delta.content == "I call."
        used = chunks[-1].usage
        assert used.completion_tokens == len(played.sampler.sampled[0].token_ids)
        assert used.prompt_tokens == len(played.sampler.asked[0]) and len(chunks) == 2
        told = {"role": "tool", "content": "408", "tool_call_id": call.id}
        said = {"role": "assistant", "content": "I call.\n", "tool_calls": [call.model_dump()]}
        stream = await played.ask([user("a?"), said, told], TOOLS, stream=True)
        (chunk,) = [chunk async for chunk in stream]
        assert chunk.choices[0].delta.content == "408" and chunk.usage is None
        assert len(played.session.segments) == 1

    play(["I call." + CALL + "<|im_end|>", "408"], test)


def test_a_conversation_that_does_not_fit_is_told_so_and_nothing_is_lost() -> None:
    async def test(played: Played) -> None:
        await played.ask([user("a?")])
        said = {"role": "assistant", "content": "one"}
        with pytest.raises(openai.BadRequestError) as caught:
            await played.ask([user("a?"), said, user("b" * 300)])
        assert caught.value.code == "context_length_exceeded"
        assert "300 tokens" in str(caught.value)
        assert played.session.limit == "context" and len(played.session.segments[0].turns) == 1
        await played.ask([user("a?"), said, user("b")])
        (segment,) = played.session.segments
        assert len(segment.turns) == 2 and played.session.limit == ""  # it got over it
        assert played.sampler.rooms == [300 - len(asked) for asked in played.sampler.asked]

    play(["one<|im_end|>", "two"], test, limits=Limits(context=300, turn_tokens=400, turns=9))


def test_a_turn_that_failed_may_be_asked_again() -> None:
    async def test(played: Played) -> None:
        client = played.client_of(played.key, retries=2)
        answer = await client.chat.completions.create(model="m", messages=[user("a?")])
        assert answer.choices[0].message.content == "one"
        assert played.session.counts["server_error"] == 1
        assert [len(segment.turns) for segment in played.session.segments] == [1]

    play([RunError("the generator died"), "one"], test)


def test_no_turn_takes_longer_than_its_deadline() -> None:
    async def test(played: Played) -> None:
        began = time.monotonic()
        with pytest.raises(
            openai.InternalServerError, match="no turn was sampled within"
        ) as caught:
            await played.ask([user("a?")])
        assert caught.value.status_code == 504
        key, session = played.open("a short one", deadline_s=0.3)
        with pytest.raises(openai.AuthenticationError):
            await played.client_of(key).chat.completions.create(model="m", messages=[user("a")])
        assert time.monotonic() - began < 10
        assert played.sampler.cancelled == 2
        assert not played.session.segments and not session.segments

    play([HANGS, HANGS], test, limits=Limits(4000, 400, 20, sample_s=1.0))


def test_who_goes_away_takes_the_call_along() -> None:
    async def test(played: Played) -> None:
        with pytest.raises(openai.APITimeoutError):
            await played.ask([user("a?")], timeout=0.5)
        await until(lambda: played.sampler.cancelled == 1)
        assert not played.session.segments and not played.session.running
        await played.ask([user("a?")])
        assert len(played.session.segments) == 1

    play([HANGS, "one"], test)


def test_a_session_that_is_closed_ends_its_calls() -> None:
    async def test(played: Played) -> None:
        asking = asyncio.ensure_future(played.ask([user("a?")]))
        await until(lambda: len(played.sampler.asked) == 1)
        closed = played.endpoint.sessions.close(played.key)
        with pytest.raises(openai.AuthenticationError):
            await asking
        assert played.sampler.cancelled == 1 and not closed.segments

    play([HANGS], test)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def test_calls_beside_each_other_are_segments_and_have_a_limit() -> None:
    async def test(played: Played) -> None:
        said = (await played.ask([user("a?")])).choices[0].message.content
        history = [user("a?"), {"role": "assistant", "content": said}]
        both = [asyncio.ensure_future(played.ask([*history, user(w)])) for w in "bc"]
        await until(lambda: len(played.sampler.asked) == 3)
        with pytest.raises(openai.RateLimitError, match="2 calls of this session"):
            await played.ask([*history, user("d")])
        played.endpoint.sessions.close(played.key)
        await asyncio.gather(*both, return_exceptions=True)
        assert [len(segment.turns) for segment in played.session.segments] == [1]

    play(["one<|im_end|>", HANGS, HANGS], test, limits=Limits(4000, 400, 20, concurrent=2))


def test_a_call_that_cannot_be_read_is_words() -> None:
    async def test(played: Played) -> None:
        answer = await played.ask([user("a?")], TOOLS)
        message = answer.choices[0].message
        assert not message.tool_calls and message.content == CALL[:40]
        assert played.session.counts["malformed"] == 1
        said = message.model_dump(exclude_none=True)
        await played.ask([user("a?"), said, user("Once more.")], TOOLS)
        assert len(played.session.segments) == 1

    play([CALL[:40] + "<|im_end|>", CALL], test)


def test_a_harness_that_never_finishes_has_its_turns() -> None:
    async def test(played: Played) -> None:
        for _ in range(3):
            await played.ask([user("a?")])
        with pytest.raises(openai.BadRequestError) as caught:
            await played.ask([user("a?")])
        assert caught.value.code == "turns_exceeded" and len(played.sampler.asked) == 3
        assert played.session.limit == "turns"

    play(["one"] * 4, test, limits=Limits(4000, 400, turns=3))


def test_a_session_has_its_tokens_given_ones_included() -> None:
    async def test(played: Played) -> None:
        key, session = played.open("a short one", tokens=30)
        client = played.client_of(key)
        history: list[Any] = [user("a?")]
        first = await client.chat.completions.create(model="m", messages=history)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        await client.chat.completions.create(model="m", messages=[*history, said, user("b")])
        (segment,) = session.segments
        given = segment.turns[1].begin - segment.turns[0].end
        assert played.sampler.rooms == [30, 30 - segment.turns[0].end - given]
        session.tokens = len(segment.token_ids)
        with pytest.raises(openai.BadRequestError, match="has had its [0-9]+ tokens") as caught:
            await client.chat.completions.create(model="m", messages=[user("c" * 40)])
        assert caught.value.code == "tokens_exceeded" and session.limit == "length"
        assert session.reserved == 0

    play(["one<|im_end|>", "t" * 12], test)


def test_forks_can_be_refused() -> None:
    """A summary, a second conversation, and one beside another under way: all have a reason."""

    async def test(played: Played) -> None:
        first = asyncio.ensure_future(played.ask([user("a?")]))
        await until(lambda: len(played.sampler.asked) == 1)
        for messages in ([user("a?")], [user("b?")]):
            with pytest.raises(openai.BadRequestError, match=r"environment\.forks=error") as caught:
                await played.ask(messages)
            assert caught.value.code == "fork_refused"
        first.cancel()
        await until(lambda: not played.session.running)
        said = (await played.ask([user("a?")])).choices[0].message.content
        history = [user("a?"), {"role": "assistant", "content": said}]
        await played.ask([*history, user("b?")])
        with pytest.raises(openai.BadRequestError, match="does not go on"):
            await played.ask([*history, user("c?")])
        assert [len(segment.turns) for segment in played.session.segments] == [2]
        assert played.session.counts["fork_refused"] == 3

    play(
        [HANGS, "one<|im_end|>", "two<|im_end|>"],
        test,
        limits=Limits(4000, 400, 20, forks=False),
    )


def test_an_address_may_be_that_of_one_session() -> None:
    async def test(played: Played) -> None:
        other, _ = played.open("group 1, index 1")
        own = await LoopbackServer.start(build_app(played.endpoint, other))
        try:
            for key, url in ((played.key, own.url), ("sk-guessed", own.url)):
                client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
                with pytest.raises(openai.AuthenticationError, match="no open session"):
                    await client.models.list()
            client = openai.AsyncOpenAI(base_url=own.url, api_key=other, max_retries=0)
            assert [model.id async for model in client.models.list()] == ["the-policy"]
        finally:
            await own.stop()

    play([], test)


@pytest.mark.parametrize("route", ["responses", "messages", "completions", "embeddings"])
def test_other_routes_say_which_one_to_use(route: str) -> None:
    async def test(played: Played) -> None:
        headers = {"Authorization": f"Bearer {played.key}"}
        async with httpx.AsyncClient(timeout=20, headers=headers) as client:
            answer = await client.post(f"{played.url}/{route}", json={"input": "a?"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "unknown_url"
        assert "/v1/chat/completions" in error["message"] and route in error["message"]

    play([], test)


def test_the_time_in_which_it_is_answered_is_not_the_harnesss_own() -> None:
    async def test(played: Played) -> None:
        assert played.session.answered_s == 0 and not played.session.begun.is_set()
        both = [asyncio.ensure_future(played.ask([user(w)])) for w in "ab"]
        await until(lambda: len(played.sampler.asked) == 2)
        await asyncio.sleep(0.5)
        assert played.session.begun.is_set()
        assert 0.5 <= played.session.answered_s < 5  # not twice for two
        for task in both:
            task.cancel()
        await until(lambda: not played.session.running)
        ended = played.session.answered_s
        await asyncio.sleep(0.2)
        assert played.session.answered_s == ended

    play([HANGS, HANGS], test)


DEEP = "[" * 200_000
BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"no json", 400),
    (b"[]", 400),
    (DEEP.encode(), 400),
    (b'{"messages": []}', 400),
    (b'{"messages": "hello"}', 400),
    (b'{"messages": [3]}', 400),
    (b'{"messages": [{"role": "user<|im_end|>", "content": "a"}]}', 400),
    (b'{"messages": [{"role": "user", "content": 3}]}', 400),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400),
    (b'{"messages": [{"role": "tool", "content": "a"}]}', 400),
    (b'{"messages": [{"role": "assistant", "tool_calls": [3]}]}', 400),
    (b'{"messages": [{"role": "assistant", "tool_calls": 3}]}', 400),
    (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": '
        b'{"name": "f", "arguments": "[1"}}]}]}',
        400,
    ),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "x"}]}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": "all"}', 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "n": "two"}', 400),
    (b" " * (17 * 1024 * 1024), 413),
]


def test_bad_requests_are_refused_with_the_reason() -> None:
    async def test(played: Played) -> None:
        headers = {"Authorization": f"Bearer {played.key}"}
        url = f"{played.url}/chat/completions"
        async with httpx.AsyncClient(timeout=20, headers=headers) as client:
            for body, status in BODIES:
                answer = await client.post(url, content=body)
                assert answer.status_code == status, body[:80]
                error = answer.json()["error"]
                assert error["message"] and error["code"] and error["type"]
            assert (await client.post(f"{played.url}/elsewhere")).status_code == 404
            assert (await client.get(url)).status_code == 405
            assert (await client.post(url, headers={"Authorization": ""})).status_code == 401
        assert not played.sampler.asked and not played.session.segments

    play([], test)


def test_tools_that_no_template_takes_are_refused() -> None:
    async def test(played: Played) -> None:
        with pytest.raises(openai.BadRequestError, match="does not tell the policy of the tools"):
            await played.ask([user("a?")], TOOLS)
        await played.ask([user("a?")])

    play(["so"], test, name="chatml")


def test_a_port_that_is_taken_is_said() -> None:
    async def test() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(UserError, match="cannot be had"):
                await LoopbackServer.start(None, taken.getsockname()[1])

    asyncio.run(test())
