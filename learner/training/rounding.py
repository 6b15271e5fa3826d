"""Stochastic rounding to bfloat16, with noise that follows from its place: pure functions.

A step of AdamW is often smaller than half the distance between two numbers of bfloat16. Rounded to
the nearest it would be lost, every time. Rounded up with the probability of its share of that
distance, it arrives on average: E[rounded] = value.

The noise of a number follows from the seed, the optimiser step, the parameter and the number's
place in it. So it does not matter who holds the number, and a run that is resumed or replayed
rounds as the first one did.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Words = TypeVar("Words", int, Tensor)

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
"""Factors of Wellons' `lowbias32`, below 2^31 in size: products stay within 64 bits."""


def noise(seed: int, step: int, parameter: int, first: int, count: int, device: str) -> Tensor:
    """16 random bits for each of `count` numbers, from the place `first` on; int32.

    Args:
        step: optimiser steps of the parameter, this one included.
        parameter: its number among those of the optimiser.
    """
    key = 0
    for part in (seed & _WORD, seed >> 32 & _WORD, step, parameter):
        key = _mix(key ^ part) + 0x9E3779B9 & _WORD
    places = torch.arange(first, first + count, dtype=torch.int64, device=device)
    bits = _mix((places & _WORD) ^ key)
    bits = _mix((bits + (places >> 32) + _mix(key)) & _WORD)
    return (bits >> 16).to(torch.int32)


def round_to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Float32 `values` in bfloat16, each rounded away from 0 where its bits say so.

    A number that bfloat16 has stays what it is. What is not finite does too.

    Args:
        bits: of each value, 0 to 65535; uniform ones make it unbiased.
    """
    assert values.dtype == torch.float32
    sums = (values.view(torch.int32) + bits) & ~0xFFFF
    rounded = sums.view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def _mix(words: Words) -> Words:
    """Each 32-bit word, kept in 64 bits, as another that looks random; or one as a Python int."""
    words = words ^ (words >> 16)
    words = (words * _FIRST) & _WORD
    words = words ^ (words >> 15)
    words = (words * _SECOND) & _WORD
    return words ^ (words >> 16)
