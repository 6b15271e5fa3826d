"""The simulated run: equal to arithmetic where arithmetic can do it, and monotone where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.predict.simulate import (
    Costs,
    Simulation,
    Workload,
    lognormal_lengths,
    measured_lengths,
)

COSTS = Costs(
    decode_round_s=0.010,
    decode_sequence_s=0.001,
    prefill_token_s=0.0005,
    request_s=0.0,
    coordinate_s=0.0,
    verify_s=0.0,
    log_group_s=0.0,
    learner_step_s=0.5,
    learner_token_s=0.002,
    export_s=0.2,
    deliver_s=0.1,
    stall_s=0.05,
)
WORK = Workload(
    prompts_per_step=4,
    group_size=5,
    max_staleness=0,
    generators=1,
    sequences=1000,
    verifiers=1,
    prompt_tokens=10,
)


def always(tokens: float):
    return lambda count: [tokens] * count


def test_in_turns_a_step_is_the_sum_of_its_parts() -> None:
    prediction = Simulation(WORK, COSTS, always(30)).run(10)
    generate = 4 * 10 * 0.0005 + 30 * (0.010 + 20 * 0.001)
    learn = 0.5 + 0.002 * (20 * 30 + 4 * 10)
    assert prediction.step_s == pytest.approx(generate + learn + 0.2 + 0.1 + 0.05)
    assert prediction.generating == pytest.approx(generate / prediction.step_s)
    assert prediction.learning == pytest.approx((learn + 0.2) / prediction.step_s)
    assert prediction.completions_per_s == pytest.approx(20 / prediction.step_s)


def test_what_does_not_fit_at_once_runs_in_waves() -> None:
    prediction = Simulation(replace(WORK, sequences=10), COSTS, always(30)).run(10)
    generate = 4 * 10 * 0.0005 + 2 * 30 * (0.010 + 10 * 0.001)
    assert prediction.generating * prediction.step_s == pytest.approx(generate)


def test_verifiers_and_the_log_are_queues() -> None:
    """All 20 completions end at once: two verifiers judge ten each; the last group is logged."""
    costs = replace(COSTS, verify_s=0.03, log_group_s=0.07)
    plain = Simulation(WORK, COSTS, always(30)).run(10).step_s
    prediction = Simulation(replace(WORK, verifiers=2), costs, always(30)).run(10)
    assert prediction.step_s - plain == pytest.approx(10 * 0.03 + 0.07, abs=0.04)
    assert prediction.verifying * prediction.step_s == pytest.approx(10 * 0.03)
    assert prediction.logging * prediction.step_s == pytest.approx(4 * 0.07)
    coordinated = Simulation(WORK, replace(COSTS, coordinate_s=0.02), always(30)).run(10)
    assert coordinated.step_s - plain == pytest.approx(4 * 0.02)
    assert coordinated.coordinating * coordinated.step_s == pytest.approx(4 * 0.02)


def test_a_generator_takes_its_requests_in_before_it_decodes() -> None:
    """One generator, twenty completions."""
    plain = Simulation(WORK, COSTS, always(30)).run(10)
    taking = Simulation(WORK, replace(COSTS, request_s=0.01), always(30)).run(10)
    assert taking.step_s - plain.step_s == pytest.approx(20 * 0.01)


def test_asynchronously_a_step_is_its_longer_half() -> None:
    work = replace(WORK, max_staleness=1)
    slow_learner = Simulation(work, replace(COSTS, learner_token_s=0.02), always(30)).run(20)
    assert slow_learner.step_s == pytest.approx(0.5 + 0.02 * 640 + 0.2)
    assert slow_learner.bottleneck == "learning"
    slow_generator = Simulation(work, replace(COSTS, decode_sequence_s=0.02), always(30)).run(20)
    assert slow_generator.bottleneck == "generation"
    # Twice the sequences at a time, since two steps' groups are out: what a token costs remains.
    assert slow_generator.step_s == pytest.approx(20 * 30 * 0.02, rel=0.1)


def test_completions_without_an_advantage_cost_the_learner_nothing() -> None:
    half = Simulation(replace(WORK, trained_share=0.5), COSTS, always(30)).run(10)
    whole = Simulation(WORK, COSTS, always(30)).run(10)
    assert whole.step_s - half.step_s == pytest.approx(0.002 * 300)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(0.1, 1.2),
    st.integers(0, 100),
)
def test_no_schedule_stands_still_or_beats_its_busiest_part(
    staleness: int, prompts: int, size: int, generators: int, sigma: float, seed: int
) -> None:
    work = replace(
        WORK,
        max_staleness=staleness,
        prompts_per_step=prompts,
        group_size=size,
        generators=generators,
        sequences=7,
    )
    prediction = Simulation(work, COSTS, lognormal_lengths(20, sigma, 200, seed)).run(12)
    shares = (prediction.generating, prediction.learning, prediction.verifying)
    assert all(0.0 <= share <= 1.0 + 1e-9 for share in shares)
    assert prediction.step_s >= 0.5 + 0.2  # the learner's own
    more = Simulation(
        replace(work, generators=8 * generators), COSTS, lognormal_lengths(20, sigma, 200, seed)
    ).run(12)
    assert more.step_s <= 1.5 * prediction.step_s  # other lengths meet: not exactly monotone


def test_lengths_come_from_where_they_should() -> None:
    drawn = lognormal_lengths(100, 0.5, 150)(2000)
    assert min(drawn) >= 1
    assert max(drawn) == 150
    assert sorted(drawn)[1000] == pytest.approx(100, rel=0.1)
    assert set(measured_lengths([3, 9])(100)) == {3.0, 9.0}
