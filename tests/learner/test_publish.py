"""Publishing: order of things, and a canary that cannot be fooled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import RefutedError, UserError, WeightsError
from common.weights.device_to_device import Ipc
from common.weights.object_store import ObjectStore
from common.weights.transport import Shipment
from learner.weights.canary import Canary, CanaryProof, largest_gap
from learner.weights.publish import Publisher

CANARY = Canary.from_prompts([[1, 2, 3, 4], [5, 6]], scored_tokens=2)
SCORES = [[-1.0, -2.0], [-3.0]]


class FakeLearner:
    def __init__(self) -> None:
        self.exported: list[int] = []

    async def export_weights(self, version: int) -> Shipment:
        self.exported.append(version)
        return Shipment(nbytes=8)

    async def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        return SCORES


class FakeGenerators:
    def __init__(self, scores: dict[str, list[list[float]]]) -> None:
        self.scores = scores
        self.updated: list[int] = []
        self.version = 2

    def now_hold(self, version: int) -> None:
        self.version = version

    async def update_weights(self, buckets: list[Any], version: int, deadline_s: float) -> float:
        self.updated.append(version)
        return 0.25

    async def score(
        self, sequences: list[list[int]], lengths: list[int], deadline_s: float
    ) -> dict[str, list[list[float]]]:
        return self.scores


def publisher_between(
    learner: FakeLearner,
    generators: FakeGenerators,
    tolerance: float = 0.1,
    resends: int = 0,
    growth: float = 10.0,
) -> tuple[Publisher, CanaryProof]:
    proof = CanaryProof(learner, CANARY, tolerance, growth)
    send: Any = learner
    receive: Any = generators
    return Publisher(send, receive, ObjectStore(), proof, 1.0, resends), proof


def publish(scores: dict[str, list[list[float]]], tolerance: float = 0.1) -> dict[str, float]:
    learner, generators = FakeLearner(), FakeGenerators(scores)
    publisher, proof = publisher_between(learner, generators, tolerance)

    async def both_halves() -> dict[str, float]:
        exported = await publisher.export(3)
        assert (learner.exported, generators.updated) == ([3], [])
        return await publisher.deliver(exported)

    metrics = asyncio.run(both_halves())
    assert proof.proved == generators.version == 3
    return metrics


def test_the_canary_scores_the_end_of_each_prompt_but_never_its_first_token() -> None:
    assert CANARY.prompt_lengths == [2, 1]


def test_a_canary_goes_past_the_models_range_and_no_further_than_the_run() -> None:
    *short, long = Canary.from_prompts([[1, 2, 3], [4, 5]], 2, reach=6, max_length=20).sequences
    assert (short, long) == ([[1, 2, 3], [4, 5]], [1, 2, 3, 4, 5, 1, 2, 3])
    cut = Canary.from_prompts([[1, 2, 3], [4, 5]], 2, reach=6, max_length=8)
    assert (len(cut.sequences[-1]), cut.prompt_lengths[-1]) == (7, 5)


def test_prompts_of_one_token_score_nothing_and_are_left_out() -> None:
    assert Canary.from_prompts([[1], [2, 3]], scored_tokens=4).sequences == [[2, 3]]
    with pytest.raises(UserError, match=r"none of 1 prompts has two tokens.*data\.template"):
        Canary.from_prompts([[1]], scored_tokens=4)


def test_agreement_is_reported() -> None:
    metrics = publish({"generator-0": SCORES, "generator-1": [[-1.05, -2.05], [-3.0]]})
    assert metrics["canary/gap"] == pytest.approx(0.05)
    assert metrics["publish/stall"] == 0.25


def test_on_shared_devices_the_cache_comes_after_all_that_the_learner_computes() -> None:
    """The learner's pass over the canary needs the memory that the cache will take."""
    calls: list[str] = []

    class Both:
        async def sleep(self, deadline_s: float) -> None:
            calls.append("sleep")

        async def wake(self, part: str, deadline_s: float) -> None:
            calls.append(f"wake {part}")

        async def release_memory(self, deadline_s: float) -> None:
            calls.append("release")

        async def export_weights(self, version: int) -> Shipment:
            calls.append(f"send {version}")
            return Shipment(nbytes=8, stall_s=0.5)

        async def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
            calls.append("score")
            return SCORES

    async def main() -> Shipment:
        both: Any = Both()
        publisher = Publisher(both, both, Ipc(), CanaryProof(both, CANARY, 0.1, 10.0), 1.0)
        await publisher.make_room()
        return (await publisher.export(4)).shipment

    assert asyncio.run(main()).stall_s == 0.5
    assert calls == [
        *("sleep", "release", "wake weights", "send 4", "score", "release", "wake cache"),
    ]


