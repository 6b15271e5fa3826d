"""Log-probabilities of given tokens, without ever holding a [tokens x vocabulary] tensor.

`LogprobHead` stands in for a model's output embedding. It runs inside the model's own forward
pass, so that under FSDP it sees the gathered weight, and it returns log p(label) instead of
logits. Logits exist for `chunk_tokens` tokens at a time, in forward and again in backward,
where they are recomputed: one more matrix product buys memory that no longer grows with
tokens x vocabulary.

    components
      LogprobHead         the module; owns the output weight (shared with the embedding if tied)
      HeadRequest         what to score: rows of the hidden states and their labels
      _ChunkedLogprobs    the autograd function
      _scores, _slopes    what is done to the logits of a chunk, forward and backward

Around the matrix products the last two are all there is. One operation after the other they go
over the logits some sixteen times in float32. Compiled (`use_compiled`), each is one kernel that
reads the product as it is and writes no logits. On a CPU they run as they stand, and the last
chunk, which backward begins with, is kept instead of computed again.

Shapes: T packed rows, N scored tokens, C tokens of a chunk, H hidden size, V vocabulary.
Units: nats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
    entropy_learns: bool = False
    """Whether the entropy carries a gradient."""


class LogprobHead(nn.Module):
    """Output embedding that returns [1, N, 2]: log-probability and entropy of N tokens.

    The entropy column is zero unless the request asks for it, and carries a gradient only where
    the request says so.
    """

    def __init__(self, linear: nn.Linear, chunk_tokens: int, transform: LogitTransform) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.chunk_tokens = chunk_tokens
        self.transform = transform
        self._request: HeadRequest | None = None
        self._compiled = False

    def use_compiled(self) -> None:
        """Compile what is done to the logits of a chunk, from the next pass on."""
        self._compiled = True

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
            hidden_NH,
            self.weight,
            self.bias,
            request,
            self.chunk_tokens,
            self.transform,
            compiled=self._compiled,
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
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the label and entropy of N tokens, both [N], float32 or float64."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    entropy = request.with_entropy or request.entropy_learns
    rule = _Rule(transform or LogitTransform(), request.temperature, entropy)
    scorer = _Scorer(rule, chunk_tokens, compiled, request.entropy_learns)
    logprobs_N, entropy_N = _ChunkedLogprobs.apply(
        hidden_NH, weight_VH, bias_V, request.labels_N, scorer
    )
    return logprobs_N, entropy_N


@dataclass(frozen=True)
class _Rule:
    """What follows the output matrix."""

    transform: LogitTransform
    temperature: float
    with_entropy: bool

    @property
    def slope(self) -> float:
        """d logits / d product, where there is no cap."""
        return self.transform.scale / self.temperature

    def logits(self, raw_CV: Tensor) -> Tensor:
        """Scale, soft cap and temperature, in the memory of `raw_CV`."""
        cap = self.transform.softcap
        if cap is None:
            return raw_CV.mul_(self.slope)
        raw_CV.mul_(self.transform.scale / cap).tanh_()
        return raw_CV.mul_(cap / self.temperature)

    def cap_slope(self, logits_CV: Tensor) -> Tensor | None:
        """d soft-capped / d scaled logits, [C, V]; None where there is no cap (it is 1)."""
        cap = self.transform.softcap
        if cap is None:
            return None
        return (logits_CV * (self.temperature / cap)).square_().neg_().add_(1.0)


def _scores(
    product_CV: Tensor, labels_C: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probability of the label, log-sum-exp and entropy of a chunk; exponentials, their sums.

    It may write over `product_CV` where that is float32.
    """
    logits_CV = rule.logits(_wide(product_CV))
    picked_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    largest_C = logits_CV.amax(dim=-1)
    shifted_CV = logits_CV.sub_(largest_C[:, None])
    exps_CV = shifted_CV.exp() if rule.with_entropy else shifted_CV.exp_()
    sums_C = exps_CV.sum(dim=-1)
    logsumexp_C = largest_C + sums_C.log()
    entropy_C = None
    if rule.with_entropy:
        entropy_C = sums_C.log() - shifted_CV.mul_(exps_CV).sum(dim=-1) / sums_C
    return picked_C - logsumexp_C, logsumexp_C, entropy_C, exps_CV, sums_C


