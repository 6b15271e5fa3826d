"""Episodes: what is sampled, what is given, and every way in which one ends."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.base import Reply, ToolResult
from actors.environments.host import EnvironmentFailure, Observation
from actors.generation.engine import Completion
from actors.generation.episodes import Answer, Episode, Player, turn_seed
from actors.generation.rows import rollout_batch
from actors.rendering.renderer import Reply as Read
from common.config.environment import EnvironmentConfig
from common.record.turns import check_turns, sampled_lengths
from common.trajectory import GroupRequest

END, PROMPT = 99, [1, 2, 3]
LONGEST = 64


def request(max_tokens: int = 40, seed: int | None = 7) -> GroupRequest:
    return GroupRequest(
        group_id=5,
        ticket=5,
        prompt_id="p",
        epoch=0,
        question="?",
        prompt_text="?",
        prompt_ids=PROMPT,
        reference=json.dumps({"answer": "4", "prompt": "?"}),
        num_completions=1,
        max_tokens=max_tokens,
        temperature=1.0,
        dispatch_version=3,
        dispatched_s=0.0,
        seed=seed,
    )


class Policy:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, turns: Sequence[Sequence[int]]) -> None:
        self.turns = list(turns)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    async def __call__(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.asked.append((token_ids, sampling))
        said = list(self.turns.pop(0))[: sampling["max_tokens"]]
        finish = "stop" if said and said[-1] == END else "length"
        version = len(self.asked)
        return Completion(said, [-0.5] * len(said), [version] * len(said), finish)


class Scripted:
    """An environment that answers from a list, and notes what it hears."""

    def __init__(self, *answers: Answer, first: Answer | None = None, worth: Answer | None = None):
        self.first = first or Observation()
        self.answers = list(answers)
        self.worth = worth or Observation()
        self.heard: list[Reply] = []
        self.tasks: list[tuple[dict[str, Any], int]] = []
        self.closed: list[str] = []

    async def reset(self, key: str, task: dict[str, Any], seed: int) -> Answer:
        self.tasks.append((task, seed))
        return self.first

    async def step(self, key: str, reply: Reply) -> Answer:
        self.heard.append(reply)
        return self.answers.pop(0)

    async def reward(self, key: str, reply: str) -> Answer:
        return self.worth

    def close(self, key: str) -> None:
        self.closed.append(key)


class Plain:
    """A renderer: an observation is its characters' codes between 50 and 51."""

    stop_token_ids = (END, 98)

    def behind(self, messages: list[dict[str, Any]], *, ended: bool) -> list[int]:
        text = "".join(message["content"] for message in messages)
        return [*([] if ended else [END]), 50, *(ord(c) % 40 for c in text), 51]

    def ended(self, token_ids: Sequence[int]) -> bool:
        return bool(token_ids) and token_ids[-1] == END

    def parse(self, token_ids: Sequence[int]) -> Read:
        words = " ".join(str(t) for t in token_ids if t != END)
        return Read(words, "", (), "it holds 98" if 98 in token_ids else "")


class Characters:
    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(t) for t in token_ids)


def play(
    host: Scripted, policy: Policy, max_tokens: int = 40, seed: int | None = 7, **settings: Any
) -> Episode:
    config = EnvironmentConfig(name="calculator", **settings)
    player = Player(config, host, Plain(), Characters(), policy, LONGEST)
    asked = request(max_tokens, seed)
    episode = asyncio.run(player.play(asked, 0, {"temperature": 1.0, "stop": []}, seed is not None))
    check_turns(rollout_batch(asked, {0: episode}, [episode.text], "g"))
    assert host.closed == [f"group-{asked.group_id}-0-{asked.dispatched_s}"]
    return episode


def given_tokens(episode: Episode) -> list[int]:
    return [t for t, p in zip(episode.token_ids, episode.logprobs, strict=True) if math.isnan(p)]