def test_one_generator_with_other_weights_stops_the_run_and_is_named() -> None:
    with pytest.raises(WeightsError, match=r"version 3, generator-1 .*0\.5000 nats"):
        publish({"generator-0": SCORES, "generator-1": [[-1.0, -2.0], [-3.5]]})


def test_nan_never_passes() -> None:
    with pytest.raises(WeightsError, match="nan nats"):
        publish({"generator-0": [[float("nan"), -2.0], [-3.0]]})


def off_by(gap: float) -> list[list[float]]:
    return [[score - gap for score in scores] for scores in SCORES]


class Loading(FakeGenerators):
    """What one generator scores with what it has read, and after each update."""

    def __init__(self, *scores: list[list[float]]) -> None:
        super().__init__({"generator-0": scores[0]})
        self.after = list(scores[1:])

    async def update_weights(self, buckets: list[Any], version: int, deadline_s: float) -> float:
        if self.after:
            self.scores = {"generator-0": self.after.pop(0)}
        return await super().update_weights(buckets, version, deadline_s)


def begin(
    generators: FakeGenerators, versions: int = 0, *, loaded: bool = True, growth: float = 10.0
) -> list[float]:
    """The gaps of the version that a run begins with and of those that follow."""
    publisher, proof = publisher_between(FakeLearner(), generators, 0.2, growth=growth)

    async def main() -> list[float]:
        await publisher.begin(0, loaded=loaded)
        gaps = [publisher.gap]
        for version in range(1, versions + 1):
            metrics = await publisher.deliver(await publisher.export(version))
            gaps.append(metrics["canary/gap"])
        return gaps

    gaps = asyncio.run(main())
    assert generators.updated == list(range(versions + 1))
    assert proof.proved == versions
    return gaps


def test_the_version_that_a_run_begins_with_is_published_too() -> None:
    assert begin(Loading(off_by(0.003))) == [pytest.approx(0.003)]
    assert begin(Loading(off_by(0.5), off_by(0.003)), loaded=False) == [pytest.approx(0.003)]


def test_an_engine_that_computes_otherwise_ends_the_run_before_anything_is_published() -> None:
    generators = Loading(off_by(0.3))
    with pytest.raises(UserError, match=r"0\.3000 nats(?s:.*)have read the same folder"):
        begin(generators)
    assert generators.updated == []


@pytest.mark.parametrize("garbled", [0.0987, 0.02])
def test_an_engine_that_garbles_the_weights_it_had_ends_the_run(garbled: float) -> None:
    """Both are below the tolerance, and the second is below the growth that is allowed too."""
    with pytest.raises(UserError, match="the very same: it cannot be updated"):
        begin(Loading(off_by(0.0035), off_by(garbled)))


def test_a_jump_of_the_gap_is_refused_below_the_tolerance() -> None:
    same = off_by(0.0035)
    with pytest.raises(RefutedError, match=r"before was 0\.0035, and the most is 0\.05"):
        begin(Loading(same, same, off_by(0.0987)), 1)
    assert begin(Loading(same, same, off_by(0.0987)), 1, growth=float("inf"))[1] > 0.09


def test_rounding_passes_however_small_the_gaps_before_were() -> None:
    exact = off_by(0.0)
    assert begin(Loading(exact, exact, off_by(0.049)), 1)[1] == pytest.approx(0.049)
    with pytest.raises(RefutedError, match="version 1"):
        begin(Loading(exact, exact, off_by(0.051)), 1)


def test_a_gap_may_grow_over_many_versions() -> None:
    same = off_by(0.0035)
    rising = [off_by(gap) for gap in (0.01, 0.03, 0.06, 0.12, 0.19)]
    assert begin(Loading(same, same, *rising), 5)[-1] == pytest.approx(0.19)
    with pytest.raises(RefutedError, match=r"canary_tolerance=0\.2"):
        begin(Loading(same, same, *rising, off_by(0.21)), 6)


