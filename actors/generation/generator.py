"""A generator: one vLLM engine in one Ray actor; groups in, Arrow record batches out.

Weight updates arrive while it generates. Requests are frozen for the length of an update and go on
with the new weights. Every token says which version sampled it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actors.data.contexts import with_feedback
from actors.environments.actor import EnvironmentActor
from actors.environments.client import EnvironmentClient
from actors.environments.host import EnvironmentHost
from actors.generation.engine import Completion, Engine, device_bytes, import_vllm
from actors.generation.episodes import Episode, Player
from actors.generation.follow_ups import follow_up_texts, follow_ups, said
from actors.generation.rows import is_greedy, rollout_batch, with_guidance
from actors.generation.texts import Texts, ending_tokens
from actors.generation.under_way import WHOLE, Batches, UnderWay
from common.config.sections import (
    AdapterConfig,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    ModelConfig,
)
from common.record.parts import learnt
from common.supervision.calls import Handle
from common.supervision.faults import reached
from common.supervision.stacks import arm
from common.trajectory import GroupRequest
from common.weights.registry import TRANSPORTS

if TYPE_CHECKING:
    from actors.endpoint.agents import Agents
    from common.weights.transport import StoredBucket

_GATHER_S = 2.0
"""Completions that end within this time of each other are verified together."""


class Generator:
    """Serves groups, canary scores and weight updates; all methods are coroutines."""

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        config: GeneratorConfig,
        transport: str,
        seed: int,
        version: int,
        cores: list[int] | None,
        locate: Callable[[str], str] = str,
        environment: EnvironmentConfig | None = None,
        data: DataConfig | None = None,
        environments: Sequence[Handle[EnvironmentActor]] = (),
        adapter: AdapterConfig | None = None,
    ) -> None:
        """Keep the settings; `start` loads the model.

        Args:
            transport: name of the weight transport.
            version: number of the weights in the model's folder.
            cores: CPU cores of this process; None leaves it where it is.
            locate: gives the model's folder on this node for that of the driver.
            environment: what episodes are played in; without a name they are one answer each.
            data: says how the messages of an environment are rendered.
            environments: actors in which episodes are played; none has them played beside this.
            adapter: what updates bring, to stand beside the weights in the model's folder; None
                where they bring weights.
        """
        self._name = name
        self._locate = locate
        self._model = model
        self._config = config
        self._transport = TRANSPORTS[transport]
        self._seed = seed
        self._version = version
        self._cores = cores
        self._engine: Engine | None = None
        self._texts: Texts | None = None
        self._tokenizer: Any = None
        self._environment = environment or EnvironmentConfig()
        self._data = data or DataConfig()
        self._environments = environments
        self._adapter = adapter
        self._host: EnvironmentHost | EnvironmentClient | Agents | None = None
        self._player: Player | Agents | None = None
        self._scored = 0
        self._under_way = UnderWay()
        self._update_began = 0.0

    async def device_bytes(self) -> int:
        """Memory of the CUDA device on which `start` will start the engine."""
        return await asyncio.to_thread(device_bytes)

    async def start(self, cache_bytes: int | None = None) -> int:
        """Start the engine; returns this process's id.

        Args:
            cache_bytes: of the key-value cache on each CUDA device; None leaves that to vLLM.
        """
        arm()
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)  # of this thread and those the engine starts
        import_vllm()
        from transformers import AutoTokenizer

        folder = await asyncio.to_thread(self._locate, self._model.path)
        self._model = replace(self._model, path=folder)
        tokenizer = AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )
        self._tokenizer = tokenizer
        self._texts = Texts(tokenizer, ending_tokens(tokenizer, folder), self._config.stop)
        self._engine = await Engine.start(
            self._model,
            self._config,
            self._transport,
            self._seed,
            self._version,
            cache_bytes,
            self._adapter,
        )
        if self._environment.command is not None:
            await self._start_agents(self._environment, tokenizer)
        elif self._environment.name is not None:
            await self._start_environment(tokenizer)
        return os.getpid()

    async def _start_agents(self, environment: EnvironmentConfig, tokenizer: Any) -> None:
        from actors.endpoint.agents import Agents
        from actors.rendering.renderer import Renderer

        def start_renderer(tools: Sequence[Mapping[str, Any]]) -> Renderer:
            return Renderer.start(
                tokenizer,
                self._data,
                tools=tools,
                tool_parser=environment.tool_parser,
                thoughts=environment.thoughts,
            )

        agents = Agents(environment, start_renderer, self._turn, self._model.max_length)
        await agents.start()
        self._host = self._player = agents

    async def _turn(
        self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Sample a turn of an episode."""
        sampled = await self.engine.generate(request_id, prompt_ids, sampling)
        reached("turn sampled")
        return sampled

    async def _start_environment(self, tokenizer: Any) -> None:
        from actors.rendering.renderer import Renderer

        config, pool = self._environment, self._environments
        pooled = EnvironmentClient(config, self._name, pool) if pool else None
        self._host = host = pooled or EnvironmentHost(config)
        await host.start()
        self._player = Player(
            self._environment,
            host,
            Renderer.of_environment(tokenizer, self._data, self._environment, host.tools),
            tokenizer,
            self._turn,
            self._model.max_length,
        )

    @property
    def engine(self) -> Engine:
        """The engine, which `start` has started."""
        if self._engine is None:
            raise RuntimeError(f"{self._name} was used before start()")
        return self._engine

    async def generate_group(self, request: GroupRequest) -> tuple[pa.RecordBatch | None, int]:
        """Sample the first part of a group: its first batch, and the number of what is behind it.

        `actors.generation.under_way` says what the number means. `more_of` gives the rest.

        A batch holds completions that ended within two seconds of each other. So a straggler holds
        up the verification of no other, and a group of equal lengths is one batch. Completions not
        done after `request.cap_s` are aborted and are in no batch.
        """
        return await self.more_of(self._under_way.begin(self._sample_all(request.apart())))

    async def more_of(self, number: int) -> tuple[pa.RecordBatch | None, int]:
        """The next batch of a group that is under way, and the number of what is behind it."""
        return await self._under_way.next_of(number)

    async def follow_up(self, request: GroupRequest, *judged: pa.RecordBatch) -> tuple[int, int]:
        """What a group asks for after its verdicts: how many completions, and their number.

        `more_of` samples them, under a cap of their own. Without any the number is `WHOLE`.

        Args:
            judged: the batches of the first part.
        """
        asked = follow_ups(request, said(judged), follow_up_texts(request, self._tokenizer))
        count = sum(each.num_completions for each in asked)
        return count, self._under_way.begin(self._sample_all(asked)) if count else WHOLE

    async def _sample_all(self, asked: Sequence[GroupRequest]) -> Batches:
        """Sample the completions of requests of one group, side by side."""
        tasks = {
            asyncio.create_task(self._sample(request, index)): (place, index)
            for place, request in enumerate(asked)
            for index in range(request.num_completions)
        }
        cap_s = asked[0].cap_s
        ends = math.inf if cap_s is None else time.monotonic() + cap_s
        pending = set(tasks)
        try:
            while pending and (left_s := ends - time.monotonic()) > 0:
                done, pending = await _finished(pending, left_s)
                sampled = {tasks[task]: task.result() for task in done}
                if sampled:
                    reached("completion sampled")
                    batch = self._batch(asked, dict(sorted(sampled.items())))
                    yield batch, bool(pending) and time.monotonic() < ends
        finally:
            for task in pending:
                task.cancel()

    async def _sample(self, request: GroupRequest, index: int) -> Completion:
        """Completion `index`; the last `num_guided` ones begin with the guidance.

        The first is greedy, where the request wants that.
        """
        # Only the player knows how to go on from the beginning of an episode.
        assert request.begun is None or isinstance(self._player, Player), "begun, and not played"
        guidance: list[int] = []
        if index >= request.num_completions - request.num_guided:
            guidance = list(request.guidance_ids)
        sampling: dict[str, Any] = {
            "temperature": 0.0 if is_greedy(request, index) else request.temperature,
            "max_tokens": request.max_tokens - len(guidance),
            "stop": self._config.stop,
        }
        seeded = request.seed is not None and self._config.max_staleness == 0
        if self._player is not None:
            del sampling["max_tokens"]  # a turn has its own
            episode = await self._player.play(request, index, sampling, seeded)
            reached("episode closed")
            return episode
        place = request.first_index + index
        if request.seed is not None and seeded:
            sampling["seed"] = request.seed + place
        sampled = await self.engine.generate(
            f"group-{request.group_id}-{place}-{request.dispatched_s}",
            (list(request.sampled_behind) or request.prompt_ids) + guidance,
            sampling,
        )
        return with_guidance(sampled, guidance, request.dispatch_version) if guidance else sampled

    def _batch(
        self, asked: Sequence[GroupRequest], sampled: dict[tuple[int, int], Completion]
    ) -> pa.RecordBatch:
        """Completions by request and index in it, as one batch."""
        found = [
            self._rows(request, {index: one for (of, index), one in sampled.items() if of == place})
            for place, request in enumerate(asked)
            if any(of == place for of, _ in sampled)
        ]
        return found[0] if len(found) == 1 else pa.concat_batches(found)

    def _rows(self, request: GroupRequest, sampled: dict[int, Completion]) -> pa.RecordBatch:
        assert self._texts is not None, "start() was not called"
        texts = [
            one.text if isinstance(one, Episode) else self._texts.text(one)
            for one in sampled.values()
        ]
        return rollout_batch(
            request,
            sampled,
            texts,
            self._name,
            contexts=[self._context(request, one) for one in sampled.values()],
            spans=[
                self._texts.answer_span(one, request.answer_pattern)
                if request.answer_pattern
                else (0, 0)
                for one in sampled.values()
            ],
        )

    def _context(self, request: GroupRequest, one: Completion) -> list[int]:
        feedback = one.feedback if isinstance(one, Episode) else ""
        return with_feedback(request.context_ids, feedback, self._tokenizer)

    async def score(
        self, sequences: list[list[int]], prompt_lengths: list[int]
    ) -> list[list[float]]:
        """Score sequences behind their prompts under the weights held now.

        Returns:
            Log-probabilities at temperature 1, in nats, a list for each sequence.
        """
        self._scored += 1
        requests = [
            self.engine.score(f"score-{self._scored}-{index}", sequence, length)
            for index, (sequence, length) in enumerate(zip(sequences, prompt_lengths, strict=True))
        ]
        return list(await asyncio.gather(*requests))

    async def score_group(self, batch: pa.RecordBatch) -> tuple[npt.NDArray[np.float32], None]:
        """Log-probability at temperature 1 of every token of a group, nats, row behind row.

        Completions that the learner does not get are left out. The second is an acknowledgement,
        fetched by who has no use for the first.
        """
        batch, names = learnt(batch), ("prompt_ids", "token_ids")
        prompts, sampled = (batch.column(name).to_pylist() for name in names)
        kept = [(p, t) for p, t in zip(prompts, sampled, strict=True) if t]
        found = await self.score([p + t for p, t in kept], [len(p) for p, _ in kept])
        return np.array([value for row in found for value in row], np.float32), None

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Pass the transport's start-up parameters to the engine (nccl, ipc)."""
        await self.engine.init_weight_transfer(init_info)

    async def begin_update(self) -> None:
        """Freeze generation and open a weight update of vLLM's own transports (nccl, ipc)."""
        self._update_began = time.monotonic()
        await self.engine.begin_update()

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take part of an update as vLLM's own transports describe it (nccl, ipc)."""
        await self.engine.receive_weights(update_info)

    async def end_update(self, version: int) -> float:
        """Close the update and go on; returns the seconds generation stood still."""
        await self.engine.end_update(version)
        return time.monotonic() - self._update_began

    async def sleep(self) -> None:
        """Leave the device to the learner (ipc)."""
        await self.engine.sleep()

    async def wake_weights(self) -> None:
        """Make room for the weights of an update (ipc)."""
        await self.engine.wake_weights()

    async def wake_cache(self) -> None:
        """Serve again (ipc)."""
        await self.engine.wake_cache()

    async def update_weights(self, buckets: list[StoredBucket], version: int) -> float:
        """Load a whole update; returns the seconds for which generation stood still.

        Raises:
            WeightsError: a bucket is not what the learner packed. Nothing has been loaded.
        """
        return await self._transport.receive(self.engine, buckets, version)

    async def ping(self) -> None:
        """A sign of life."""

    async def shutdown(self) -> None:
        """End the environment and the engine."""
        if self._host is not None:
            await self._host.shutdown()
            self._host = self._player = None
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
            self._engine = None


async def _finished(
    pending: set[asyncio.Task[Completion]], timeout_s: float
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    """Wait for the next task to end and for what ends within `_GATHER_S` after it.

    Returns:
        The tasks that ended, and those still pending.
    """
    timeout = None if math.isinf(timeout_s) else timeout_s
    done, pending = await asyncio.wait(
        pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
    )
    if done and pending:
        more, pending = await asyncio.wait(pending, timeout=min(_GATHER_S, timeout_s))
        done |= more
    return done, pending