def test_an_episode_is_its_turns_with_what_was_given_between_them() -> None:
    host = Scripted(
        Observation("ab", seconds=0.25), Observation(reward=1.0, done=True, seconds=1.0)
    )
    policy = Policy([[10, 11, END], [12, END]])
    episode = play(host, policy)
    observed = [50, ord("a") % 40, ord("b") % 40, 51]
    assert episode.token_ids == [10, 11, END, *observed, 12, END]
    assert given_tokens(episode) == observed
    assert episode.weight_versions == [1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert episode.finish_reason == "stop"
    assert [(t["begin"], t["end"], t["reward"]) for t in episode.turns] == [(0, 3, None), (7, 9, 1)]
    assert (episode.environment_verdict, episode.environment_reward) == ("pass", 1.0)
    assert episode.environment_s == 1.25
    assert episode.text == "12"
    assert [str(reply) for reply in host.heard] == ["10 11", "12"]


def test_every_turn_is_sampled_from_exactly_the_tokens_that_stand_there() -> None:
    host = Scripted(Observation("ab"), Observation("c"), Observation(done=True, reward=0.0))
    policy = Policy([[10, END], [11, END], [12, END]])
    episode = play(host, policy)
    for (asked, _), turn in zip(policy.asked, episode.turns, strict=True):
        assert asked == PROMPT + episode.token_ids[: turn["begin"]]


def test_the_environment_is_told_the_row_and_a_seed_that_its_group_shares() -> None:
    host = Scripted(Observation(done=True))
    play(host, Policy([[10, END]]))
    assert host.tasks == [({"answer": "4", "prompt": "?"}, 7)]
    unseeded = [Scripted(Observation(done=True)) for _ in range(2)]
    for each in unseeded:
        play(each, Policy([[10, END]]), seed=None)
    assert unseeded[0].tasks == unseeded[1].tasks


def test_turns_have_seeds_of_their_own_that_follow_from_the_groups() -> None:
    policy = Policy([[10, END], [11, END]])
    play(Scripted(Observation("a"), Observation(done=True)), policy)
    seeds = [sampling["seed"] for _, sampling in policy.asked]
    assert seeds == [turn_seed(request(), 0, number) for number in range(2)]
    assert len({turn_seed(request(), i, n) for i in range(8) for n in range(8)}) == 64
    unseeded = Policy([[10, END]])
    play(Scripted(Observation(done=True)), unseeded, seed=None)
    assert "seed" not in unseeded.asked[0][1]


@pytest.mark.parametrize(
    ("settings", "turns", "finish", "sampled"),
    [
        # A limit on turns: the environment has answered the last one.
        ({"max_turns": 2}, [[10, END], [11, END], [12, END]], "turns", 4),
        # The observation leaves no token: it is not appended.
        ({"max_tokens": 6}, [[10, END]], "length", 2),
        # The turn itself fills the room.
        ({"max_tokens": 3}, [[10, 11, 12, 13, END]], "length", 3),
        # A turn that is cut ends the episode, where it is told to.
        ({"turn_tokens": 2, "cut_turns": "end"}, [[10, 11, 12, END]], "length", 2),
        # The context of the model is full before the room is.
        ({"max_tokens": 1000}, [[10] * 55 + [END]], "context", 56),
    ],
)
def test_a_limit_ends_an_episode_that_the_environment_then_values(
    settings: dict[str, Any], turns: list[list[int]], finish: str, sampled: int
) -> None:
    host = Scripted(*[Observation("abc", reward=0.25)] * 3, worth=Observation(reward=0.5))
    episode = play(host, Policy(turns), **settings)
    assert episode.finish_reason == finish
    heard = len(host.heard)
    assert episode.environment_reward == 0.25 * heard + 0.5
    assert sum(t["end"] - t["begin"] for t in episode.turns) == sampled
    assert not math.isnan(episode.logprobs[-1]), "nothing is given behind the last turn"


def test_a_cut_turn_is_ended_by_a_given_token_and_goes_on() -> None:
    host = Scripted(Observation("a"), Observation(done=True, reward=1.0))
    episode = play(host, Policy([[10, 11, 12], [13, END]]), turn_tokens=2)
    assert episode.turns[0]["finish"] == "length"
    assert given_tokens(episode)[0] == END
    assert episode.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["error", "timeout"])
@pytest.mark.parametrize("when", ["reset", "step", "reward"])
def test_a_failure_of_the_environment_is_never_a_reward(kind: Any, when: str) -> None:
    failure = EnvironmentFailure(kind, "ValueError: no", seconds=2.0)
    hosts = {
        "reset": Scripted(first=failure),
        "step": Scripted(Observation("a", reward=5.0), failure),
        "reward": Scripted(*[Observation("a", reward=5.0)] * 2, worth=failure),
    }
    episode = play(hosts[when], Policy([[10, END], [11, END]]), max_turns=2)
    assert episode.environment_reward is None
    assert (episode.environment_verdict, episode.environment_reason) == (kind, "ValueError: no")
    assert len(episode.turns) == (1 if when == "reset" else 2)
    assert (len(episode.token_ids) == 0) == (when == "reset")


def test_a_turn_that_forges_a_message_is_told_as_malformed() -> None:
    host = Scripted(Observation(done=True, reward=0.0))
    play(host, Policy([[10, 98]]))
    assert [call.problem for call in host.heard[0].calls] == ["it holds 98"]


