"""Plays episodes of an environment for whoever samples them: a pool of worker processes.

    start     the workers are there; gives the schemas of the tools
    reset     begins an episode         ->  `Observation`
    step      the policy's reply        ->  `Observation`
    reward    a limit ended an episode  ->  `Observation` with the environment's last word
    close     ends an episode, at once
    shutdown  ends everything

What goes wrong in an environment is a value, `EnvironmentFailure`, and never an exception: it ends
one episode, which has no reward then. Every answer has a deadline. Behind it the episode's process
is killed, and no other one. All verbs belong to one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from actors.environments.base import Reply, Step, ToolResult
from actors.environments.tools import MAX_CALLS
from actors.environments.wire import checked_reward, checked_text, read_step
from actors.environments.worker import (
    START_TIMEOUT_S,
    EndedError,
    EnvironmentWorker,
    Episode,
    NonsenseError,
)
from common.config.environment import EnvironmentConfig
from common.errors import RunError, UserError

CHARACTERS_PER_TOKEN = 32
"""An observation of more characters than this a token is cut here already, before it is encoded."""
_OPEN_TRIES = 3
_OPENING = 16
"""Episodes that a worker begins at a time. Forks take turns, and how long an episode waits for its
own is not the environment's time."""
_REASONS_KEPT = 100
_POLITE_S = 5.0


@dataclass(frozen=True)
class Observation:
    """What an environment said."""

    text: str = ""
    """What the policy reads before its next turn."""
    reward: float | None = None
    done: bool = False
    state: str | None = None
    results: tuple[ToolResult, ...] = ()
    """What came of tool calls, one each; `text` is all of them."""
    seconds: float = 0.0
    """How long it took."""


@dataclass(frozen=True)
class EnvironmentFailure:
    """Why there is no answer. The episode is over, and nobody can say what it was worth."""

    kind: Literal["error", "timeout"]
    reason: str
    traceback: str = ""
    seconds: float = 0.0


Answer = Observation | EnvironmentFailure


