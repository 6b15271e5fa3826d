"""Eligibility traces of token log-ratios over a packed axis, in linear time.

    PackedAxis          which token belongs to which completion, and where it stands in it
    linear_recurrence   z_t = x_t + a_t z_{t-1}, forward and exact backward by a parallel scan
    uniform_recurrence  the same where a_t is one constant inside each completion
    LambdaTrace         the kernels `recent`, `both` and `terminal` of GRPO-lambda
    suffix_ratio        what a token keeps of its credit when another policy sampled the rest

A trace is a linear map z = K x inside each completion, K lower triangular. At the old policy the
gradient of sum_t exp(z_t) is sum_k c_k grad log pi(o_k) with c = K^T 1, so the *trace weights* c
say how much credit a token gets.

Legend: B completions, N = sum of their lengths, tokens back to back.
Evidence tags: [P] paper, [3P] third parties quoting it, [D] derived and checked, [I] inferred.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

RADIX = 16
"""Block length of the scan: one level costs 2 * RADIX kernels and divides the length by RADIX."""

_LARGEST_LOG = 20.0
"""Logarithm of the largest weight without a bound, so that float32 stays finite."""

UNIFORM_BLOCK = 16
"""Block length where the decay is one constant: a block is then one row of a matrix product."""


@dataclass(frozen=True)
class PackedAxis:
    """Completions of `lengths_B` tokens (zero allowed), back to back on one axis of N tokens."""

    lengths_B: Tensor
    turn_N: Tensor | None = None
    """Place of each token's turn in its completion, long, ascending; None: one turn each."""

    @cached_property
    def starts_B(self) -> Tensor:
        """First token of each completion (of an empty one: of its successor)."""
        return self.lengths_B.cumsum(0) - self.lengths_B

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """First and last tokens of the completions that have any."""
        some_B = self.lengths_B > 0
        starts = self.starts_B[some_B]
        return starts, starts + self.lengths_B[some_B] - 1

    @cached_property
    def completion_N(self) -> Tensor:
        """Index of the completion that each token belongs to."""
        return torch.repeat_interleave(self.lengths_B)

    @cached_property
    def position_N(self) -> Tensor:
        """0-based place of each token inside its completion."""
        everywhere = torch.arange(self.completion_N.numel(), device=self.lengths_B.device)
        return everywhere - self.spread(self.starts_B)

    def spread(self, values_B: Tensor) -> Tensor:
        """Give every token the value of its completion."""
        return values_B[self.completion_N]

    def sum(self, values_N: Tensor) -> Tensor:
        """Sum over the tokens of each completion, in float64; an empty one sums to 0.

        Segments are reduced in order, not by atomic adds: the result is reproducible.
        """
        if not self.lengths_B.numel():
            return values_N.double()
        return torch.segment_reduce(values_N.double(), "sum", lengths=self.lengths_B, initial=0.0)

    def mean(self, values_N: Tensor) -> Tensor:
        """Mean over the tokens of each completion, in float64; an empty one has mean 0."""
        return self.sum(values_N) / self.lengths_B.clamp(min=1)


def _blocks(values_N: Tensor) -> Tensor:
    """Blocks of RADIX consecutive tokens as columns, zero-padded, [RADIX, M].

    Offset-major, so that advancing all blocks by one token reads contiguous memory.
    """
    length = values_N.numel()
    whole, rest = divmod(length, RADIX)
    blocks_KM = values_N.new_empty(RADIX, whole + (rest > 0))
    blocks_KM[:, :whole] = values_N[: length - rest].view(whole, RADIX).t()
    if rest:
        blocks_KM[:rest, -1] = values_N[length - rest :]
        blocks_KM[rest:, -1] = 0
    return blocks_KM


def _scan(inputs_N: Tensor, decays_N: Tensor, reverse: bool = False) -> Tensor:
    """z_t = x_t + a_t z_{t-1} with z_{-1} = 0, in O(N) work and O(log N) levels.

    `reverse` runs from the end: z_t = x_t + a_t z_{t+1}. The axis is cut into blocks of RADIX
    tokens, which all advance together, one in-block offset at a time, from a zero state. The last
    states of the blocks are again such a recurrence, under the products of the decays of a block;
    its solution is then fed into every block.
    """
    states_KM, decays_KM = _blocks(inputs_N), _blocks(decays_N)
    order = range(RADIX)[:: -1 if reverse else 1]
    for before, here in itertools.pairwise(order):
        states_KM[here].addcmul_(decays_KM[here], states_KM[before])
        decays_KM[here].mul_(decays_KM[before])
    if states_KM.shape[1] > 1:
        ends_M = _scan(states_KM[order[-1]], decays_KM[order[-1]], reverse)
        fed, feeding = _fed_by_neighbour(reverse)
        states_KM[:, fed].addcmul_(decays_KM[:, fed], ends_M[feeding])
    return states_KM.t().reshape(-1)[: inputs_N.numel()]


