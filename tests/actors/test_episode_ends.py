"""Episodes that others end: the cap of their group, and an environment that never begins."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pyarrow as pa
import pytest
from generator_batches import batches_behind
from run_process import ROOT
from scripted_rollout import Append, Source, Writer, rollout_of

from actors.environments.host import EnvironmentHost
from actors.generation.engine import Completion
from actors.generation.episodes import Player
from actors.generation.generator import Generator
from actors.rendering.renderer import Renderer
from actors.verifiers.worker import VerifierWorker
from common.config.sections import (
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    ModelConfig,
    VerifierConfig,
    VerifierSpec,
)
from common.errors import VerifierError
from common.record.writer import receipt
from common.supervision.processes import descendants
from common.trajectory import GroupReceipt, GroupRequest
from deploy.models.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer()
DATA = DataConfig(
    template="chat", chat_template=str(ROOT / "tests" / "support" / "tiny_chat.jinja")
)


def request(
    group_id: int, count: int, cap_s: float | None = None, task: str = "{}"
) -> GroupRequest:
    return GroupRequest(
        group_id, group_id, "p", 0, "?", "?", [1], task, count, 200, 1.0, 0, 0.0, cap_s=cap_s
    )


async def generator(config: EnvironmentConfig, says: Callable[[str], str]) -> Generator:
    """One that plays in a real environment; the policy says what `says` gives for its key."""
    host = EnvironmentHost(config)
    await host.start()

    async def sample(key: str, token_ids: list[int], sampling: dict[str, Any]) -> Completion:
        said = [*TOKENIZER.encode(says(key)), TOKENIZER.eos_token_id]
        return Completion(said, [-0.5] * len(said), [0] * len(said), "stop")

    made = Generator("g", ModelConfig(path="x"), GeneratorConfig(), "object_store", 0, 0, None)
    made._host, made._environment = host, config
    renderer = Renderer.of_environment(TOKENIZER, DATA, config, host.tools)
    made._player = Player(config, host, renderer, TOKENIZER, sample, 512)
    made._texts = object()  # type: ignore[assignment]  # of answers; episodes have their own
    return made


async def batches_of(made: Generator, asked: GroupRequest) -> list[pa.RecordBatch]:
    return await batches_behind(made, made.generate_group(asked))


def test_the_cap_of_a_group_ends_episodes_in_their_environment() -> None:
    """One is asleep there: it is in no batch, and its process is ended with it."""

    async def main() -> None:
        config = EnvironmentConfig(name="patient_environments:Sleeper", step_timeout_s=60.0)
        made = await generator(config, lambda key: "100" if "-1-" in key else "0")
        assert made._host is not None
        idle = len(descendants(made._host.pids[0]))
        batches = await batches_of(made, request(5, 3, cap_s=4.0))
        rows = [row for batch in batches for row in batch.to_pylist()]
        assert sorted(row["completion_index"] for row in rows) == [0, 2]
        assert [row["environment_reward"] for row in rows] == [1.0, 1.0]
        async with asyncio.timeout(20):
            while made._host.open_episodes or len(descendants(made._host.pids[0])) > idle:
                await asyncio.sleep(0.05)
        await made.shutdown()

    asyncio.run(main())


class Reals(Append):
    """Appends batches as they are."""

    def receipt_of(self, refs: list[Any]) -> GroupReceipt:
        return receipt(pa.Table.from_batches(refs).combine_chunks().to_batches()[0], None)


def test_an_environment_that_never_begins_ends_the_run_with_its_reason() -> None:
    """Sixteen groups of two, each with a row and without a reward."""

    class Judges:
        def __init__(self) -> None:
            rules = [VerifierSpec(name="environment")]
            self.worker = VerifierWorker(VerifierConfig(rules=rules))

        async def score(self, group_id: int, batch: pa.RecordBatch, deadline_s: float) -> Any:
            return (await self.worker.score_group(batch))[0]

        async def failures(self, deadline_s: float) -> Counter[str]:
            return Counter(self.worker.failures())

    class Plays:
        version = 0

        def __init__(self, made: Generator) -> None:
            self.made = made

        async def generate(self, asked: GroupRequest, deadline_s: float) -> AsyncIterator[Any]:
            for batch in await batches_of(self.made, asked):
                assert batch.column("token_ids").to_pylist() == [[], []]
                assert batch.column("environment_verdict").to_pylist() == ["error"] * 2
                yield batch

    class Failing(Source):
        def next(self) -> Any:
            found = super().next()
            object.__setattr__(found, "reference", '{"do": "raise", "at": "reset"}')
            return found

    async def main() -> None:
        config = EnvironmentConfig(name="hostile_environments:Hostile")
        made = await generator(config, lambda key: "never")
        writer, judges = Writer(), Judges()
        writer.append = Reals()
        rollout = rollout_of(Failing(), writer, judges, Plays(made))
        try:
            with pytest.raises(ExceptionGroup) as raised:
                await asyncio.wait_for(rollout.loop.run(), 100)
        finally:
            judges.worker.close()
            await made.shutdown()
        assert raised.group_contains(
            VerifierError, match=r"16 groups in a row .*\n  32 times: reset: KeyError: 'shelf'"
        )

    asyncio.run(main())