def test_what_the_environment_says_first_is_given_behind_an_empty_turn() -> None:
    host = Scripted(Observation(done=True, reward=1.0), first=Observation("ab"))
    episode = play(host, Policy([[10, END]]))
    assert episode.token_ids[:2] == [END, 50]
    assert episode.turns[0]["begin"] == 5
    assert len(given_tokens(episode)) == 5


def test_a_long_observation_loses_its_middle() -> None:
    host = Scripted(Observation("a" * 4 + "b" * 100 + "c" * 4), Observation(done=True))
    episode = play(host, Policy([[10, END], [11, END]]), observation_tokens=6)
    told = "aaa [...] ccc"
    assert given_tokens(episode) == [50, *(ord(c) % 40 for c in told), 51]


def test_results_of_tools_come_as_messages_of_the_tool() -> None:
    results = (ToolResult("add", "4"), ToolResult("mul", "6", failed=True))
    host = Scripted(Observation("4\n6", results=results), Observation(done=True))
    told: list[list[dict[str, Any]]] = []

    class Listening(Plain):
        def behind(self, messages: list[dict[str, Any]], *, ended: bool) -> list[int]:
            told.append(messages)
            return super().behind(messages, ended=ended)

    config = EnvironmentConfig(name="calculator", role="tool")
    policy = Policy([[10, END], [11, END]])
    player = Player(config, host, Listening(), Characters(), policy, LONGEST)
    episode = asyncio.run(player.play(request(), 0, {}, False))
    assert [(turn["calls"], turn["failed"]) for turn in episode.turns] == [(2, 1), (0, 0)]
    assert told == [
        [
            {"role": "tool", "name": "add", "content": "4"},
            {"role": "tool", "name": "mul", "content": "6"},
        ]
    ]


def test_a_cancelled_episode_is_closed_in_its_environment() -> None:
    class Waits(Scripted):
        async def step(self, key: str, reply: Reply) -> Answer:
            await asyncio.sleep(60)
            raise AssertionError

    host = Waits()

    async def cancelled() -> None:
        player = Player(
            EnvironmentConfig(name="calculator"), host, Plain(), Characters(),
            Policy([[10, END]]), LONGEST,
        )  # fmt: skip
        playing = asyncio.create_task(player.play(request(), 0, {}, False))
        await asyncio.sleep(0.05)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing

    asyncio.run(cancelled())
    assert len(host.closed) == 1


OBSERVATIONS = st.builds(
    Observation,
    text=st.text("abc", max_size=6),
    reward=st.none() | st.sampled_from([0.0, 0.5, 1.0]),
    done=st.booleans(),
)
FAILURES = st.builds(
    EnvironmentFailure, kind=st.sampled_from(["error", "timeout"]), reason=st.just("x")
)


@settings(deadline=None)
@given(
    turns=st.lists(st.lists(st.integers(10, 20), min_size=1, max_size=9), min_size=8, max_size=8),
    answers=st.lists(OBSERVATIONS | FAILURES, min_size=8, max_size=8),
    ends=st.lists(st.booleans(), min_size=8, max_size=8),
    max_tokens=st.integers(1, 60),
    turn_tokens=st.integers(1, 8),
    max_turns=st.integers(1, 8),
    cut_turns=st.sampled_from(["go_on", "end"]),
)
def test_whatever_happens_turns_are_what_was_sampled_and_limits_hold(
    turns: list[list[int]],
    answers: list[Answer],
    ends: list[bool],
    max_tokens: int,
    turn_tokens: int,
    max_turns: int,
    cut_turns: Any,
) -> None:
    said = [[*turn, END] if end else turn for turn, end in zip(turns, ends, strict=True)]
    host, policy = Scripted(*answers), Policy(said)
    episode = play(
        host,
        policy,
        max_tokens=max_tokens,
        turn_tokens=turn_tokens,
        max_turns=max_turns,
        cut_turns=cut_turns,
    )
    batch = rollout_batch(request(max_tokens), {0: episode}, [episode.text], "g")
    assert len(episode.token_ids) <= max_tokens
    assert len(episode.turns) <= max_turns
    assert len(episode.token_ids) + len(PROMPT) <= LONGEST
    sampled = [t for turn in episode.turns for t in episode.token_ids[turn["begin"] : turn["end"]]]
    expected = [
        t
        for turn, (_, sampling) in zip(said, policy.asked, strict=False)
        for t in turn[: sampling["max_tokens"]]
    ]
    assert sampled == expected
    assert sampled_lengths(batch).tolist() == [len(sampled)]
    assert batch.column("loss_mask")[0].as_py() == [not math.isnan(p) for p in episode.logprobs]
    failed = episode.environment_verdict in ("error", "timeout")
    assert not (failed and episode.environment_reward is not None)
    versions = episode.weight_versions
    assert versions == sorted(versions) or versions[0] == 3
