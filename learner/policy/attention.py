"""Attention over a packed row of prompts and completions, registered with transformers.

A row holds *segments*: a prompt followed by completions of it. Each completion attends to its
prompt and causally to itself; nothing else in the row sees it. A prompt is therefore computed
once for all its completions. `PackedLayout` is worked out once per micro-batch and every layer
reuses it:

    row [T] --gather--> cells: padded grids of similar length --attention--> cells --gather--> [T]

A *root* is a sequence that attends causally to itself alone (a prompt, or prompt and completion
together where a prompt has a single completion); a *leaf* is a completion that also sees its
root. A *branch* also sees first tokens of another completion (`learner.policy.tries`). Grids are
padded on the right, so a causal root needs no mask, and what is below one needs one mask.
`_attend` is the seam: a kernel that understands such layouts can replace it.

Shapes: T row tokens, B sequences of a grid, L their padded length, P padded root length,
Q query heads, K key and value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from common.errors import UserError
from learner.policy.tries import SegmentLengths

ATTENTION_NAME = "packed_segments"
"""The implementation's name in transformers. It has no mask function registered under the same
name, which is how transformers knows not to build a [T x T] mask."""

_SHORT_KEYS = 256
"""Keys up to which three plain operations beat the fused kernel on a CPU. Its backward pass is slow
on small problems (64 x 9 heads, 30 x 100 scores, bfloat16: 29 ms against 60)."""

_SLACK = 0.25
_FREE_CELLS = 1024
"""Padding a grid may carry: a quarter of its tokens, or this many cells, which cost less than
one more kernel launch a layer."""


@dataclass(frozen=True)
class _Grid:
    """Cells [start, start + count * length): `count` sequences padded to `length`."""

    start: int
    count: int
    length: int

    def view(self, cells: Tensor) -> Tensor:
        """[cells, heads, D] -> [B, heads, L, D]."""
        part = cells.narrow(0, self.start, self.count * self.length)
        return part.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class _Leaves:
    grid: _Grid
    roots_B: Tensor
    """Index of each leaf's root within its block."""
    root_lengths_B: Tensor

    def above(self, roots: Tensor, cells: Tensor) -> Tensor:
        """What each sees before its own, [B, heads, P, D], of the roots' or of all cells."""
        return roots.index_select(0, self.roots_B)


@dataclass(frozen=True)
class _Branches:
    grid: _Grid
    above_BP: Tensor
    """Cells of what each sees before its own, padded on the right."""
    root_lengths_B: Tensor
    """How many of them."""

    def above(self, roots: Tensor, cells: Tensor) -> Tensor:
        found = cells.index_select(0, self.above_BP.flatten())
        return found.unflatten(0, self.above_BP.shape).transpose(1, 2)


@dataclass(frozen=True)
class _Block:
    roots: _Grid
    leaves: tuple[_Leaves, ...]
    branches: tuple[_Branches, ...] = ()


@dataclass(frozen=True)
class PackedLayout:
    """Where every token of a row goes. Build it with `build_layout`."""

    blocks: tuple[_Block, ...]
    cell_rows: Tensor
    """[cells] the row each cell reads; padding reads row 0."""
    row_cells_T: Tensor
    """[T] the cell of each row."""
    padding: Tensor | None
    """[cells] bool, True where a cell is padding; None when no cell is."""
    segments: tuple[SegmentLengths, ...]
    derived: dict[Any, Any] = field(default_factory=dict)
    """What follows from the layout alone, as masks: made by the first layer that needs it. Let it
    go (`clear`) after the row's backward pass: the masks of a step may take a GB of a device."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus completion."""
        return max((segment.longest for segment in self.segments), default=0)

    def root_mask(self, roots: _Grid, window: int, like: Tensor) -> Tensor:
        """[L, L] additive: causal within a sliding window."""
        key = (roots.start, window, like.dtype)
        if key not in self.derived:
            at = torch.arange(roots.length, device=like.device)
            distance = at[:, None] - at
            self.derived[key] = _additive((distance >= 0) & (distance < window), like)
        mask: Tensor = self.derived[key]
        return mask

    def leaf_mask(
        self, leaves: _Leaves | _Branches, roots: int, window: int | None, like: Tensor
    ) -> Tensor:
        """[B, 1, L, P + L] additive: the whole root, then the leaf causally."""
        key = (leaves.grid.start, window, like.dtype)
        if key not in self.derived:
            at_leaf = torch.arange(leaves.grid.length, device=like.device)
            at_root = torch.arange(roots, device=like.device)
            lengths = leaves.root_lengths_B[:, None, None]
            sees_root = (at_root < lengths).expand(-1, len(at_leaf), -1)
            distance = at_leaf[:, None] - at_leaf
            sees_leaf = (distance >= 0).expand(len(lengths), -1, -1)
            if window is not None:
                sees_root = sees_root & (lengths + at_leaf[:, None] - at_root < window)
                sees_leaf = sees_leaf & (distance < window)
            visible = torch.cat((sees_root, sees_leaf), dim=-1)
            self.derived[key] = _additive(visible[:, None], like)
        mask: Tensor = self.derived[key]
        return mask