class EnvironmentHost:
    """Plays episodes side by side, each in a process of its own."""

    def __init__(self, config: EnvironmentConfig) -> None:
        """Keep the settings; `start` starts the workers."""
        assert config.name is not None
        self._config = config
        self._limit = CHARACTERS_PER_TOKEN * config.observation_tokens
        self._most_bytes = 2**16 + 8 * self._limit * (2 * MAX_CALLS + 2)
        self._settings = {
            "name": config.name,
            "args": dict(config.args),
            "network": config.network,
            "memory_bytes": int(config.memory_gib * 2**30),
            "cpu_s": 2 * config.episode_timeout_s + 5,
            "observation_characters": self._limit,
        }
        self._workers: list[EnvironmentWorker] = []
        self._starting = asyncio.Lock()
        self._opening = asyncio.Semaphore(_OPENING * config.workers)
        self._episodes: dict[str, Episode] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._failures: Counter[str] = Counter()
        self._closed = False
        self.tools: list[dict[str, Any]] = []
        """JSON schemas of the environment's tools, from `start` on."""

    @property
    def name(self) -> str:
        """The environment's name, as the configuration has it."""
        return str(self._config.name)

    async def start(self) -> None:
        """Start the workers, and ask for the tools.

        Raises:
            UserError: the environment cannot be used; the message says why.
            RunError: a worker did not come up.
        """
        starting = [self._started_worker() for _ in range(self._config.workers)]
        started = await asyncio.gather(*starting, return_exceptions=True)
        self._workers = [each for each in started if isinstance(each, EnvironmentWorker)]
        for each in started:
            if isinstance(each, BaseException):
                raise each
        # With the time of a start: schemas take transformers, which takes long to import.
        answer = await self._begin("describe", {"verb": "describe"}, _read_tools, START_TIMEOUT_S)
        self.close("describe")
        if isinstance(answer, EnvironmentFailure):
            raise UserError(f"environment.name={self._config.name} cannot be used: {answer.reason}")
        self.tools = answer

    @property
    def open_episodes(self) -> int:
        """Episodes that have been begun and not closed."""
        return len(self._episodes)

    @property
    def keys(self) -> list[str]:
        """Those of the episodes that are open."""
        return list(self._episodes)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.pid for worker in self._workers if not worker.lost]

    async def reset(self, key: str, task: Mapping[str, Any], seed: int) -> Answer:
        """Begin the episode `key`, which nobody else may use.

        Args:
            task: what JSON can say.
            seed: the same for all episodes of a group.
        """
        message = {"verb": "reset", "task": dict(task), "seed": seed, "tools": self.tools}
        async with self._opening:
            return await self._begin(key, message, self._read_reset)

    async def step(self, key: str, reply: Reply) -> Answer:
        """The environment's answer to a reply of the policy."""
        calls = [[call.name, dict(call.arguments), call.problem] for call in reply.calls]
        message = {"verb": "step", "text": str(reply), "calls": calls}
        return await self._ask(key, message, self._read_step)

    async def reward(self, key: str, reply: str) -> Answer:
        """What an episode is worth that a limit ends here, on top of what its steps gave."""
        return await self._ask(key, {"verb": "reward", "text": str(reply)}, _read_reward)

    def close(self, key: str) -> None:
        """End an episode without waiting for it; safe for one that has ended."""
        episode = self._episodes.pop(key, None)
        if episode is not None:
            self._end(episode, min(_POLITE_S, self._config.step_timeout_s))

    def failures(self) -> dict[str, int]:
        """Why episodes had no reward, and how often; the first hundred distinct reasons."""
        return dict(self._failures)

    async def shutdown(self) -> None:
        """End every episode and every worker."""
        self._closed = True
        for task in list(self._ending):
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._episodes.clear()
        self._workers.clear()

    async def _begin(
        self, key: str, message: Mapping[str, Any], read: Any, timeout_s: float | None = None
    ) -> Any:
        """Open an episode and send its first message. A worker that is lost, or does not fork, is
        replaced: no environment is to blame."""
        for _ in range(_OPEN_TRIES):
            try:
                worker = await self._worker()
                episode = await worker.open(key, self._most_bytes)
            except (EndedError, RunError, UserError) as error:
                answer = self._failed(EnvironmentFailure("error", str(error)))
                continue
            self._episodes[key] = episode
            answer = await self._ask(key, message, read, timeout_s)
            if episode.began or not isinstance(answer, EnvironmentFailure):
                return answer
            await worker.close("it did not begin an episode")
        return answer

    async def _ask(
        self, key: str, message: Mapping[str, Any], read: Any, timeout_s: float | None = None
    ) -> Any:
        episode = self._episodes.get(key)
        if episode is None:
            return self._failed(EnvironmentFailure("error", f"episode {key} is not there"))
        verb, begun = message["verb"], time.monotonic()
        left_s = self._config.episode_timeout_s - episode.spent_s
        answer: Any = None
        try:
            async with asyncio.timeout(timeout_s or min(self._config.step_timeout_s, left_s)):
                told = await episode.ask(message)
            seconds = time.monotonic() - begun
            episode.spent_s += seconds
            if "failure" in told:
                reason, trace = str(told["failure"]), str(told.get("traceback", ""))
                answer = EnvironmentFailure("error", f"{verb}: {reason}"[:600], trace, seconds)
            else:
                answer = read(told, seconds)
        except TimeoutError:
            answer = EnvironmentFailure(
                "timeout", self._lateness(verb, left_s), seconds=time.monotonic() - begun
            )
        except EndedError as ended:
            answer = EnvironmentFailure(
                "error", f"{verb}: its process ended: {ended}", seconds=time.monotonic() - begun
            )
        except (NonsenseError, KeyError, TypeError, ValueError) as error:
            answer = EnvironmentFailure(
                "error",
                f"{verb}: its process sent nonsense: {error}",
                seconds=time.monotonic() - begun,
            )
        finally:
            if not isinstance(answer, Observation | list):  # cancelled, too: nothing is left open
                self._kill(key)
        return self._failed(answer) if isinstance(answer, EnvironmentFailure) else answer

    def _lateness(self, verb: str, left_s: float) -> str:
        if left_s < self._config.step_timeout_s:
            return f"{verb}: the episode took more than {self._config.episode_timeout_s:g} s in all"
        return f"{verb}: no answer within {self._config.step_timeout_s:g} s"

    def _failed(self, failure: EnvironmentFailure) -> EnvironmentFailure:
        known = failure.reason in self._failures or len(self._failures) < _REASONS_KEPT
        self._failures[failure.reason if known else "other reasons"] += 1
        return failure

    def _kill(self, key: str) -> None:
        episode = self._episodes.pop(key, None)
        if episode is not None:
            self._end(episode, 0.0)

    def _end(self, episode: Episode, politely_s: float) -> None:
        task = asyncio.get_running_loop().create_task(episode.end(politely_s))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _worker(self) -> EnvironmentWorker:
        """The worker with the fewest episodes; those that are lost are replaced."""
        async with self._starting:
            if self._closed:
                raise EndedError("the environments have been shut down")
            lost = [worker for worker in self._workers if worker.lost]
            for worker in lost:
                self._workers.remove(worker)
                await worker.close()
                self._workers.append(await self._started_worker())
            while len(self._workers) < self._config.workers:  # a replacement did not start
                self._workers.append(await self._started_worker())
        return min(self._workers, key=lambda worker: len(worker.episodes))

    async def _started_worker(self) -> EnvironmentWorker:
        worker = EnvironmentWorker(self._settings, self._config.readable)
        await worker.start()
        return worker

    def _read_reset(self, told: Mapping[str, Any], seconds: float) -> Observation:
        text = checked_text(told["observation"], "the first observation", 2 * self._limit)
        return Observation(text, seconds=seconds)

    def _read_step(self, told: Mapping[str, Any], seconds: float) -> Observation:
        step: Step = read_step(told, 2 * self._limit)
        return Observation(
            step.observation, step.reward, step.done, step.state, step.results, seconds
        )


def _read_reward(told: Mapping[str, Any], seconds: float) -> Observation:
    return Observation(reward=checked_reward(told["reward"], "the reward"), seconds=seconds)


def _read_tools(told: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    return [dict(tool) for tool in told["tools"]]
