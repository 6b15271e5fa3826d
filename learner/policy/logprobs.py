"""Log-probabilities of given tokens, without ever holding a [tokens x vocabulary] tensor.

`LogprobHead` stands in for a model's output embedding. It runs inside the model's own forward
pass, so that under FSDP it sees the gathered weight, and it returns log p(label) instead of
logits. Logits exist for `chunk_tokens` tokens at a time, in forward and again in backward,
where they are recomputed: one more matrix product buys memory that no longer grows with
tokens x vocabulary. The last chunk, which backward begins with, is kept instead.

    components
      LogprobHead         the module; owns the output weight (shared with the embedding if tied)
      HeadRequest         what to score: rows of the hidden states and their labels
      _ChunkedLogprobs    the autograd function

Shapes: T packed rows, N scored tokens, C tokens of a chunk, H hidden size, V vocabulary.
Units: nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LogitTransform:
    """What the architecture does to logits after the output matrix: scale, then soft cap."""

    scale: float = 1.0
    softcap: float | None = None
    """Logits become cap * tanh(logits / cap)."""


@dataclass(frozen=True)
class HeadRequest:
    """Which positions the next forward pass scores.

    Label n is predicted from row `rows_N[n]`; a row may predict several labels, as the last row
    of a shared prompt does.
    """

    rows_N: Tensor
    labels_N: Tensor
    temperature: float = 1.0
    with_entropy: bool = False


class LogprobHead(nn.Module):
    """Output embedding that returns [1, N, 2]: log-probability and entropy of N tokens.

    The entropy column carries no gradient, and is zero unless the request asks for it.
    """

    def __init__(self, linear: nn.Linear, chunk_tokens: int, transform: LogitTransform) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.chunk_tokens = chunk_tokens
        self.transform = transform
        self._request: HeadRequest | None = None

    @contextmanager
    def requested(self, request: HeadRequest) -> Iterator[None]:
        """Have the forward passes inside this block answer `request`."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    def forward(self, hidden_1TH: Tensor) -> Tensor:
        request = self._request
        if request is None:
            raise RuntimeError("LogprobHead ran outside `requested`: nothing says what to score")
        hidden_NH = hidden_1TH[0].index_select(0, request.rows_N)
        logprobs_N, entropy_N = chunked_logprobs(
            hidden_NH, self.weight, self.bias, request, self.chunk_tokens, self.transform
        )
        # Not a view: FSDP hangs its backward hook on this very tensor.
        return torch.stack((logprobs_N[None], entropy_N[None]), dim=-1)


def chunked_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    request: HeadRequest,
    chunk_tokens: int,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the label and entropy of N tokens, both [N], float32 or float64."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    scorer = _Scorer(transform or LogitTransform(), request.temperature, chunk_tokens)
    logprobs_N, entropy_N = _ChunkedLogprobs.apply(
        hidden_NH, weight_VH, bias_V, request.labels_N, scorer, request.with_entropy
    )
    return logprobs_N, entropy_N


@dataclass(frozen=True)
class _Scorer:
    """Logits of one chunk and the derivative of what follows the output matrix."""

    transform: LogitTransform
    temperature: float
    chunk_tokens: int

    def raw_logits(self, hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        logits_CV = nn.functional.linear(hidden_CH, weight_VH, bias_V)
        return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))

    def transformed(self, logits_CV: Tensor) -> Tensor:
        """Apply scale, soft cap and temperature, in place."""
        cap = self.transform.softcap
        if cap is None:
            return logits_CV.mul_(self.transform.scale / self.temperature)
        logits_CV.mul_(self.transform.scale / cap).tanh_()
        return logits_CV.mul_(cap / self.temperature)

    def raw_slope(self, transformed_CV: Tensor) -> Tensor | None:
        """d soft-capped / d scaled logits, [C, V]; None where there is no cap (it is 1)."""
        cap = self.transform.softcap
        if cap is None:
            return None
        return (transformed_CV * (self.temperature / cap)).square_().neg_().add_(1.0)

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scorer: _Scorer,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = hidden_NH.new_zeros(len(labels_N), dtype=dtype)
        logsumexp_N = torch.zeros_like(logprobs_N)
        entropy_N = torch.zeros_like(logprobs_N)
        ctx.kept = None
        for chunk in scorer.chunks(len(labels_N)):
            logits_CV = scorer.transformed(scorer.raw_logits(hidden_NH[chunk], weight_VH, bias_V))
            picked_C = logits_CV.gather(1, labels_N[chunk, None]).squeeze(1)
            largest_C = logits_CV.amax(dim=-1)
            shifted_CV = logits_CV.sub_(largest_C[:, None])
            exps_CV = shifted_CV.exp() if with_entropy else shifted_CV.exp_()
            sums_C = exps_CV.sum(dim=-1)
            logsumexp_N[chunk] = largest_C + sums_C.log()
            logprobs_N[chunk] = picked_C - logsumexp_N[chunk]
            if with_entropy:
                entropy_N[chunk] = sums_C.log() - shifted_CV.mul_(exps_CV).sum(dim=-1) / sums_C
            ctx.kept = (exps_CV, sums_C) if scorer.transform.softcap is None else None
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, logsumexp_N)
        ctx.scorer = scorer
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, labels_N, logsumexp_N = ctx.saved_tensors
        scorer: _Scorer = ctx.scorer
        grad_N = grads[0]
        # The sum over chunks is kept in float32: bfloat16 would lose small chunks.
        wide = logsumexp_N.dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        grad_weight_VH: Tensor | None = None
        grad_bias_V = None
        if bias_V is not None and ctx.needs_input_grad[2]:
            grad_bias_V = torch.zeros_like(bias_V, dtype=wide)
        kept, ctx.kept = ctx.kept, None  # is written over: a second backward pass recomputes it
        for chunk in reversed(list(scorer.chunks(len(labels_N)))):
            # d log p(label) / d logits = onehot(label) - softmax, here in the logits' own memory
            upstream_C = grad_N[chunk] * (scorer.transform.scale / scorer.temperature)
            slope_CV = None
            if kept is not None:
                delta_CV = kept[0].mul_((-upstream_C / kept[1])[:, None])
                kept = None  # only one chunk's memory at a time
            else:
                raw_CV = scorer.raw_logits(hidden_NH[chunk], weight_VH, bias_V)
                logits_CV = scorer.transformed(raw_CV)
                slope_CV = scorer.raw_slope(logits_CV)
                probs_CV = logits_CV.sub_(logsumexp_N[chunk, None]).exp_()
                delta_CV = probs_CV.mul_(-upstream_C[:, None])
            rows_C = torch.arange(len(delta_CV), device=delta_CV.device)
            delta_CV[rows_C, labels_N[chunk]] += upstream_C
            if slope_CV is not None:
                delta_CV.mul_(slope_CV)
            if grad_bias_V is not None:
                grad_bias_V.add_(delta_CV.sum(dim=0))
            narrow_CV = delta_CV.to(hidden_NH.dtype)
            grad_hidden_NH[chunk] = narrow_CV @ weight_VH
            if ctx.needs_input_grad[1]:
                grad_weight_VH = _plus_product(grad_weight_VH, narrow_CV.T, hidden_NH[chunk], wide)
        if ctx.needs_input_grad[1] and grad_weight_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH)  # no tokens
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VH.dtype),
            None,
            None,
            None,
        )


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` + left @ right, in place where there is a total, in `dtype`."""
    if total is None:
        return (left @ right).to(dtype)
    if left.dtype == dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