def build_layout(segments: Sequence[SegmentLengths], device: torch.device | str) -> PackedLayout:
    """Layout of a row whose segments follow one another in this order."""
    starts = np.cumsum([0] + [segment.tokens for segment in segments])
    roots = [segment.root for segment in segments]
    builder = _CellBuilder(int(starts[-1]))
    blocks = []
    for members in _buckets(roots):
        grid = builder.add([(int(starts[s]), roots[s]) for s in members])
        leaves = [
            (member, int(starts[s] + offset), length)
            for member, s in enumerate(members)
            for offset, length in segments[s].leaves()
        ]
        parts = []
        for chosen in _buckets([length for _, _, length in leaves]):
            owners = [leaves[i][0] for i in chosen]
            parts.append(
                _Leaves(
                    builder.add([leaves[i][1:] for i in chosen]),
                    torch.tensor(owners, device=device),
                    torch.tensor([roots[members[o]] for o in owners], device=device),
                )
            )
        branches = [
            (int(starts[s] + offset), length, starts[s] + above)
            for s in members
            for offset, length, above in segments[s].branches()
        ]
        blocks.append(_Block(grid, tuple(parts), builder.add_branches(branches, device)))
    return builder.finish(tuple(blocks), tuple(segments), device)


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, grouped by similar length, longest first, with bounded padding."""
    buckets: list[list[int]] = []
    longest = filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if buckets:
            padding = longest * (len(buckets[-1]) + 1) - filled - lengths[i]
        if not buckets or padding > max(_FREE_CELLS, _SLACK * (filled + lengths[i])):
            buckets.append([])
            longest, filled = lengths[i], 0
        buckets[-1].append(i)
        filled += lengths[i]
    return buckets


class _CellBuilder:
    """Lays grids one behind the other and keeps both directions of the mapping."""

    def __init__(self, row_tokens: int) -> None:
        self._cell_rows: list[np.ndarray] = []
        self._row_cells_T = np.full(row_tokens, -1, dtype=np.int64)
        self._cells = 0

    def add(self, spans: Sequence[tuple[int, int]]) -> _Grid:
        """Add a grid of spans, each (first row, length)."""
        grid = _Grid(self._cells, len(spans), max(length for _, length in spans))
        rows = np.full((grid.count, grid.length), -1, dtype=np.int64)
        for i, (first, length) in enumerate(spans):
            rows[i, :length] = np.arange(first, first + length)
            cell = grid.start + i * grid.length
            self._row_cells_T[first : first + length] = np.arange(cell, cell + length)
        self._cell_rows.append(rows.reshape(-1))
        self._cells += rows.size
        return grid

    def add_branches(
        self, branches: Sequence[tuple[int, int, np.ndarray]], device: torch.device | str
    ) -> tuple[_Branches, ...]:
        """Add grids of branches, each (first row, length, rows that it sees before them)."""
        chosen = _buckets([length for _, length, _ in branches])
        grids = [self.add([branches[i][:2] for i in members]) for members in chosen]
        found = []  # the cells of all of them are known now, of which some see others
        for grid, members in zip(grids, chosen, strict=True):
            rows = [branches[i][2] for i in members]
            above_BP = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
            for b, seen in enumerate(rows):
                above_BP[b, : len(seen)] = self._row_cells_T[seen]
            lengths_B = torch.tensor([len(seen) for seen in rows], device=device)
            found.append(_Branches(grid, torch.from_numpy(above_BP).to(device), lengths_B))
        return tuple(found)

    def finish(
        self,
        blocks: tuple[_Block, ...],
        segments: tuple[SegmentLengths, ...],
        device: torch.device | str,
    ) -> PackedLayout:
        if (self._row_cells_T < 0).any():
            raise ValueError("layout leaves rows without a cell")
        cell_rows = np.concatenate([*self._cell_rows, np.empty(0, np.int64)])
        padding = cell_rows < 0
        return PackedLayout(
            blocks,
            torch.from_numpy(np.maximum(cell_rows, 0)).to(device),
            torch.from_numpy(self._row_cells_T).to(device),
            torch.from_numpy(padding).to(device) if padding.any() else None,
            segments,
        )


class _RowsToCells(torch.autograd.Function):
    """Gather whose backward is a gather too: every row has exactly one cell that counts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.cell_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.layout.row_cells_T), None


