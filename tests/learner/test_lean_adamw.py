"""AdamW in less memory: eight bits, stochastic rounding, and the optimiser made of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from learner.training import lean_adamw
from learner.training.eight_bits import BLOCK, dequantise, levels, nearest_codes, quantise
from learner.training.lean_adamw import LeanAdamW
from learner.training.rounding import noise, round_to_bfloat16

CPU = torch.device("cpu")
ALL_BITS = torch.arange(2**16, dtype=torch.int32)


# Eight bits


@pytest.mark.parametrize("signed", [True, False])
def test_a_level_times_a_scale_comes_back_exactly(signed: bool) -> None:
    """All 256 codes, under scales that are no powers of two."""
    codes_RC = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scales_RB = torch.tensor([[1.0], [3e-7], [12.7]])
    numbers_RC = dequantise(codes_RC, scales_RB, signed=signed)
    again_RC, again_RB = quantise(numbers_RC, signed=signed)
    assert torch.equal(again_RB, scales_RB)
    assert torch.equal(dequantise(again_RC, again_RB, signed=signed), numbers_RC)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 3 * BLOCK), st.booleans(), st.floats(0.0, 3.0))
def test_a_number_gets_the_nearest_level(
    seed: int, columns: int, signed: bool, decades: float
) -> None:
    """Blocks end with a row, and with the 256th number of it."""
    random = torch.Generator().manual_seed(seed)
    sizes_RC = 10 ** (-decades * torch.rand(3, columns, generator=random))
    numbers_RC = torch.randn(3, columns, generator=random) * sizes_RC
    numbers_RC = numbers_RC if signed else numbers_RC.abs()
    codes_RC, scales_RB = quantise(numbers_RC, signed=signed)
    assert scales_RB.shape == (3, -(-columns // BLOCK))
    found_RC = dequantise(codes_RC, scales_RB, signed=signed)
    for block, start in enumerate(range(0, columns, BLOCK)):
        part_RC = numbers_RC[:, start : start + BLOCK]
        assert torch.equal(scales_RB[:, block], part_RC.abs().amax(1))
        shares_RC = part_RC / scales_RB[:, block, None]
        nearest_RC = (shares_RC[..., None] - levels(signed, CPU)).abs().amin(-1)
        found = found_RC[:, start : start + BLOCK] / scales_RB[:, block, None]
        smallest = levels(signed, CPU)[levels(signed, CPU) > 0].min()
        gap_RC = (shares_RC - found).abs()
        assert (
            (gap_RC <= nearest_RC + 1e-6).logical_or((shares_RC < smallest) & (shares_RC > 0)).all()
        )


@pytest.mark.parametrize("signed", [True, False])
def test_a_look_into_a_table_finds_what_a_search_does(signed: bool) -> None:
    """At both ends of every 16 leading bits, and on and beside every border."""
    borders = (levels(signed, CPU)[1:] + levels(signed, CPU)[:-1]) / 2
    leading = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.cat([leading, leading | 0xFFFF, leading | 0x8000]).view(torch.float32)
    beside = [borders.nextafter(torch.tensor(way)) for way in (-2.0, 2.0)]
    numbers = torch.cat([ends[ends.abs() <= 1], borders, *beside])
    expected = torch.bucketize(numbers, borders, out_int32=True)
    assert torch.equal(nearest_codes(numbers, signed=signed), expected)


def test_what_is_divided_by_is_never_rounded_to_zero() -> None:
    numbers_RC = torch.tensor([[1.0, 1e-30, 0.0, 1e-7]])
    codes_RC, scales_RB = quantise(numbers_RC, signed=False)
    found_RC = dequantise(codes_RC, scales_RB, signed=False)
    assert found_RC[0, 1] > 0
    assert found_RC[0, 2] == 0


def test_nothing_but_zeros_stays_so() -> None:
    codes_RC, scales_RB = quantise(torch.zeros(2, 300), signed=True)
    assert torch.equal(dequantise(codes_RC, scales_RB, signed=True), torch.zeros(2, 300))


def test_levels_are_those_of_the_paper() -> None:
    """bitsandbytes and torchao have the same: a decade has twice as many as the one below."""
    for signed in (True, False):
        found = levels(signed, CPU)
        assert len(found) == 256
        assert found[-1] == 1
        assert 0 in found
        decade = (found > 0.1) & (found < 1)
        assert int(decade.sum()) == (64 if signed else 128)
    assert float(levels(True, CPU)[0]) == pytest.approx(-0.99297, abs=1e-5)


# Stochastic rounding


@settings(deadline=None, max_examples=60)
@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_the_mean_over_all_bits_is_the_value(value: float) -> None:
    """Unbiased, exactly: every one of the 65,536 numbers that may be drawn, drawn once."""
    rounded = round_to_bfloat16(torch.full((2**16,), value), ALL_BITS)
    below, above = rounded.double().aminmax()
    assert float(rounded.double().mean()) == value
    assert float(below) <= value <= float(above)
    assert len(rounded.unique()) <= 2


def test_what_bfloat16_has_is_kept_whatever_is_drawn() -> None:
    """Every number of 16 bits, those that are not finite too."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for bits in (0, 1, 2**15, 2**16 - 1):
        rounded = round_to_bfloat16(numbers.float(), torch.full((2**16,), bits, dtype=torch.int32))
        number = ~numbers.isnan()
        assert torch.equal(rounded.view(torch.int16)[number], numbers.view(torch.int16)[number])
        assert rounded[~number].isnan().all()