def test_the_gap_is_the_worst_sequence_not_the_average() -> None:
    assert largest_gap([[0.0], [0.0]], [[0.1], [0.5]]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="argument 2"):
        largest_gap([[0.0]], [[0.0], [0.0]])


class Forgetful(FakeGenerators):
    """The first `damaged` updates are damaged on the way."""

    def __init__(self, damaged: int) -> None:
        super().__init__({"generator-0": SCORES})
        self.damaged = damaged

    async def update_weights(self, buckets: list[Any], version: int, deadline_s: float) -> float:
        await super().update_weights(buckets, version, deadline_s)
        if len(self.updated) <= self.damaged:
            raise WeightsError("weight bucket a..b arrived damaged")
        return 0.25


def deliver(generators: FakeGenerators, resends: int) -> tuple[CanaryProof, dict[str, float]]:
    publisher, proof = publisher_between(FakeLearner(), generators, resends=resends)

    async def both_halves() -> dict[str, float]:
        return await publisher.deliver(await publisher.export(3))

    return proof, asyncio.run(both_halves())


def test_what_arrives_damaged_is_sent_again_as_a_whole() -> None:
    generators = Forgetful(damaged=2)
    proof, metrics = deliver(generators, resends=2)
    assert generators.updated == [3, 3, 3]
    assert metrics["publish/resends"] == 2
    assert proof.proved == 3


def test_what_arrives_damaged_again_and_again_is_not_proved() -> None:
    with pytest.raises(WeightsError, match="arrived damaged"):
        deliver(Forgetful(damaged=3), resends=2)


def test_what_the_canary_refutes_is_not_sent_again() -> None:
    """Tokens were sampled under its number; proved later, they would pass for the right ones."""
    generators = FakeGenerators({"generator-0": [[-9.0, -9.0], [-9.0]]})
    with pytest.raises(WeightsError, match="version 3, generator-0"):
        deliver(generators, resends=2)
    assert generators.updated == [3]


def test_who_waits_for_a_proof_hears_of_it_before_the_delivery_ends_and_of_its_failure() -> None:
    generators = FakeGenerators({"generator-0": SCORES})
    publisher, proof = publisher_between(FakeLearner(), generators)

    async def main() -> None:
        endless = asyncio.Event()

        async def delivery() -> None:
            await publisher.deliver(await publisher.export(3))
            await endless.wait()

        task = asyncio.create_task(delivery())
        await asyncio.wait_for(publisher.until_proved(3, task), 5.0)
        assert proof.proved == 3 and not task.done()
        endless.set()
        await task
        generators.scores = {"generator-0": [[0.0, 0.0], [0.0]]}
        failing = asyncio.create_task(publisher.deliver(await publisher.export(4)))
        with pytest.raises(WeightsError, match="version 4"):
            await asyncio.wait_for(publisher.until_proved(4, failing), 5.0)

    asyncio.run(main())


def test_a_generator_that_comes_later_is_held_to_the_same_canary() -> None:
    learner, generators = FakeLearner(), FakeGenerators({"generator-0": SCORES})
    publisher, proof = publisher_between(learner, generators)
    answers = [SCORES, [[-1.0, -2.0], [-4.0]]]

    async def score(sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        assert (sequences, lengths) == (CANARY.sequences, CANARY.prompt_lengths)
        return answers.pop(0)

    async def main() -> None:
        await proof.prove_newcomer("generator-1", 0, score)
        assert len(answers) == 2  # the learner had nothing to compare with
        await publisher.begin(0, loaded=True)
        await publisher.deliver(await publisher.export(1))
        await proof.prove_newcomer("generator-1", 1, score)
        with pytest.raises(WeightsError, match=r"version 0, generator-1 .*1\.0000 nats"):
            await proof.prove_newcomer("generator-1", 0, score)
        await publisher.export(2)
        await proof.prove_newcomer("generator-1", 0, score)  # asks nothing: answers are used up

        async def overtaken(sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
            for version in (3, 4):  # while it scores, two more versions come
                await publisher.export(version)
            return [[-1.0, -2.0], [-5.0]]

        with pytest.raises(WeightsError, match=r"version 2, generator-1 .*2\.0000 nats"):
            await proof.prove_newcomer("generator-1", 2, overtaken)

    asyncio.run(main())