class _CellsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cells: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return cells.index_select(0, layout.row_cells_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layout: PackedLayout = ctx.layout
        cells = grads[0].index_select(0, layout.cell_rows)
        if layout.padding is not None:
            cells.masked_fill_(layout.padding.view(-1, *[1] * (cells.dim() - 1)), 0)
        return cells, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: [1, Q, T, D] in, [1, T, Q, D] out.

    Dropout is ignored on purpose: the log-probabilities of a policy are deterministic.

    Raises:
        UserError: the architecture does not hand over the layout, or uses attention sinks.
    """
    layout = layout_for(module, packed_layout, s_aux)
    window = sliding_window if sliding_window and sliding_window < layout.longest else None
    cells = [_RowsToCells.apply(x[0].transpose(0, 1), layout) for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = [
        part.transpose(1, 2).flatten(0, 1)
        for block in layout.blocks
        for part in _attend_block(block, cells, layout, window, scale, softcap)
    ]
    return _CellsToRows.apply(torch.cat(outputs), layout).unsqueeze(0), None


def layout_for(
    module: torch.nn.Module, layout: PackedLayout | None, s_aux: Tensor | None
) -> PackedLayout:
    """The layout that the architecture hands over, if it computes attention as we do."""
    if layout is None or s_aux is not None:
        reason = "attention sinks" if s_aux is not None else "an attention that drops arguments"
        raise UserError(
            f"{type(module).__name__} uses {reason}, which the packed learner does not support"
        )
    return layout


def _attend_block(
    block: _Block,
    cells: Sequence[Tensor],
    layout: PackedLayout,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Outputs [B, Q, L, D] of a block's roots and of each of its leaf grids, in cell order."""
    query, key, value = (block.roots.view(x) for x in cells)
    masked = window is not None or softcap is not None
    reach = window or block.roots.length
    mask = layout.root_mask(block.roots, reach, query) if masked else None
    outputs = [_attend(query, key, value, mask, scale, softcap)]
    every: tuple[_Leaves | _Branches, ...] = (*block.leaves, *block.branches)
    for below in every:
        query, *own = (below.grid.view(x) for x in cells)
        above = [below.above(*pair) for pair in ((key, cells[1]), (value, cells[2]))]
        mask = layout.leaf_mask(below, above[0].shape[2], window, query)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(above, own, strict=True))
        outputs.append(_attend(query, keys, values, mask, scale, softcap))
    return outputs


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """[B, Q, L, D]; no mask means causal. The seam for other kernels."""
    short = query.device.type == "cpu" and key.shape[2] <= _SHORT_KEYS
    if mask is not None and (softcap is not None or short):
        return _attend_explicitly(query, key, value, mask, scale, softcap)
    gqa = query.shape[1] != key.shape[1]
    if gqa and mask is not None and query.device.type == "cuda":
        # Flash takes no mask and the memory-efficient kernel no groups of heads: with both only
        # the kernel that writes all scores out would be left.
        key, value, gqa = *_for_each_head(query, key, value), False
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
    )


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Q, L, D] of as many heads as there are queries."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def _attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Scores, softmax and sum as three operations in float32: exact, and needed for soft caps.

    Query heads of one key head stand as further rows, so that keys are not repeated.
    """
    heads, groups = query.shape[1], key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query.to(wide).unflatten(1, (groups, heads // groups)).flatten(2, 3) * scale
    scores = (rows @ key.to(wide).transpose(2, 3)).unflatten(2, (heads // groups, -1))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores + mask.unsqueeze(-3).to(wide)).softmax(dim=-1)
    out = weights.flatten(2, 3) @ value.to(wide)
    return out.unflatten(2, (heads // groups, -1)).flatten(1, 2).to(query.dtype)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, float("-inf"))


AttentionInterface.register(ATTENTION_NAME, packed_attention)
