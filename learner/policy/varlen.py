"""Packed attention by torch's variable-length flash-attention: no padding, no mask. CUDA, bfloat16.

    queries  the row's tokens as they lie, every root and every leaf a sequence of its own
    keys     of a root its own rows; of a leaf its root's, then its own; of a branch all on its way

Where a sequence has fewer queries than keys the kernel aligns the causal triangle with the last
of both (torch: the lower right corner), which is just what a leaf behind its root sees.
`learner.policy.model.use_varlen` proves on the device itself that it does.

Shapes: T row tokens, S sequences, K keys over all sequences, Q query heads, H key heads, D head
size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from common.errors import UserError
from learner.policy.attention import PackedLayout, layout_for
from learner.policy.tries import SegmentLengths

VARLEN_NAME = "packed_varlen"
"""The implementation's name in transformers; as with the grids', no mask is built for it."""

VARLEN_DEVICES = frozenset({"cuda"})
"""On others torch's kernel ends the process with a segmentation fault."""


@dataclass(frozen=True)
class _Sequences:
    key_rows_K: Tensor
    """The row that each key is read from."""
    query_edges: Tensor
    key_edges: Tensor
    """[S + 1] int32, where each sequence begins; the last is the end."""
    longest_query: int
    longest_key: int


def _spans(segments: Sequence[SegmentLengths]) -> Iterator[tuple[int, np.ndarray]]:
    """Queries, and rows of the keys, of every sequence, in row order."""
    start = 0
    for segment in segments:
        yield segment.root, np.arange(start, start + segment.root)
        if len(segment.completions) > 1:
            for own, way in zip(segment.completions, segment.ways, strict=True):
                yield own, start + way
        start += segment.tokens


def _sequences(layout: PackedLayout) -> _Sequences:
    """The sequences of a row. The first layer of a micro-batch works them out for all."""
    found: _Sequences | None = layout.derived.get(VARLEN_NAME)
    if found is None:
        device = layout.row_cells_T.device
        queries, keys = zip(*_spans(layout.segments), strict=True)
        key_lengths = [len(rows) for rows in keys]
        found = _Sequences(
            torch.from_numpy(np.concatenate(keys)).to(device),
            _edges(queries, device),
            _edges(key_lengths, device),
            max(queries),
            max(key_lengths),
        )
        layout.derived[VARLEN_NAME] = found
    return found


def _edges(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)


@functools.cache
def _grouped(kernel: Callable[..., Any], groups: bool) -> dict[str, Any]:
    """Say that heads are grouped, where the kernel asks: torch 2.11's takes them without a word."""
    asks = any(
        parameter.name == "enable_gqa" or parameter.kind is Parameter.VAR_KEYWORD
        for parameter in signature(kernel).parameters.values()
    )
    return {"enable_gqa": groups} if asks else {}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def varlen_attention(
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

    Raises:
        UserError: an attention that the kernel does not compute (sinks, soft caps).
    """
    layout = layout_for(module, packed_layout, s_aux)
    if softcap is not None:
        raise UserError(
            f"{type(module).__name__} caps its attention scores, which the kernel of "
            "learner.attention=varlen does not: use learner.attention=grids"
        )
    at = _sequences(layout)
    query_TQD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_TQD: Tensor = varlen_attn(  # type: ignore[assignment]  # a pair only if asked for
        query_TQD,
        key_THD.index_select(0, at.key_rows_K),
        value_THD.index_select(0, at.key_rows_K),
        at.query_edges,
        at.key_edges,
        at.longest_query,
        at.longest_key,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **_grouped(varlen_attn, query.shape[1] != key.shape[1]),
    )
    return out_TQD.unsqueeze(0), None


AttentionInterface.register(VARLEN_NAME, varlen_attention)
