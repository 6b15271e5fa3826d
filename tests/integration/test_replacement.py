"""What becomes of groups when a generator, a verifier or the log's writer dies, on real Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayActorError

from actors.rollout.pools import (
    GeneratorPool,
    GroupLostError,
    VerifierPool,
    start_generators,
    warm_up_verifiers,
)
from actors.verifiers.base import Verdict
from actors.verifiers.judge import judgement
from actors.verifiers.worker import with_verdicts
from common.errors import RunError, StallError, WeightsError
from common.record.trajectory_log import read_log
from common.record.writer import TrajectoryLogClient, TrajectoryLogWriter
from common.supervision.calls import Handle, ask_pair, start_actor
from common.supervision.faults import MARK, VARIABLE
from common.supervision.replacement import Replacement
from common.supervision.waits import Waits
from common.trajectory import GroupRequest
from common.weights.transport import Scorer
from tests.integration.mortal import Mortal, SecondTime, Stillborn

pytestmark = pytest.mark.usefixtures("local_ray")


def actor(kind: type[Mortal] = Mortal) -> Any:
    return start_actor(kind, {"num_cpus": 0, "max_concurrency": 100})


def verified(index: int) -> pa.RecordBatch:
    from made_up_groups import group  # not found by Ray's workers, which import this file

    return with_verdicts(group(index), ["rule"], [judgement([Verdict.scored(1.0)], [1.0])] * 2)


def replacement(said: list[str], pauses: list[float] | None = None) -> Replacement[Any]:
    """Allows as many restarts as there are `pauses`."""
    left = pauses if pauses is not None else [0.0] * 10

    def allow(error: BaseException) -> float:
        if not left:
            raise RunError("too many failures")
        return left.pop()

    return Replacement(lambda name: actor(SecondTime), allow, said.append, 60.0)


def request(text: str) -> GroupRequest:
    return GroupRequest(0, 0, "p", 0, "?", text, [1], "{}", 1, 10, 1.0, 0, 0.0)


async def versions(pool: GeneratorPool, text: str) -> list[int]:
    refs = [ref async for ref in pool.generate(request(text), 30.0)]
    return [batch.column("version")[0].as_py() for batch in [await ref for ref in refs]]


async def generators(count: int, by: Replacement[Any] | None, **settings: Any) -> GeneratorPool:
    """`count` that are up; one that dies is replaced `by`."""
    handles: dict[str, Any] = {f"generator-{index}": actor() for index in range(count)}
    await start_generators(handles, Waits(), 60.0)
    return GeneratorPool(handles, Waits(), 0, by, **settings)


def test_a_generator_that_dies_comes_back_with_the_newest_weights() -> None:
    async def main() -> None:
        said: list[str] = []
        pool = await generators(1, replacement(said))
        await pool.update_weights(["fine"], 3, 30.0)
        with pytest.raises(GroupLostError, match="generator-0 died with group 0"):
            await versions(pool, "die")
        assert await versions(pool, "live") == [3]
        assert len(said) == 1
        assert "generator-0 died and starts again" in said[0]

    asyncio.run(main())


def test_a_generator_that_comes_back_is_proved_before_it_serves() -> None:
    async def main() -> None:
        proved: list[tuple[str, int, float]] = []

        async def proof(name: str, version: int, score: Scorer) -> None:
            ((logprob,),) = await score([[1, 2]], [1])
            proved.append((name, version, logprob))
            if len(proved) == 2:
                raise WeightsError("not the learner's")

        pool = await generators(1, replacement([]), proof=proof)
        await pool.update_weights(["fine"], 3, 30.0)
        with pytest.raises(GroupLostError):
            await versions(pool, "die")
        assert proved == [("generator-0", 3, -3.0)]
        assert await versions(pool, "live") == [3]
        with pytest.raises(WeightsError, match="not the learner's"):
            await versions(pool, "die")
        assert len(proved) == 2

    asyncio.run(main())


def test_a_newcomer_that_dies_as_it_starts_gets_a_successor() -> None:
    async def main() -> None:
        said: list[str] = []
        kinds = [SecondTime, Stillborn]
        by = replace(replacement(said), make=lambda name: actor(kinds.pop()))
        pool = await generators(1, by)
        with pytest.raises(GroupLostError):
            await versions(pool, "die")
        assert await versions(pool, "live") == [0]
        assert len(said) == 2

    asyncio.run(main())


def test_others_serve_while_one_starts_again_and_it_starts_once() -> None:
    async def main() -> None:
        said: list[str] = []
        pool = await generators(2, replacement(said, [10.0]))
        dying = [asyncio.create_task(versions(pool, "die"))]
        while not said:  # that it is down
            await asyncio.sleep(0.05)
        served = await asyncio.wait_for(
            asyncio.gather(*[versions(pool, "live") for _ in range(8)]), 9.0
        )
        assert served == [[0]] * 8
        assert isinstance((await asyncio.gather(*dying, return_exceptions=True))[0], GroupLostError)
        assert len(said) == 1

    asyncio.run(main())


def test_a_pool_that_may_shrink_goes_on_and_grows_again() -> None:
    """Updates do not wait for who is not there; who comes has the newest weights."""

    async def main() -> None:
        nodes = asyncio.Event()

        async def room(name: str) -> None:
            await nodes.wait()

        by = replace(replacement([]), room=room)
        async with await generators(2, by, min_live=1, to_come=["generator-2"]) as pool:
            with pytest.raises(GroupLostError):
                await versions(pool, "die")
            assert len(pool.handles) == 1
            await asyncio.wait_for(pool.update_weights(["fine"], 4, 30.0), 5.0)
            assert await versions(pool, "live") == [4]
            asyncio.get_running_loop().call_later(0.05, nodes.set)
            await pool.update_weights(["fine"], 5, 30.0)
            while len(pool.handles) < 3:
                await pool.ping(30.0)
                await asyncio.sleep(0.05)
            held = await pool.score([[1]], [1], 30.0)
            assert held == {f"generator-{index}": [[-5.0]] for index in range(3)}

    asyncio.run(main())


def test_a_member_that_never_comes_back_is_a_stall_and_the_others_show_signs_of_life() -> None:
    """Its node is gone and no other comes: an update must not wait for ever, nor the heartbeat."""

    async def main() -> None:
        async def never(name: str) -> None:
            await asyncio.Event().wait()

        by = replace(replacement([]), room=never, deadline_s=0.2)
        async with await generators(2, by) as pool:
            with pytest.raises(GroupLostError):
                await versions(pool, "die")
            await asyncio.wait_for(pool.ping(30.0), 10.0)
            with pytest.raises(
                StallError, match=r"generators waited .* 2 of them to serve \(gener"
            ):
                await asyncio.wait_for(pool.update_weights(["fine"], 4, 30.0), 10.0)

    asyncio.run(main())


def test_an_update_that_comes_while_a_newcomer_loads_is_loaded_too() -> None:
    async def main() -> None:
        proved: list[int] = []

        async def proof(name: str, version: int, score: Scorer) -> None:
            proved.append(version)
            if len(proved) == 1:
                await pool.update_weights(["fine"], 7, 30.0)

        pool = await generators(2, replacement([]), proof=proof, min_live=1)
        with pytest.raises(GroupLostError):
            await versions(pool, "die")
        while len(pool.handles) < 2:
            await asyncio.sleep(0.05)
        held = await pool.score([[1]], [1], 30.0)
        assert held == {f"generator-{index}": [[-7.0]] for index in range(2)}
        assert proved == [0, 7]

    asyncio.run(main())


def test_a_newcomer_that_cannot_come_ends_a_pool_that_goes_on_without_it() -> None:
    async def main() -> None:
        pool = await generators(2, replacement([], []), min_live=1)
        with pytest.raises(GroupLostError):
            await versions(pool, "die")
        await asyncio.sleep(0.05)
        with pytest.raises(RunError, match="too many failures"):
            await pool.ping(30.0)

    asyncio.run(main())


def test_a_generator_that_dies_of_an_update_gets_it_again() -> None:
    async def main() -> None:
        pool = await generators(2, replacement([]))
        await pool.update_weights(["deadly"], 5, 60.0)
        assert await versions(pool, "live") == [5]

    asyncio.run(main())


def test_too_many_deaths_end_the_run_and_none_may_be_forbidden() -> None:
    async def main() -> None:
        pool = await generators(1, replacement([], []))
        with pytest.raises(RunError, match="too many failures"):
            await versions(pool, "die")
        pool = await generators(1, None)
        with pytest.raises(RayActorError):
            await versions(pool, "die")

    asyncio.run(main())


def test_a_verifier_that_dies_is_asked_again() -> None:
    async def main() -> None:
        handles = {"verifier-0": actor()}
        await warm_up_verifiers(handles, Waits(), 60.0)
        pool = VerifierPool(handles, Waits(), replacement([]))
        small = ray.put(pa.record_batch({"a": [1]}))
        scored = await asyncio.gather(*[pool.score(0, small, 30.0) for _ in range(3)])
        assert [(await ref).num_rows for ref in scored] == [1, 1, 1]

    asyncio.run(main())


def test_completions_that_died_with_their_generator_are_the_groups_loss() -> None:
    async def main() -> None:
        handles = {"verifier-0": actor()}
        await warm_up_verifiers(handles, Waits(), 60.0)
        verifiers = VerifierPool(handles, Waits())
        dead = actor()
        dead.kill()
        with pytest.raises(GroupLostError):
            batch, _ = ask_pair(dead, Mortal.more_of, 0)
            await verifiers.score(0, batch, 30.0)

    asyncio.run(main())


def test_a_writer_that_dies_behind_the_log_does_not_write_twice(tmp_path: Path) -> None:
    faults = {VARIABLE: "kill@log appended#2", MARK: str(tmp_path / "mark")}

    def writer() -> Handle[TrajectoryLogWriter]:
        options = {"num_cpus": 0, "runtime_env": {"env_vars": faults}}
        return start_actor(TrajectoryLogWriter, options, str(tmp_path), ["rule"])

    async def main() -> None:
        again = Replacement(lambda name: writer(), lambda error: 0.0, lambda said: None, 60.0)
        log = TrajectoryLogClient(writer(), Waits(), 60.0, again)
        receipts = [await log.append(index, [ray.put(verified(index))]) for index in range(4)]
        assert [receipt.group_id for receipt in receipts] == [0, 1, 2, 3]
        for index, receipt in enumerate(receipts):
            batch = await receipt.batch_ref
            assert batch.column("group_id")[0].as_py() == index

    asyncio.run(main())
    logged = [batch.column("group_id")[0].as_py() for batch in read_log(tmp_path / "trajectories")]
    assert logged == [0, 1, 2, 3]
    assert list(tmp_path.glob("mark.*"))
