"""Numbers in eight bits, with a scale for each block of 256: pure functions.

    number = level of its code * scale of its block         scale: the block's largest number

The levels are dynamic (Dettmers et al., arXiv:2110.02861): seven decades, each with twice the
levels of the one below. A block never goes beyond a row, which is what one index of the first
dimension holds. So a shard of whole rows has the codes and scales of these rows, whatever other
shards hold.

Shapes: R rows, C numbers of a row, B = ceil(C / 256) blocks of a row.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""
_DECADES = 7


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, in rising order, from -1 or 0 to 1."""
    above: list[Tensor] = []
    for decade in range(_DECADES):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        above.append(10.0 ** (decade - _DECADES + 1) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(above)
    below = [-positive] if signed else []
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([*below, positive, ends]).sort().values.float().to(device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Midpoints between levels, 255 numbers, and infinity."""
    found = levels(signed, device)
    return torch.cat([(found[1:] + found[:-1]) / 2, torch.full((1,), torch.inf, device=device)])


@cache
def _first_codes(signed: bool, device: torch.device) -> Tensor:
    """The lowest code of all numbers that share their leading 16 bits, by these bits."""
    leading = torch.arange(2**16, dtype=torch.int32, device=device)
    lowest = torch.where(leading < 2**15, leading << 16, (leading << 16) | 0xFFFF)
    borders = _borders(signed, device)[:-1]
    return torch.bucketize(lowest.view(torch.float32), borders, out_int32=True)


def nearest_codes(shares: Tensor, *, signed: bool) -> Tensor:
    """The code of the level nearest to each share of a scale, int32; as `torch.bucketize` has it.

    Numbers that share their leading 16 bits have one border between them at most. So a look into a
    table and a comparison do, in a quarter of the time of a search on a CPU.
    """
    leading = (shares.view(torch.int32) >> 16) & 0xFFFF
    codes = _first_codes(signed, shares.device)[leading]
    return codes + (shares > _borders(signed, shares.device)[codes])


def quantise(numbers_RC: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes [R, C] of the nearest levels, and scales [R, B].

    What is not signed may be a denominator. So only a 0 gets the code of 0: a number that is small
    beside its block is rounded up to the smallest level.
    """
    rows, columns = numbers_RC.shape
    blocks = -(-columns // BLOCK)
    padded = torch.nn.functional.pad(numbers_RC, (0, blocks * BLOCK - columns))
    padded_RBb = padded.view(rows, blocks, BLOCK)
    scales_RB = padded_RBb.abs().amax(dim=-1)
    divisors_RB = torch.where(scales_RB > 0, scales_RB, 1.0)
    shares_RBb = padded_RBb / divisors_RB[..., None]
    codes_RBb = nearest_codes(shares_RBb, signed=signed)
    if not signed:
        codes_RBb = torch.where(padded_RBb > 0, codes_RBb.clamp_(min=1), 0)
    codes_RC = codes_RBb.view(rows, blocks * BLOCK)[:, :columns]
    return codes_RC.to(torch.uint8), scales_RB


def dequantise(codes_RC: Tensor, scales_RB: Tensor, *, signed: bool) -> Tensor:
    """The numbers of codes and scales, [R, C] float32."""
    columns = codes_RC.shape[1]
    scales_RC = scales_RB.repeat_interleave(BLOCK, dim=1)[:, :columns]
    return levels(signed, codes_RC.device)[codes_RC.int()] * scales_RC
