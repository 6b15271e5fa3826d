"""G2RPO-A's adaptive guidance length, against hand-computed tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rollout.guidance import Guidance, adapted_length, num_guided
from common.config.algorithm import GuidanceConfig


def lengths(schedule: str, rewards: list[float], **config: object) -> list[int]:
    settings = {"ratio": 0.5, "max_tokens": 100, "window": 2, "schedule": schedule, **config}
    guidance = Guidance(GuidanceConfig(**settings), total_steps=len(rewards), room=5000)  # type: ignore[arg-type]
    found = []
    for step, reward in enumerate(rewards, start=1):
        guidance.observe(step, reward)
        found.append(guidance.length)
    return found


def test_sliding_by_hand() -> None:
    # k=2: 100*0.2/0.4 = 50; k=3: 50*mean(0.4, 0.2)/0.6 = 25; k=4: 25*mean(0.6, 0.4)/0.25 = 50
    assert lengths("sliding", [0.2, 0.4, 0.6, 0.25]) == [100, 50, 25, 50]


def test_cycle_updates_every_third_step_from_the_two_before() -> None:
    # k=3: 100*mean(0.2, 0.4)/0.6 = 50; k=6: 50*mean(0.5, 0.5)/0.25 = 100
    assert lengths("cycle", [0.2, 0.4, 0.6, 0.5, 0.5, 0.25]) == [100, 100, 50, 50, 50, 100]


def test_a_cycle_keeps_whole_tokens_as_the_released_code_does() -> None:
    # 100*0.3/0.7 = 42.9 -> 42, 42*0.5/0.4 = 52.5 -> 52; a float would be at 53.6
    assert lengths("cycle", [0.2, 0.4, 0.7, 0.5, 0.5, 0.4])[2::3] == [42, 52]
    # 100*0.002 -> 1, 1*1.9 -> 1, 1*2 -> 2
    halves = [0.002, 0.002, 1.0, 0.95, 0.95, 0.5, 1.0, 1.0, 0.5]
    assert lengths("cycle", halves)[2::3] == [1, 1, 2]


def test_fixed_and_linear_decay() -> None:
    assert lengths("fixed", [0.1, 0.9, 0.5]) == [100, 100, 100]
    assert lengths("linear_decay", [0.5] * 4) == [75, 50, 25, 1]


def test_zero_rewards_are_skipped_and_lengths_stay_within_bounds() -> None:
    assert lengths("sliding", [0.0, 0.5, 0.0, 0.5]) == [100, 100, 100, 50]
    assert lengths("sliding", [0.001, 1.0, 1.0, 0.001]) == [100, 1, 1, 100]


@given(st.floats(1, 100), st.lists(st.floats(0.01, 1), min_size=1, max_size=3), st.floats(0.01, 1))
def test_rising_reward_never_lengthens(length: float, history: list[float], reward: float) -> None:
    adapted = adapted_length(length, history, reward, 100)
    if reward >= max(history):
        assert adapted <= length + 1e-9
    if reward <= min(history):
        assert adapted >= length - 1e-9
    assert 1 <= adapted <= 100


def test_state_survives_a_checkpoint_at_any_step() -> None:
    rewards = [0.2, 0.4, 0.6, 0.5, 0.1, 0.25, 0.3]
    for schedule in ("cycle", "sliding", "linear_decay"):
        config = GuidanceConfig(ratio=0.5, max_tokens=100, schedule=schedule)  # type: ignore[arg-type]
        whole = lengths(schedule, rewards)
        for cut in range(len(rewards)):
            first, second = (Guidance(config, len(rewards), 5000) for _ in range(2))
            for step in range(1, cut + 1):
                first.observe(step, rewards[step - 1])
            second.load_state_dict(first.state_dict(), cut)
            for step in range(cut + 1, len(rewards) + 1):
                second.observe(step, rewards[step - 1])
            assert second.length == whole[-1]


def test_steps_out_of_order_are_refused() -> None:
    guidance = Guidance(GuidanceConfig(ratio=0.5), 10, 5000)
    with pytest.raises(ValueError, match="step 2 after step 0"):
        guidance.observe(2, 0.5)


def test_guidance_may_begin_at_a_resume() -> None:
    without = Guidance(GuidanceConfig(ratio=0.0), 40, 5000)
    guidance = Guidance(GuidanceConfig(ratio=0.5, max_tokens=100, schedule="sliding"), 40, 5000)
    guidance.load_state_dict(without.state_dict(), 20)
    guidance.observe(21, 0.25)
    guidance.observe(22, 0.5)
    assert guidance.length == 50


def test_without_a_ratio_there_is_no_guidance() -> None:
    assert Guidance(GuidanceConfig(ratio=0.0), 10, 5000).length == 0
    assert [num_guided(8, ratio) for ratio in (0.0, 0.25, 0.75, 1.0)] == [0, 2, 6, 8]


def test_the_length_begins_and_ends_where_a_completion_has_room() -> None:
    guidance = Guidance(GuidanceConfig(ratio=0.5, max_tokens=3072, window=1), 10, 24)
    assert guidance.length == 24
    for step, reward in enumerate([0.5, 1.0, 1.0, 0.5], 1):  # halved, then twice as long
        guidance.observe(step, reward)
    assert guidance.length == 24


def test_a_longer_limit_before_a_resume_does_not_leave_a_completion_without_room() -> None:
    guidance = Guidance(GuidanceConfig(ratio=0.5), 10, 23)
    guidance.load_state_dict({"length": 3072.0, "history": []}, 0)
    assert guidance.length == 23
