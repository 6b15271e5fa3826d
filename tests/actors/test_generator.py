"""The generator's record batches: plain and guided completions."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import judged_groups
import numpy as np
import pytest
from chat_templates import FAMILIES
from generator_batches import batches_behind

from actors.generation.engine import Completion
from actors.generation.generator import Generator
from actors.generation.rows import rollout_batch, with_guidance
from actors.generation.texts import Texts
from actors.sandbox.verdict import Verdict
from actors.verifiers.judge import Judgement
from actors.verifiers.worker import with_verdicts
from common.config.environment import EnvironmentConfig
from common.config.sections import DataConfig, GeneratorConfig, ModelConfig
from common.errors import UserError
from common.record.ledger import outcomes_of
from common.record.schema import rollout_schema
from common.record.writer import receipt
from common.trajectory import GroupRequest


def request(**changes: Any) -> GroupRequest:
    return judged_groups.request(**({"epoch": 1, "num_completions": 4, "max_tokens": 10} | changes))


class FakeEngine:
    """Answers with the prompt's length after `delays[i]` seconds, in order of asking."""

    def __init__(self, delays: Sequence[float] = ()) -> None:
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.delays = list(delays)
        self.aborted = 0

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        self.asked.append((prompt_ids, sampling))
        try:
            await asyncio.sleep(self.delays.pop(0) if self.delays else 0.0)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        return Completion([len(prompt_ids)] * 2, [-0.5, -0.25], [3, 4], "stop")


class FakeTokenizer:
    def decode(self, token_ids: list[int], **_: bool) -> str:
        return " ".join(map(str, token_ids))


def batches_of(group: GroupRequest, engine: FakeEngine) -> list[Any]:
    generator = Generator("g", ModelConfig(path="x"), GeneratorConfig(), "object_store", 0, 0, None)
    generator._engine = engine  # type: ignore[assignment]
    generator._texts = Texts(FakeTokenizer(), [], [])

    batches = asyncio.run(batches_behind(generator, generator.generate_group(group)))
    assert len(generator._under_way) == 0
    return batches


def sample(group: GroupRequest) -> tuple[Any, FakeEngine]:
    engine = FakeEngine()
    (batch,) = batches_of(group, engine)
    return batch, engine


def test_a_plain_group_is_one_batch_of_n_completions() -> None:
    batch, engine = sample(request())
    assert engine.asked == [([1, 2], {"temperature": 1.0, "max_tokens": 10, "stop": []})] * 4
    assert batch.schema.equals(rollout_schema())
    assert batch.column("completion_index").to_pylist() == [0, 1, 2, 3]
    assert batch.column("guidance_length").to_pylist() == [0] * 4


def test_a_straggler_does_not_hold_up_the_verification_of_the_others() -> None:
    first, last = batches_of(request(), FakeEngine([0.0, 2.3, 0.1, 0.0]))
    assert first.column("completion_index").to_pylist() == [0, 2, 3]
    assert last.column("completion_index").to_pylist() == [1]


def test_beyond_the_cap_what_is_unfinished_is_aborted_and_left_out() -> None:
    engine = FakeEngine([0.0, 60.0, 0.0, 60.0])
    (batch,) = batches_of(request(cap_s=0.2), engine)
    assert batch.column("completion_index").to_pylist() == [0, 2]
    assert engine.aborted == 2
    assert batches_of(request(cap_s=0.2), FakeEngine([60.0] * 4)) == []


def test_guidance_leads_the_last_completions_and_counts_towards_their_length() -> None:
    batch, engine = sample(request(guidance_ids=(7, 8, 9), num_guided=1))
    assert engine.asked[3] == ([1, 2, 7, 8, 9], {"temperature": 1.0, "max_tokens": 7, "stop": []})
    rows = batch.to_pylist()
    assert [row["token_ids"] for row in rows] == [[2, 2]] * 3 + [[7, 8, 9, 5, 5]]
    guided = rows[3]
    assert guided["guidance_length"] == 3
    assert guided["text"] == "7 8 9 5 5"  # the verifier judges guidance and continuation
    assert all(math.isnan(value) for value in guided["behaviour_logprobs"][:3])
    assert guided["behaviour_logprobs"][3:] == [-0.5, -0.25]
    assert guided["weight_versions"] == [3, 3, 3, 3, 4]
    assert guided["loss_mask"] == [False, False, False, True, True]


def test_unmasked_guidance_is_trained_on_but_has_no_behaviour_logprob() -> None:
    batch, _ = sample(request(guidance_ids=(7,), num_guided=4, mask_guidance=False))
    for row in batch.to_pylist():
        assert row["loss_mask"] == [True, True, True]
        assert math.isnan(row["behaviour_logprobs"][0])


def test_a_greedy_completion_is_the_first_and_in_no_loss() -> None:
    batch, engine = sample(request(num_completions=3, greedy=True))
    assert [sampling["temperature"] for _, sampling in engine.asked] == [0.0, 1.0, 1.0]
    mask, scores = batch.column("loss_mask").to_pylist(), batch.column("behaviour_logprobs")
    assert not any(mask[0]) and mask[0] and all(mask[1]) and all(mask[2])
    assert not np.isnan(scores[0].as_py()).any()  # it was sampled
    made = with_verdicts(batch, ["rule"], [Judgement(0.5, (Verdict("pass", 0.5),))] * 3)
    summed = receipt(made, None)
    assert summed.num_compared == 1 and summed.compared_tokens == len(mask[0])
    counted = outcomes_of(summed, "trained")
    assert counted["trained"][0] == 2 and counted["compared"] == (1, len(mask[0]))
    assert sum(tokens for _, tokens in counted.values()) == summed.num_tokens
    assert outcomes_of(summed, "filtered") == {"filtered": (3, summed.num_tokens)}


def test_an_empty_completion_keeps_its_row() -> None:
    batch = rollout_batch(request(), {0: Completion([], [], [], "stop")}, [""], "g")
    assert batch.column("token_ids").to_pylist() == [[]]
    guided = with_guidance(Completion([], [], [], "stop"), [4], 3)
    assert len(guided.weight_versions) == len(guided.token_ids) == 1


def test_thoughts_that_a_template_forgets_are_kept_where_the_configuration_says_so() -> None:
    tokenizer = FAMILIES["forgets thoughts"].tokenizer()

    async def play(thoughts: Any) -> bool:
        environment = EnvironmentConfig(name="guess", thoughts=thoughts)
        generator = Generator(
            *("g", ModelConfig(path="x"), GeneratorConfig(), "object_store", 0, 0, None),
            environment=environment,
            data=DataConfig(),
        )
        generator._engine = FakeEngine()  # type: ignore[assignment]
        try:
            await generator._start_environment(tokenizer)
            return generator._player is not None
        finally:
            assert generator._host is not None
            await generator._host.shutdown()

    assert asyncio.run(play("keep"))
    with pytest.raises(UserError, match=r"environment\.thoughts=keep"):
        asyncio.run(play("refuse"))
