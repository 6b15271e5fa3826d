"""Branches of episodes. A real player with a policy whose every chance is known, so that values can
be enumerated; then real environments, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from enumerated_episodes import (
    CONFIG,
    EVERY,
    PROMPT,
    REQUEST,
    TASK,
    Policy,
    Table,
    begun,
    play,
    points_of,
    value,
)
from episode_runs import configured, made
from learner_models import trajectories
from ray.exceptions import RayTaskError

from actors.data.prompts import Prompt
from actors.environments.host import EnvironmentHost
from actors.generation.engine import Completion
from actors.generation.episodes import Player, environment_seed, turn_seed
from actors.rendering.renderer import Renderer
from actors.rollout.episodes import Episodes
from actors.rollout.guidance import GuidedStart
from common.branch_points import branch_points
from common.config.load import dump_config
from common.config.sections import Config
from common.errors import UserError
from common.record.trajectory_log import read_log
from deploy.cli import main
from deploy.credit.branches import parse_rules
from deploy.credit.completions import chosen
from deploy.credit.episodes import begun_at, check_repeats
from deploy.credit.launch import Branched
from deploy.credit.measured import Measured
from deploy.eval import launch
from deploy.eval.runner import SuiteRunner
from deploy.eval.settings import Sampling
from deploy.inspector.episode_parting import request_of
from deploy.models.resolve import tokenizer_here


def test_measured_values_of_an_episode_are_those_of_an_enumeration() -> None:
    """At every token of the policy, within the stated error; and the advantages add up."""
    scores = []
    for seed in (3, 4, 5):
        episode = play(Table(), Policy(seed))
        points = points_of(episode)
        rewards = []
        for t in points:
            start = begun(episode, t)
            played = [play(Table(), Policy(1000 * t + k), start) for k in range(120)]
            assert all(each.token_ids[:t] == episode.token_ids[:t] for each in played)
            rewards.append(tuple(each.environment_reward or 0.0 for each in played))
        reward = episode.environment_reward or 0.0
        found = Measured(tuple(points), len(episode.token_ids), reward, tuple(rewards), (0.0, 3.0))
        exact = np.array([value(episode.token_ids[:t]) for t in points])
        scores += (((found.values_J - exact) / found.errors_J) ** 2).tolist()
        assert found.advantages_J.sum() == pytest.approx(reward - found.values_J[0], abs=1e-9)
    assert max(scores) < 4.5**2
    assert 0.3 < np.mean(scores) < 1.8


def test_the_end_of_an_episode_has_its_reward_and_asks_nobody() -> None:
    for episode in EVERY[::9]:
        policy = Policy()
        again = play(Table(), policy, begun(episode, len(episode.token_ids)))
        assert not policy.asked
        assert again.token_ids == episode.token_ids
        assert again.environment_reward == episode.environment_reward
        assert again.finish_reason == episode.finish_reason


def test_a_policy_that_says_the_same_again_has_the_same_episode() -> None:
    """From every token, and is asked for what is left of a turn from exactly what stands there."""
    episode = EVERY[19]
    for t in points_of(episode):
        said = [episode.token_ids[p] for p in points_of(episode) if p >= t]
        policy, host = Policy(script=said), Table()
        again = play(host, policy, begun(episode, t), index=2)
        assert again.token_ids == episode.token_ids
        assert again.environment_reward == episode.environment_reward
        assert (again.text, again.feedback) == (episode.text, episode.feedback)
        assert [turn["reward"] for turn in again.turns] == [t["reward"] for t in episode.turns]
        assert again.guidance_length == t == sum(map(math.isnan, again.logprobs[:t]))
        asked, sampling = policy.asked[0]
        assert asked == PROMPT + episode.token_ids[:t]
        turn = next(turn for turn in episode.turns if t < turn["end"])
        assert sampling["max_tokens"] == turn["end"] - t
        assert host.closed


def test_the_environment_has_the_seed_of_its_episode_and_turns_have_their_own() -> None:
    """Of an asynchronous run: the seed follows from the prompt, as in training."""
    episode = EVERY[0]
    start = begun(episode, episode.turns[1]["begin"])
    assert start.seed == environment_seed(replace(REQUEST, seed=None)) != REQUEST.seed
    host, policies = Table(), [Policy(), Policy()]
    for index, policy in enumerate(policies):
        play(host, policy, start, index)
        assert host.seed == start.seed
    seeds = [sampling["seed"] for policy in policies for _, sampling in policy.asked]
    assert seeds == [turn_seed(REQUEST, index, turn) for index in (0, 1) for turn in (1, 2)]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_an_environment_that_says_something_else_is_refused(late: int) -> None:
    episode = EVERY[5]
    where = f"behind turn {late}" if late else "at the beginning"
    for t in points_of(episode):
        host = Table(dice="!", late=late)
        if t < episode.turns[late]["begin"]:  # nobody has seen it there
            play(host, Policy(), begun(episode, t))
            continue
        with pytest.raises(UserError, match=f"does not repeat itself: {where} it gave"):
            play(host, Policy(), begun(episode, t))
        assert host.closed


def test_an_environment_that_ends_before_the_record_does_is_refused() -> None:
    episode = EVERY[5]
    with pytest.raises(UserError, match="ended behind turn 1, and 2 turns are on record"):
        play(Table(ends=1), Policy(), begun(episode, episode.turns[1]["begin"]))


@pytest.mark.parametrize("at", [1, 2])
def test_an_environment_that_fails_on_the_way_has_no_reward(at: int) -> None:
    episode, host = EVERY[5], Table()
    host.fails_at = at
    again = play(host, Policy(), begun(episode, episode.turns[2]["begin"]))
    assert (again.environment_verdict, again.environment_reward) == ("timeout", None)
    assert again.token_ids == episode.token_ids[: episode.turns[at - 1]["end"]]
    assert host.closed


def branches_of(episode: Any, *words: str) -> list[int]:
    texts = [". \n"[token % 3] for token in episode.token_ids]
    rules, first = parse_rules(words, 9), episode.turns[0]["begin"]
    return branch_points(texts.__getitem__, episode.logprobs, rules, first=first)


def test_a_branch_stands_at_a_token_of_the_policy() -> None:
    """Whatever the rules; `turns` are the beginnings of all turns but the first."""
    words = ["turns", "sentences", "every:1", "every:3", "below:0.9", "start"]
    for episode in EVERY[::7]:
        first = episode.turns[0]["begin"]
        for count in range(1, 4):
            for some in itertools.combinations(words, count):
                found = branches_of(episode, *some)
                assert found[0] == first and set(found) <= set(points_of(episode))
        assert branches_of(episode, "turns") == [turn["begin"] for turn in episode.turns]
        assert (
            branches_of(episode, "every:3") == points_of(episode)[::3]
        )  # observations do not count


def test_without_an_environment_nothing_is_a_turn() -> None:
    assert branch_points("a.b".__getitem__, [-0.1] * 3, parse_rules(["turns"], 9)) == [0]
    (group,) = trajectories([(3, [4])], rewards=[[1.0]])
    (only,) = chosen([group], 0, 1)
    branched = Branched(only, tuple("ab.d"), (0, 3))
    assert branched.start(0, CONFIG) == GuidedStart()
    assert branched.start(3, CONFIG) == GuidedStart(only.token_ids[:3], 1)
    assert (branched.left(0), branched.left(3)) == (4, 1)


SAYS = [["4", "5", "6"], ["1", "1", "1"], ["no", "8", "8"], ["1", "2", "3"]]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for batch in read_log(run / "trajectories") for row in batch.to_pylist()]


def test_a_real_environment_is_brought_to_every_branch(tmp_path: Path) -> None:
    """And what is left to say and to hear of the episode is as it was."""
    config = configured("guess", "generator.max_staleness=0")
    rows = rows_of(made(tmp_path / "run", config, SAYS))
    check_repeats(config, rows, tokenizer_folder(tmp_path, config))
    asyncio.run(_every_branch(config, rows))


async def _every_branch(config: Config, rows: list[dict[str, Any]]) -> None:
    tokenizer = tokenizer_here(config.model.path)
    host = EnvironmentHost(config.environment)
    await host.start()
    renderer = Renderer.of_environment(tokenizer, config.data, config.environment, host.tools)
    length = config.model.max_length
    for row in rows:
        points = [t for t in row["turns"] for t in (t["begin"], t["end"] - 1)]
        for place, point in enumerate(sorted({*points, len(row["token_ids"])})):
            logged = OnRecord(row)
            player = Player(config.environment, host, renderer, tokenizer, logged, length)
            asked = replace(
                request_of(row, config),
                begun=begun_at(row, point, config),
                seed=99,
                dispatched_s=float(place),
            )
            again = await player.play(asked, row["completion_index"], {}, True)
            assert again.token_ids == row["token_ids"]
            assert again.guidance_length == point
            assert again.environment_reward == row["environment_reward"]
            assert again.finish_reason == row["finish_reason"]
    await host.shutdown()


class OnRecord:
    """Says what the log says from the place on where it is asked."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._row = row

    async def __call__(
        self, request_id: str, token_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        at = len(token_ids) - len(self._row["prompt_ids"])
        turn = next(turn for turn in self._row["turns"] if at < turn["end"])
        said = self._row["token_ids"][at : turn["end"]]
        return Completion(said, [-0.5] * len(said), [0] * len(said), turn["finish"])


def tokenizer_folder(folder: Path, config: Config) -> Path:
    path = folder / "policy"
    tokenizer_here(config.model.path).save_pretrained(path)
    return path


@pytest.mark.parametrize(("late", "where"), [(0, "at the beginning"), (2, "behind turn 2")])
def test_a_run_whose_environment_does_not_repeat_itself_is_refused(
    tmp_path: Path, late: int, where: str
) -> None:
    args = f"environment.args={{unseeded: {late == 0}, late: {late}}}"
    config = configured("hostile_environments:Diced", args)
    rows = rows_of(made(tmp_path / "run", config, SAYS[:2]))
    with pytest.raises(UserError, match=f"2 of 2 episodes part .* does {where}: its observation"):
        check_repeats(config, rows, tokenizer_folder(tmp_path, config))


def test_every_sample_goes_on_from_its_own_branch() -> None:
    """One a branch, as many samples of each; what is no beginning of an episode is guidance."""
    prompt = Prompt(-1, "p", 0, 0, "?", "?", PROMPT, TASK, None, None)
    starts = [begun(EVERY[3], t) for t in points_of(EVERY[3])] + [GuidedStart((1, 2), 1)]
    pools: Any = SimpleNamespace(version=0)
    runner = SuiteRunner(
        [prompt] * len(starts),
        Sampling(2, 1.0, 40, -1),
        episodes=Episodes(pools, pools, sample_timeout_s=1.0, judge_timeout_s=1.0),
        log=pools,
        in_flight=1,
        progress=print,
        starts=starts,
    )
    asked = [runner._request(number) for number in range(2 * len(starts))]
    assert [each.begun for each in asked[::2]] == [*starts[:-1], None]
    assert [each.begun for each in asked[1::2]] == [*starts[:-1], None]
    assert [each.guidance_ids for each in asked] == [()] * (2 * len(starts) - 2) + [(1, 2)] * 2
    assert len({each.seed for each in asked}) == len(asked)


def test_what_a_player_refuses_comes_out_as_wrong_input(tmp_path: Path) -> None:
    """A generator is an actor: its error is wrapped, and no advice to call again is put to it."""
    refused = RayTaskError("play", "", UserError("it does not repeat itself")).as_instanceof_cause()
    assert launch._explained(refused, tmp_path) is refused
    assert isinstance(refused, UserError) and refused.exit_code == 2


def test_episodes_without_a_turn_or_a_reward_are_not_branched(tmp_path: Path) -> None:
    run = made(tmp_path / "run", configured("guess"), SAYS)
    (group,) = read_log(run / "trajectories")
    found = chosen([group], 0, 9)
    assert [each.index for each in found] == [0, 1, 2, 3]
    assert all(each.first == each.row["turns"][0]["begin"] for each in found)
    config = configured("hostile_environments:Hostile")
    broken = made(tmp_path / "broken", config, SAYS[:1], {"do": "raise", "at": "step"})
    with pytest.raises(UserError, match="no completion of the step"):
        chosen(list(read_log(broken / "trajectories")), 0, 9)


def test_a_command_cannot_be_brought_to_a_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused for that, and not because its code is not trusted: none of it runs."""
    config = configured("guess")
    config.environment.name, config.environment.command = None, ["python", "agent.py"]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert main(["credit", str(tmp_path), "--step", "1"]) == 2
    assert "cannot be brought to a branch" in capsys.readouterr().err


def test_an_environment_of_ones_own_runs_only_where_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("hostile_environments:Diced")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert main(["credit", str(tmp_path), "--step", "1"]) == 2
    assert "--trust-code" in capsys.readouterr().err