def test_noise_is_uniform_and_of_its_place_alone() -> None:
    count = 2**20
    drawn = noise(7, 3, 5, 0, count, "cpu")
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 2**16
    # Mean and each of the 256 leading bytes, within five standard deviations.
    assert float(drawn.double().mean()) == pytest.approx(32767.5, abs=5 * 18918 / count**0.5)
    bytes_256 = torch.bincount(drawn >> 8, minlength=256).double()
    assert (bytes_256 - count / 256).abs().max() < 5 * (count / 256) ** 0.5
    assert torch.equal(noise(7, 3, 5, 1000, 50, "cpu"), drawn[1000:1050])
    beyond = noise(7, 3, 5, 2**32 - 3, 6, "cpu")
    assert torch.equal(beyond[3:], noise(7, 3, 5, 2**32, 3, "cpu"))
    assert not torch.equal(beyond[3:], drawn[:3])


@pytest.mark.parametrize("other", [(8, 3, 5), (7, 4, 5), (7, 3, 6), (7 + 2**32, 3, 5)])
def test_noise_of_another_seed_step_or_parameter_is_another(other: tuple[int, int, int]) -> None:
    mine = noise(7, 3, 5, 0, 2**18, "cpu").double()
    theirs = noise(*other, 0, 2**18, "cpu").double()
    together = torch.corrcoef(torch.stack([mine, theirs]))[0, 1]
    assert abs(float(together)) < 5 / 2**9
    shifted = torch.corrcoef(torch.stack([mine[1:], theirs[:-1]]))[0, 1]
    assert abs(float(shifted)) < 5 / 2**9


# The optimiser


def made(parameters: Any, state_8bit: bool = False, seed: int = 0, **changes: Any) -> LeanAdamW:
    given = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1} | changes
    return LeanAdamW(parameters, **given, state_8bit=state_8bit, seed=seed)


def layer(dtype: torch.dtype = torch.float32, columns: int = 300) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, 5).to(dtype)


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, **draw: int) -> None:
    random = torch.Generator().manual_seed(draw.get("gradients", 1))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        optimizer.step()


def test_with_nothing_saved_it_is_torch_s_adamw_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lean_adamw, "_AT_A_TIME", 2400)  # rows by twos
    mine, theirs = layer(), layer()
    walk(mine, made(mine.parameters()))
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "foreach": False}
    walk(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, **settings))
    assert all(map(torch.equal, mine.parameters(), theirs.parameters()))


