"""Every architecture of the matrix on a real vLLM engine: loaded, updated twice, resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, LONGEST, VOCABULARY, save_model
from engine_beside import EngineBeside, EngineError, engine_beside
from learner_models import random_groups, trajectories
from learner_ranks import sampled_gap, untimed, weights, worker

from common.errors import RefutedError
from common.weights.transport import Receivers
from learner.training.rank import LearnerRank
from learner.weights.canary import Canary, CanaryProof, largest_gap

pytestmark = [pytest.mark.models, pytest.mark.timeout(800)]
SHAPES = [(21, (5, 40)), (60, (50, 12)), (30, (8, 1))]
TRAINED = {name: case for name, case in ARCHITECTURES.items() if not case.learner_refuses}
REFUSED = {name: case for name, case in TRAINED.items() if case.engine_refuses}
SERVED = [name for name in TRAINED if name not in REFUSED]
Note = Callable[[str, str, float | str], None]


def canary() -> Canary:
    """Sequences of 26 and 90 tokens, and one past every window."""
    prompts = [[*p.tolist(), *c.tolist()] for p, (c, *_) in random_groups(SHAPES[:2], 1, 512)]
    return Canary.from_prompts(prompts, 24, 64, LONGEST)


def prompts() -> list[list[int]]:
    return [prompt.tolist() for prompt, _ in random_groups(SHAPES, 2, VOCABULARY)]


def gap(rank: LearnerRank, engine: EngineBeside) -> float:
    fixed = canary()
    arguments = (fixed.sequences, fixed.prompt_lengths)
    return largest_gap(rank.score(*arguments), engine.score(*arguments))


def step(rank: LearnerRank, number: int) -> dict[str, float]:
    batch = trajectories(SHAPES, seed=number, version=number - 1, vocabulary=VOCABULARY)
    return untimed(rank.step(batch, number - 1, 0))


@pytest.mark.parametrize("name", SERVED)
def test_two_updates_and_a_resume(name: str, tmp_path: Path, note: Note) -> None:
    folder, saved = save_model(tmp_path / "model", name), tmp_path / "step-2"
    settings = {"learning_rate": 1e-2, "max_length": LONGEST, "temperature": 0.7}
    with worker(folder, **settings) as rank:
        rank.open_transport(Receivers([], 1, 1.0))
        before = rank.score(canary().sequences, canary().prompt_lengths)
        with engine_beside(folder, LONGEST) as engine:
            gaps = [gap(rank, engine)]
            for version in range(3):  # the first is what the engine has
                if version:
                    step(rank, version)
                engine.update(rank.export_weights(version).buckets, version)
                gaps.append(gap(rank, engine))
            sampled = sampled_gap(rank, engine, prompts(), temperature=0.7, max_tokens=40)
        second = rank.score(canary().sequences, canary().prompt_lengths)
        rank.take_checkpoint({})
        rank.write_checkpoint(str(saved))
        third, expected = step(rank, 3), weights(rank)
    for column, value in zip(("loaded", "v0", "v1", "v2"), gaps, strict=True):
        note(name, column, value)
    note(name, "sampled", sampled)
    assert largest_gap(before, second) > 0.1  # the updates have moved the policy
    rounding = ARCHITECTURES[name].rounding
    assert max(*gaps, sampled) < rounding

    with engine_beside(saved, LONGEST) as engine:
        reread = engine.score(canary().sequences, canary().prompt_lengths)
    note(name, "checkpoint", largest_gap(second, reread))
    assert largest_gap(second, reread) < rounding
    with worker(saved, **settings) as rank:
        rank.load_checkpoint(str(saved))
        assert step(rank, 3) == third
        found = weights(rank)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


class Scores:
    """A learner whose scores a proof compares with."""

    def __init__(self, rank: LearnerRank) -> None:
        self._rank = rank

    async def score(self, sequences: list[list[int]], lengths: list[int]) -> list[list[float]]:
        return self._rank.score(sequences, lengths)


@pytest.mark.parametrize(("name", "dtype"), [("granitemoe", "bfloat16"), ("olmoe", "float32")])
def test_experts_as_vllm_leaves_them_are_refuted(name: str, dtype: str, tmp_path: Path) -> None:
    """In bfloat16 the gap stays below the tolerance: what it was before the update tells."""
    folder = save_model(tmp_path, name)
    with worker(folder, max_length=LONGEST, dtype=dtype) as rank:
        rank.open_transport(Receivers([], 1, 1.0))
        proof = CanaryProof(Scores(rank), canary(), 0.2, 10.0)
        asyncio.run(proof.expect(0))
        with engine_beside(folder, LONGEST, dtype, mended=False) as engine:
            for updated in (False, True):
                if updated:
                    engine.update(rank.export_weights(0).buckets, 0)
                theirs = engine.score(proof.canary.sequences, proof.canary.prompt_lengths)
                with pytest.raises(RefutedError) if updated else nullcontext():
                    proof.prove(0, {"beside": theirs})


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_does_not_serve_here_is_an_error(name: str, tmp_path: Path, note: Note) -> None:
    folder = save_model(tmp_path, name)
    with (
        pytest.raises(EngineError, match=REFUSED[name].engine_refuses),
        engine_beside(folder, LONGEST) as engine,
    ):
        engine.score([[5, 6, 7, 8]], [1])
    note(name, "refused by vLLM", REFUSED[name].engine_refuses)