def _fed_by_neighbour(reverse: bool) -> tuple[slice, slice]:
    """Blocks that take a state over, and those that they take it from."""
    head, tail = slice(None, -1), slice(1, None)
    return (head, tail) if reverse else (tail, head)


def _uniform_scan(inputs_N: Tensor, decay: float, resets_R: Tensor, reverse: bool) -> Tensor:
    """`_scan` where every decay is `decay`, but 0 at the tokens `resets_R`.

    A block of K tokens is a row of a matrix product: the map inside it is one for all, L(i, j) =
    decay^(i-j), and what it takes over from its neighbour is an outer product. In the S blocks with
    a reset, L loses the entries that reach across it. The last states are such a recurrence again.
    """
    length, block = inputs_N.numel(), UNIFORM_BLOCK
    if length % block:
        inputs_N = torch.nn.functional.pad(inputs_N, (0, -length % block))
    inputs_MK = inputs_N.reshape(-1, block)
    index_K = torch.arange(block, device=inputs_N.device, dtype=torch.float64)
    kernel_KK = (decay ** (index_K[:, None] - index_K).clamp(min=0)).tril().to(inputs_N.dtype)
    entering_K = (decay ** (index_K + 1)).to(inputs_N.dtype)
    if reverse:
        kernel_KK, entering_K = kernel_KK.t(), entering_K.flip(0)
    states_MK = inputs_MK @ kernel_KK.t()
    cut_S, place_R = torch.unique(resets_R // block, return_inverse=True)
    passed_SK = _resets_passed(len(cut_S), place_R, resets_R % block, reverse)
    linked_SKK = passed_SK[:, :, None] == passed_SK[:, None, :]
    cut_states_SK = (linked_SKK * kernel_KK @ inputs_MK[cut_S, :, None]).squeeze(-1)
    states_MK[cut_S] = cut_states_SK
    if len(states_MK) > 1:
        ends_M = _uniform_scan(states_MK[:, 0 if reverse else -1], decay**block, cut_S, reverse)
        fed, feeding = _fed_by_neighbour(reverse)
        states_MK[fed].addcmul_(ends_M[feeding, None], entering_K)
        before_S = torch.nn.functional.pad(ends_M, (1, 1))[cut_S + (2 if reverse else 0)]
        entering_SK = (passed_SK == 0) * entering_K
        states_MK[cut_S] = cut_states_SK.addcmul_(before_S[:, None], entering_SK)
    return states_MK.view(-1)[:length]


def _resets_passed(blocks: int, block_R: Tensor, offset_R: Tensor, reverse: bool) -> Tensor:
    """How many resets lie between the entry of a block and each of its tokens, its own included."""
    resets_SK = offset_R.new_zeros(blocks, UNIFORM_BLOCK)
    resets_SK[block_R, offset_R] = 1
    return resets_SK.flip(1).cumsum(1).flip(1) if reverse else resets_SK.cumsum(1)


class _LinearRecurrence(torch.autograd.Function):
    """The recurrence as an autograd function. It saves decays and states alone: O(N) memory.

    The adjoint g_t = dL/dz_t + a_{t+1} g_{t+1} is the same recurrence run backwards;
    then dL/dx_t = g_t and dL/da_t = g_t z_{t-1}.
    """

    @staticmethod
    def forward(ctx: Any, inputs_N: Tensor, decays_N: Tensor) -> Tensor:
        states_N = _scan(inputs_N, decays_N)
        ctx.save_for_backward(decays_N, states_N)
        return states_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
        decays_N, states_N = ctx.saved_tensors
        following_N = decays_N.roll(-1)  # the wrapped first decay meets a zero state
        adjoint_N = _scan(grad_N, following_N, reverse=True)
        if not ctx.needs_input_grad[1]:
            return adjoint_N, None
        previous_N = states_N.roll(1)
        previous_N[:1] = 0
        return adjoint_N, adjoint_N * previous_N


class _UniformRecurrence(torch.autograd.Function):
    """The recurrence of one decay; its adjoint runs backwards from the last tokens."""

    @staticmethod
    def forward(ctx: Any, inputs_N: Tensor, decay: float, axis: PackedAxis) -> Tensor:
        ctx.decay, ctx.axis = decay, axis
        return _uniform_scan(inputs_N, decay, axis.ends[0], reverse=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        return _uniform_scan(grad_N, ctx.decay, ctx.axis.ends[1], reverse=True), None, None


def uniform_recurrence(inputs_N: Tensor, decay: float, axis: PackedAxis) -> Tensor:
    """The recurrence z_t = x_t + decay * z_{t-1} in every completion of `axis`, from z = x.

    `linear_recurrence` with one decay; several times as fast on long completions.
    """
    result: Tensor = _UniformRecurrence.apply(inputs_N, decay, axis)
    return result


def linear_recurrence(inputs_N: Tensor, decays_N: Tensor) -> Tensor:
    """Solve z_t = x_t + a_t z_{t-1} along a flat axis; a_t = 0 starts a new sequence.

    Differentiable once in both arguments, float32 or float64, without a loop over tokens.
    The first decay has no effect. Sequences do not touch each other: the result for one does not
    depend on the values of its neighbours (as long as those are finite).
    """
    if inputs_N.numel() == 0:
        return inputs_N + decays_N
    result: Tensor = _LinearRecurrence.apply(inputs_N, decays_N)
    return result


@dataclass(frozen=True)
class LambdaTrace:
    """The linear map z = K x of GRPO-lambda (arXiv 2510.00194) on every completion of `axis`.

    With d = gamma * lambda and 0-based k <= t inside the completion, K(t, k) is

        recent    d^(t-k)                          [3P], the lambda-return of Theorem 1 [D]
        both      max(d^(t-k), d^k)                [3P]
        terminal  d^(t-k) in the last row, else 0  an ablation, not the paper: late tokens heavy

    d = 0 makes `recent` the identity (GRPO exactly) and `terminal` the last token alone; under
    `both` the first token stays in every row, because d^0 = 1 [D]. d = 1 makes `recent` and
    `both` the cumulative sum.

    `turn_decay` d_u ([D]; given tokens have no place on the axis) is the decay over the border of
    two turns, in the place of d. For k in turn u and t in turn v

        recent    d^(t-k-(v-u)) d_u^(v-u)

    d_u = d is the trace that knows no turns, d_u = 0 a trace a turn; d = 1 and d_u < 1 make a turn
    one action.

    `select_N` masks x: columns k with select_k = False are zero, so that only the selected tokens
    get credit. `mean` divides row t by its sum over the selected, so that z_t is a weighted mean of
    log-ratios and not their sum; a row without any is 0. `scale_N` then multiplies column k: a cut
    (`suffix_ratio`) takes credit off a token without giving it to its neighbours.
    """

    axis: PackedAxis
    kind: str
    decay: float
    scale_N: Tensor | None = None
    select_N: Tensor | None = None
    mean: bool = False
    turn_decay: float | None = None

    def apply(self, inputs_N: Tensor) -> Tensor:
        """The traces z = K x of all completions, differentiable in x."""
        scaled_N = inputs_N if self.scale_N is None else inputs_N * self.scale_N
        traced_N = self._kernel(scaled_N)
        if not self.mean:
            return traced_N
        sums_N = self._kernel(torch.ones_like(inputs_N))
        return traced_N / sums_N.masked_fill(sums_N == 0, 1.0)

    def _kernel(self, inputs_N: Tensor) -> Tensor:
        if self.select_N is not None:
            inputs_N = inputs_N * self.select_N
        return _KERNELS[self.kind](self, inputs_N)

    def rows(self, like_N: Tensor) -> Tensor:
        """1 where row t of K carries a TD error, else 0."""
        if self.kind != "terminal":
            return torch.ones_like(like_N)
        last_N = self.axis.position_N == self.axis.spread(self.axis.lengths_B) - 1
        return last_N.to(like_N.dtype)

    def weights(self, like_N: Tensor) -> Tensor:
        """Trace weights c = K^T rows, [N] in the dtype of `like_N`: the credit of every token."""
        return self.transposed(self.rows(like_N))

    def transposed(self, values_N: Tensor) -> Tensor:
        """What K^T makes of `values_N`: what every token gets of the values of tokens behind it."""
        with torch.enable_grad():
            inputs_N = torch.zeros_like(values_N).requires_grad_()
            traced_N = self.apply(inputs_N)
        return torch.autograd.grad(traced_N, inputs_N, values_N)[0]

    def decays(self, like_N: Tensor, decay: float) -> Tensor:
        """Factors a_t = decay inside completions, 0 at their starts."""
        decays_N = torch.full_like(like_N, decay)
        if self.turn_decay is not None and self.axis.turn_N is not None:
            decays_N = decays_N.masked_fill(_changes(self.axis.turn_N), self.turn_decay)
        return decays_N.masked_fill(self.axis.position_N == 0, 0.0)

    @property
    def knows_turns(self) -> bool:
        """Whether the decay differs between turns."""
        return self.turn_decay is not None and self.axis.turn_N is not None


def _changes(turn_N: Tensor) -> Tensor:
    """Whether a token's turn is another than that of the token before it, [N] bool."""
    changes_N = torch.zeros_like(turn_N, dtype=torch.bool)
    changes_N[1:] = turn_N[1:] != turn_N[:-1]
    return changes_N


def suffix_ratio(
    gap_N: Tensor, axis: PackedAxis, bound: float = 1.0, *, by_factor: bool = False
) -> Tensor:
    """What a token keeps of its credit off-policy: min(bound, prod_{j > k} rho_j), [N].

    `gap_N` is log rho = log pi_old - log mu. Token k is credited with A at every t >= k, and A is
    made by the whole completion. So the expectation of grad log pi(o_k) A over the tokens from k
    on, under pi_old and not mu, asks for prod_{j = k..T-1} rho_j whatever t is [D, by exact
    enumeration]. The product k..t of V-trace (1802.01561) and Retrace (1606.02647) belongs to TD
    errors of a critic, which know nothing of the tokens behind t. rho_k itself is the correction's
    (`learner.algorithm.corrections`), on the surrogate of token k.

    The bound keeps the variance finite, at the price of a bias. The product is truncated as a
    whole, as by the trajectory-aware traces of arXiv 2301.11321. `by_factor` truncates each rho_j,
    as V-trace does: never more than the former for a bound of 1 [D], and much less in long
    completions. Ratios that are nothing but noise of 0.02 nats then leave e^-8 of the credit of a
    token with 1000 behind it.
    """
    highest = min(math.log(bound), _LARGEST_LOG)
    wide_N = gap_N.double()
    if by_factor:
        wide_N = wide_N.clamp(max=highest)
    last_N = axis.position_N == axis.spread(axis.lengths_B) - 1
    follows_N = (~last_N).double()
    behind_N = linear_recurrence(wide_N.flip(0), follows_N.flip(0)).flip(0) - wide_N
    limit = _LARGEST_LOG if by_factor else highest
    return behind_N.clamp(max=limit).exp().to(gap_N.dtype)


def _recent(trace: LambdaTrace, inputs_N: Tensor) -> Tensor:
    """z_t = x_t + d z_{t-1}."""
    long = inputs_N.numel() > 4 * UNIFORM_BLOCK * trace.axis.lengths_B.numel()
    if long and not trace.knows_turns:
        return uniform_recurrence(inputs_N, trace.decay, trace.axis)
    return linear_recurrence(inputs_N, trace.decays(inputs_N.detach(), trace.decay))


def _terminal(trace: LambdaTrace, inputs_N: Tensor) -> Tensor:
    return _recent(trace, inputs_N) * trace.rows(inputs_N.detach())


def _both(trace: LambdaTrace, inputs_N: Tensor) -> Tensor:
    """The two-sided kernel from two recurrences [D].

    Below m = ceil(t/2) the kernel is d^k, from m on it is d^(t-k):

        z_t = P_{m-1} + R_t - d^(t-m+1) R_{m-1}

    with R the recent trace and P_t = d^t x_t + P_{t-1}.
    """
    position_N = trace.axis.position_N
    half_N = (position_N + 1) // 2
    # m = 0 at the first token only, which has nothing before it: any token of its own will do.
    before_N = trace.axis.spread(trace.axis.starts_B) + (half_N - 1).clamp(min=0)
    decay = torch.tensor(trace.decay, dtype=inputs_N.dtype, device=inputs_N.device)
    recent_N = _recent(trace, inputs_N)
    early_N = linear_recurrence(inputs_N * decay**position_N, trace.decays(inputs_N.detach(), 1.0))
    overlap_N = decay ** (position_N - half_N + 1) * recent_N[before_N]
    return (half_N > 0).to(inputs_N.dtype) * (early_N[before_N] - overlap_N) + recent_N


_KERNELS: dict[str, Callable[[LambdaTrace, Tensor], Tensor]] = {
    "recent": _recent,
    "both": _both,
    "terminal": _terminal,
}


def above_entropy_quantile(entropy_N: Tensor, axis: PackedAxis, quantile: float) -> Tensor:
    """Tokens whose entropy reaches the `quantile` of their completion, [N] bool; ties are kept.

    The threshold of a completion of T tokens is its floor(quantile * T)-th smallest entropy
    (0-based), so at least one token of a completion is selected for every quantile < 1.
    """
    by_entropy_N = entropy_N.argsort(stable=True)
    order_N = by_entropy_N[axis.completion_N[by_entropy_N].argsort(stable=True)]
    # Rounded first: 100 * 0.29 is a hair below 29 in floating point.
    rank_B = (axis.lengths_B.double() * quantile).round(decimals=9).long()
    threshold_N = entropy_N[order_N[axis.spread(axis.starts_B + rank_B)]]
    return entropy_N >= threshold_N
