"""Adapters that travel alone (`weights.publish=adapter`), between a learner and a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import save_model
from engine_beside import EngineBeside, EngineError, engine_beside
from learner_models import random_groups, trajectories
from learner_ranks import SHAPES, sampled_gap, worker

from common.config.sections import AdapterConfig
from common.weights.transport import Receivers
from learner.training.rank import LearnerRank
from learner.weights.canary import largest_gap

pytestmark = pytest.mark.timeout(600)
LONGEST, ADAPTER, RATE = 128, AdapterConfig(rank=4, alpha=8), 1e-2
ROUNDING = 2e-5
"""Nats a token in float32, as in the matrix of architectures."""
FIXED = ([[5, 9, 3, 8, 11, 40, 7, 7, 12], list(range(4, 90))], [2, 40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), "llama_tied")


@pytest.fixture(scope="module")
def base(folder: Path) -> Iterator[tuple[EngineBeside, list[list[float]]]]:
    """An engine that every test has to itself, and what it scored before any adapter came."""
    with engine_beside(folder, LONGEST, adapter=ADAPTER) as engine:
        with pytest.raises(EngineError, match="came before the first adapter"):
            engine.sample([[5, 6, 7]], 1.0, 4)
        yield engine, engine.score(*FIXED)


@pytest.fixture
def engine(base: tuple[EngineBeside, list[list[float]]]) -> EngineBeside:
    return base[0]


@contextmanager
def learner(folder: Path, **changes: Any) -> Iterator[LearnerRank]:
    settings = {"adapter": ADAPTER, "publish": "adapter", "learning_rate": RATE, **changes}
    with worker(folder, max_length=LONGEST, temperature=1.0, **settings) as rank:
        rank.open_transport(Receivers([], 1, 1.0))
        yield rank


def step(rank: LearnerRank, number: int) -> list[Any]:
    """Train; the buckets of what came of it, version `number`."""
    rank.step(trajectories(SHAPES, seed=number, version=number - 1), number - 1, 0)
    return rank.export_weights(number).buckets


def gap(rank: LearnerRank, engine: EngineBeside) -> float:
    return largest_gap(rank.score(*FIXED), engine.score(*FIXED))


def sampling_gap(rank: LearnerRank, engine: EngineBeside) -> float:
    """Behind prompts that were there before, of whole blocks of the cache (32 tokens)."""
    prompts = [prompt.tolist() for prompt, _ in random_groups([(70, (1,)), (40, (1,))], 5, 64)]
    return sampled_gap(rank, engine, prompts, temperature=1.0, max_tokens=16)


def test_every_update_is_the_learners_policy_and_replaces_the_one_before(
    folder: Path, base: tuple[EngineBeside, list[list[float]]]
) -> None:
    engine, untouched = base
    with learner(folder) as rank:
        assert largest_gap(rank.score(*FIXED), untouched) < ROUNDING  # B is 0
        nothing = rank.export_weights(0)
        weights = sum(parameter.numel() for parameter in rank.trainer.policy.model.parameters())
        assert nothing.nbytes < weights  # in float32, adapters and all would be four times that
        engine.update(nothing.buckets, 0)
        assert engine.score(*FIXED) == untouched  # bit for bit
        for number in (1, 2):
            before = rank.score(*FIXED)
            newest = step(rank, number)
            assert largest_gap(before, rank.score(*FIXED)) > 50 * ROUNDING
            engine.update(newest, number)
            assert gap(rank, engine) < ROUNDING
            # A prefix that was cached under the adapter before would show here.
            assert sampling_gap(rank, engine) < ROUNDING
        second = engine.score(*FIXED)
        engine.update(nothing.buckets, 3)
        assert engine.score(*FIXED) == untouched
        with engine_beside(folder, LONGEST, adapter=ADAPTER) as fresh:
            fresh.update(newest, 2)
            assert fresh.score(*FIXED) == second


def test_without_a_new_salt_prefixes_of_the_old_adapter_would_be_served(
    folder: Path, engine: EngineBeside
) -> None:
    """vLLM marks what it caches with the adapter's name, which stays the same (vllm#42125)."""
    with learner(folder) as rank:
        engine.keep_salt(True)
        engine.update(rank.export_weights(0).buckets, 0)
        assert sampling_gap(rank, engine) < ROUNDING
        engine.update(step(rank, 1), 1)
        assert gap(rank, engine) < ROUNDING  # what is scored is cached for nobody
        assert sampling_gap(rank, engine) > 10 * ROUNDING
        engine.keep_salt(False)
        engine.update(rank.export_weights(1).buckets, 1)
        assert sampling_gap(rank, engine) < ROUNDING


def test_requests_under_way_go_on_with_the_new_adapter(folder: Path, engine: EngineBeside) -> None:
    with learner(folder) as rank:
        engine.update(rank.export_weights(0).buckets, 0)
        newest = step(rank, 1)
        found = engine.sample_through([[5, 6, 7 + n] for n in range(8)], 100, newest, 1)
        assert gap(rank, engine) < ROUNDING
    for tokens, versions in found:
        assert len(tokens) == len(versions)
        assert versions == sorted(versions)
    assert sum(set(versions) == {0, 1} for _, versions in found) >= 4


def test_of_a_damaged_update_nothing_is_loaded(folder: Path, engine: EngineBeside) -> None:
    with learner(folder) as rank:
        engine.update(rank.export_weights(0).buckets, 0)
        engine.update(step(rank, 1), 1)
        before, newest = engine.score(*FIXED), step(rank, 2)
        damaged = newest[-1].at(np.roll(newest[-1].buffer, 1))
        with pytest.raises(EngineError, match="arrived damaged"):
            engine.update([*newest[:-1], damaged], 2)
        assert engine.score(*FIXED) == before
        engine.update(newest, 2)  # sent again as a whole
        assert gap(rank, engine) < ROUNDING


def test_what_vllm_has_no_layer_for_is_refused_and_not_left_out(folder: Path) -> None:
    """vLLM would leave it out and say nothing."""
    narrow = AdapterConfig(rank=4, alpha=8, targets="q_proj,down_proj")
    with engine_beside(folder, LONGEST, adapter=narrow) as engine:
        with learner(folder, adapter=narrow) as rank:
            engine.update(rank.export_weights(0).buckets, 0)
            engine.update(step(rank, 1), 1)
            assert gap(rank, engine) < ROUNDING
        with learner(folder) as rank:
            wide = rank.export_weights(0).buckets
        with pytest.raises(EngineError, match=r"no layer of .* weights\.publish=merged"):
            engine.update(wide, 0)


def test_adapters_stand_beside_the_base_and_not_beside_a_checkpoint(
    folder: Path, engine: EngineBeside, tmp_path: Path
) -> None:
    """A checkpoint holds them already: there they would count twice."""
    with learner(folder) as rank:
        for number in (1, 2, 3):
            newest = step(rank, number)
        rank.take_checkpoint({})
        rank.write_checkpoint(str(tmp_path / "step-3"))
        engine.update(newest, 3)
        assert gap(rank, engine) < ROUNDING
        with engine_beside(tmp_path / "step-3", LONGEST, adapter=ADAPTER) as wrong:
            assert gap(rank, wrong) < ROUNDING
            wrong.update(newest, 3)
            assert gap(rank, wrong) > 50 * ROUNDING