def _row_scores(
    product_CV: Tensor, labels_C: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The first three of `_scores`: compiled, no logits are written."""
    return _scores(product_CV, labels_C, rule)[:3]


def _slopes(
    product_CV: Tensor,
    labels_C: Tensor,
    logsumexp_C: Tensor,
    upstream_C: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    sums_tokens: bool,
    rule: _Rule,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the product, in its type; its sum over tokens before it is rounded, or None.

    Args:
        upstream_C: gradient of the log-probability, times `rule.slope`.
        entropy: the entropy's gradient, times `rule.slope`, and the entropy; None where it carries
            no gradient.
    """
    dtype = product_CV.dtype
    logits_CV = rule.logits(_wide(product_CV))
    cap_slope_CV = rule.cap_slope(logits_CV)
    logprobs_CV = logits_CV.sub_(logsumexp_C[:, None])
    if entropy is None:
        delta_CV = logprobs_CV.exp_().mul_(-upstream_C[:, None])
    else:
        # d entropy / d logits = -p (log p + entropy)
        upstream_E_C, entropy_C = entropy
        weight_CV = (logprobs_CV + entropy_C[:, None]).mul_(upstream_E_C[:, None])
        weight_CV.add_(upstream_C[:, None])
        delta_CV = logprobs_CV.exp_().mul_(weight_CV).neg_()
    delta_CV = _finish(delta_CV, labels_C, upstream_C, cap_slope_CV)
    return delta_CV.to(dtype), delta_CV.sum(dim=0) if sums_tokens else None


def _finish(
    delta_CV: Tensor, labels_C: Tensor, upstream_C: Tensor, cap_slope_CV: Tensor | None
) -> Tensor:
    """Add the label's one to minus its probability, all times `upstream_C`."""
    if torch.compiler.is_compiling():  # a write to scattered places would end the kernel
        columns_V = torch.arange(delta_CV.shape[1], device=delta_CV.device)
        hit_CV = columns_V == labels_C[:, None]
        delta_CV = delta_CV + torch.where(hit_CV, upstream_C[:, None], 0.0)
    else:
        rows_C = torch.arange(len(delta_CV), device=delta_CV.device)
        delta_CV[rows_C, labels_C] += upstream_C
    return delta_CV if cap_slope_CV is None else delta_CV.mul_(cap_slope_CV)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@dataclass(frozen=True)
class _Scorer:
    """How the tokens of a pass are scored."""

    rule: _Rule
    chunk_tokens: int
    compiled: bool
    entropy_learns: bool

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))

    @property
    def keeps(self) -> bool:
        """Whether the last chunk's exponentials are kept for the backward pass."""
        plain = self.rule.transform.softcap is None and not self.entropy_learns
        return plain and not self.compiled

    def row_scores(
        self, product_CV: Tensor, labels_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        score = _compile(_row_scores) if self.compiled else _row_scores
        scores: tuple[Tensor, Tensor, Tensor | None] = score(product_CV, labels_C, self.rule)
        return scores

    def slopes(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        """`_slopes` of everything but the rule."""
        slopes: Callable[..., Any] = _compile(_slopes) if self.compiled else _slopes
        found: tuple[Tensor, Tensor | None] = slopes(*args, self.rule)
        return found


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scorer: _Scorer,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = hidden_NH.new_zeros(len(labels_N), dtype=dtype)
        logsumexp_N = torch.zeros_like(logprobs_N)
        entropy_N = torch.zeros_like(logprobs_N)
        ctx.kept = None
        for chunk in scorer.chunks(len(labels_N)):
            product_CV = nn.functional.linear(hidden_NH[chunk], weight_VH, bias_V)
            if scorer.keeps:
                found = _scores(product_CV, labels_N[chunk], scorer.rule)
                logprobs_C, logsumexp_C, entropy_C = found[:3]
                ctx.kept = found[3:]
            else:
                logprobs_C, logsumexp_C, entropy_C = scorer.row_scores(product_CV, labels_N[chunk])
            logprobs_N[chunk], logsumexp_N[chunk] = logprobs_C, logsumexp_C
            if entropy_C is not None:
                entropy_N[chunk] = entropy_C
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, logsumexp_N, entropy_N)
        ctx.scorer = scorer
        if not scorer.entropy_learns:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, labels_N, logsumexp_N, entropy_N = ctx.saved_tensors
        scorer: _Scorer = ctx.scorer
        # The sum over chunks is kept in float32: bfloat16 would lose small chunks.
        wide = logsumexp_N.dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        grad_weight_VH: Tensor | None = None
        grad_bias_V = None
        if bias_V is not None and ctx.needs_input_grad[2]:
            grad_bias_V = torch.zeros_like(bias_V, dtype=wide)
        kept, ctx.kept = ctx.kept, None  # is written over: a second backward pass recomputes it
        for chunk in reversed(list(scorer.chunks(len(labels_N)))):
            # d log p(label) / d logits = onehot(label) - softmax
            upstream_C = grads[0][chunk] * scorer.rule.slope
            if kept is not None:
                delta_CV = kept[0].mul_((-upstream_C / kept[1])[:, None])
                kept = None  # only one chunk's memory at a time
                delta_CV = _finish(delta_CV, labels_N[chunk], upstream_C, None)
                narrow_CV, sums_V = delta_CV.to(hidden_NH.dtype), None
                if grad_bias_V is not None:
                    sums_V = delta_CV.sum(dim=0)
                del delta_CV
            else:
                product_CV = nn.functional.linear(hidden_NH[chunk], weight_VH, bias_V)
                entropy = None
                if scorer.entropy_learns:
                    entropy = (grads[1][chunk] * scorer.rule.slope, entropy_N[chunk])
                narrow_CV, sums_V = scorer.slopes(
                    product_CV,
                    labels_N[chunk],
                    logsumexp_N[chunk],
                    upstream_C,
                    entropy,
                    grad_bias_V is not None,
                )
                del product_CV
            if grad_bias_V is not None and sums_V is not None:
                grad_bias_V.add_(sums_V)
            grad_hidden_NH[chunk] = narrow_CV @ weight_VH
            if ctx.needs_input_grad[1]:
                grad_weight_VH = _plus_product(grad_weight_VH, narrow_CV.T, hidden_NH[chunk], wide)
            del narrow_CV  # the next chunk's would stand beside it
        if ctx.needs_input_grad[1] and grad_weight_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH)  # no tokens
        return (
            grad_hidden_NH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VH.dtype),
            None,
            None,
        )


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` + left @ right, in place where there is a total, in `dtype`."""
    if left.dtype == dtype:
        return left @ right if total is None else total.addmm_(left, right)
    if left.device.type in _WIDE_PRODUCTS:
        # The matrix units add up in float32 anyway: no narrow product is written and read again.
        if total is None:
            return torch.mm(left, right, out_dtype=dtype)
        return torch.addmm(total, left, right, out_dtype=dtype, out=total)
    if total is None:
        return (left @ right).to(dtype)
    return total.add_(left @ right)


_WIDE_PRODUCTS = frozenset({"cuda"})
"""Devices that multiply bfloat16 into float32."""