@pytest.mark.parametrize("state_8bit", [False, True])
def test_no_number_depends_on_how_many_rows_are_stepped_at_a_time(
    monkeypatch: pytest.MonkeyPatch, state_8bit: bool
) -> None:
    found = []
    for numbers in (1, 2400, 2**20):
        monkeypatch.setattr(lean_adamw, "_AT_A_TIME", numbers)
        model = layer(torch.bfloat16)
        walk(model, made(model.parameters(), state_8bit))
        found.append(model.weight.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_moments_of_matrices_take_two_bytes_and_those_of_the_rest_stay_float32() -> None:
    model = layer(columns=512)
    optimizer = made(model.parameters(), state_8bit=True)
    walk(model, optimizer, 1)
    matrix, bias = optimizer.state[model.weight], optimizer.state[model.bias]
    assert sum(t.nbytes for name, t in matrix.items() if name != "step") == 5 * (
        2 * 512 + 2 * 2 * 4
    )
    assert bias["exp_avg"].dtype == bias["exp_avg_sq"].dtype == torch.float32


def test_a_step_in_eight_bits_is_close_to_one_in_float32() -> None:
    """Under gradients whose sizes are three decades apart within a block.

    The first step rounds nothing: it divides by what it has just computed. Later ones move a
    weight by at most a tenth of the way more or less, on average. torchao's, which keeps squares
    and not their roots, moves the worst of them 100 learning rates in the second step.
    """
    random = torch.Generator().manual_seed(1)
    sizes = 10 ** (-3 * torch.rand(64, 256, generator=random))
    mine, theirs = (nn.Linear(256, 64, bias=False) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    pair = (
        made(mine.parameters(), True, weight_decay=0.0),
        made(theirs.parameters(), False, weight_decay=0.0),
    )
    for step in range(5):
        gradient = torch.randn(64, 256, generator=random) * sizes
        for model, optimizer in zip((mine, theirs), pair, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
        gap = (mine.weight - theirs.weight).detach().abs() / 1e-2
        assert float(gap.max()) < (1e-5 if step == 0 else 1.0)
        assert float(gap.mean()) < 0.1


def test_steps_below_the_distance_of_two_numbers_arrive_on_average() -> None:
    """1,000 steps of a thousandth of that distance, on 4,096 weights: rounded to the nearest none
    would move."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    step = 2.0**-8 / 1000  # below 1 the distance is 2^-8
    optimizer = made(model.parameters(), lr=step, weight_decay=0.0, betas=(0.0, 0.0), eps=0.0)
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    moved = 1 - model.weight.detach().double()
    # A weight moves by k distances, k binomial of mean 1: the mean of 4,096 within five deviations.
    assert float(moved.mean()) == pytest.approx(2.0**-8, rel=5 / 64)


def test_the_seed_decides_how_weights_are_rounded() -> None:
    found: list[Tensor] = []
    for seed in (0, 0, 1):
        model = layer(torch.bfloat16)
        walk(model, made(model.parameters(), seed=seed), 2)
        found.append(model.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_gradient_no_step() -> None:
    model = layer(torch.bfloat16)
    before = model.weight.detach().clone()
    optimizer = made(model.parameters(), state_8bit=True)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_is_loaded_keeps_its_types_and_steps_on_bitwise(dtype: torch.dtype) -> None:
    """torch would have it in the type of the parameter."""
    first = layer(dtype)
    optimizer = made(first.parameters(), state_8bit=True)
    walk(first, optimizer, 3)
    second = layer(dtype)
    second.load_state_dict(first.state_dict())
    again = made(second.parameters(), state_8bit=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in theirs.items()}
    walk(first, optimizer, 2, gradients=5)
    walk(second, again, 2, gradients=5)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
