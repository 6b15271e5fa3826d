"""Gradients of single completions whose every token has an advantage of its own.

    credited advantages --a recipe's objective and correction--> gradient --> its sketch

What a rule credits (`common.record.credit_log`, column `advantages`) has its trace in it. So the
gradient under it is that of the rule's loss at the first update of a step, and other advantages can
take its place. The terms for KL, entropy and likelihood are left out: they follow no advantage.

A *sketch* keeps inner products. Every entry of a gradient is given a random sign and added to one
of `SIZE` sums, so that gradients of any size can be kept for every completion. Cosines of sketches
are off by 1 / sqrt(SIZE) = 0.001, and exact where a model has no more than `SIZE` parameters.

Shapes: T tokens of a completion, N those of a micro-batch or of the step, B completions of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.config.algorithm import AlgorithmConfig, CreditConfig
from learner.algorithm.loss import CompletionBatch
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.policy.packing import Segment
from learner.policy.step_batch import StepBatch
from learner.policy.tries import SegmentLengths
from learner.training import fsdp
from learner.training.token_choices import Chosen, choose_tokens
from learner.training.trainer import Trainer
from learner.training.work import Microbatch, load_microbatch

SIZE = 2**20


@dataclass(frozen=True)
class Credited:
    """A completion of a step, with what its tokens are credited with."""

    completion: int
    """Place of the completion in the step."""
    weight: float
    """Weight of its tokens in the loss, from the aggregation."""
    advantages_T: npt.NDArray[np.float64]
    """NaN: not known. Such a token keeps its place and adds nothing to the loss."""


def sketched_gradients(
    trainer: Trainer, batch: StepBatch, recipe: Recipe, given: Sequence[Credited]
) -> npt.NDArray[np.float32]:
    """The sketch of the gradient of every completion, [len(given), SIZE]. One rank alone.

    Args:
        recipe: from `advantages_alone`.
        given: each completion once.
    """
    policy, device = trainer.policy, trainer.device
    prepared, advantages_N = _prepared(batch, given)
    microbatches = [
        load_microbatch(batch, _segments(batch, each.completion), device, None, advantages_N)
        for each in given
    ]
    known = [~each.advantages_N.isnan() for each in microbatches if each.advantages_N is not None]
    microbatches = [_without_nan(each) for each in microbatches]
    chosen = choose_tokens(
        recipe, policy, microbatches, None, prepared, trainer.job.temperature, None
    )
    found = np.zeros((len(given), SIZE), np.float32)
    for row, (microbatch, known_N, tokens) in enumerate(
        zip(microbatches, known, chosen, strict=True)
    ):
        fsdp.before_backward(policy.model, last=True, keep_gathered=trainer.keep_gathered)
        _backward(trainer, recipe, microbatch, prepared, known_N, tokens)
        found[row] = sketch(
            (each.numel(), each.grad) for each in policy.model.parameters() if each.requires_grad
        ).numpy()
        policy.model.zero_grad(set_to_none=True)
        microbatch.row.layout.derived.clear()
    return found


def advantages_alone(
    algorithm: AlgorithmConfig, correction_kind: str, max_completion_tokens: int
) -> Recipe:
    """The recipe of `algorithm` for advantages that have their credit in them already."""
    objective = replace(algorithm.objective, kl=0.0, entropy=0.0, likelihood=0.0)
    config = replace(algorithm, objective=objective, credit=CreditConfig(kind="broadcast"))
    return Recipe(config, correction_kind, max_completion_tokens)


def as_prepared(
    batch: StepBatch, advantages_B: Tensor, weights_B: Tensor, taken_B: Tensor
) -> Prepared:
    """What a recipe would have prepared of a step, from advantages, token weights and who trains.

    All are [B]. Who trains is kept as well, and no metric is known.
    """
    lengths_B = torch.from_numpy(batch.trained_lengths_B)
    group_B = torch.from_numpy(batch.group_B)
    return Prepared(
        advantages_B, weights_B, taken_B, taken_B, group_B, lengths_B, {}, advantages_B != 0
    )


def sketch(gradients: Iterable[tuple[int, Tensor | None]]) -> Tensor:
    """Fold a gradient into [SIZE] sums with random signs, the same ones at every call.

    Args:
        gradients: of every parameter its number of entries, and its gradient; None is 0.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2 * SIZE,), generator=generator).float() * 2 - 1
    total, place = torch.zeros(SIZE), 0
    for entries, gradient in gradients:
        flat = torch.empty(0)
        if gradient is not None:
            flat = fsdp.local(gradient).detach().reshape(-1).float().cpu()
        begin = 0
        while begin < entries:
            count = min(entries - begin, SIZE - place)
            # Every stretch has the signs from another place on: two never have them alike.
            shift = int(torch.randint(0, SIZE, (1,), generator=generator))
            if gradient is not None:
                own = signs[shift : shift + count]
                total[place : place + count].addcmul_(flat[begin : begin + count], own)
            begin, place = begin + count, (place + count) % SIZE
    return total


def _prepared(batch: StepBatch, given: Sequence[Credited]) -> tuple[Prepared, Tensor]:
    """What the loss is given of completions, and the advantages of all tokens of the step.

    An objective with one advantage a completion (GMPO) has the mean of its known tokens.
    """
    advantages_N = torch.zeros(len(batch.token_ids), dtype=torch.float64)
    advantages_B = torch.zeros(len(batch.group_B), dtype=torch.float64)
    weights_B, taken_B = torch.zeros_like(advantages_B), torch.zeros(len(advantages_B)).bool()
    for each in given:
        own = batch.tokens_of(each.completion)
        advantages_N[own] = torch.from_numpy(each.advantages_T)
        counted = each.advantages_T[batch.loss_mask[own]]
        counted = counted[~np.isnan(counted)]
        advantages_B[each.completion] = counted.mean() if len(counted) else 0.0
        weights_B[each.completion], taken_B[each.completion] = each.weight, True
    return as_prepared(batch, advantages_B, weights_B, taken_B), advantages_N


def _segments(batch: StepBatch, completion: int) -> list[Segment]:
    """The sequences of one completion, each behind its own prompt."""
    sequences = batch.sequences
    return [
        Segment(prompt, (s,), SegmentLengths(len(batch.prompts[prompt]), (length,)))
        for s in np.flatnonzero(sequences.completion_S == completion).tolist()
        for prompt, length in [(int(sequences.prompt_S[s]), int(sequences.lengths_S[s]))]
    ]


def _without_nan(microbatch: Microbatch) -> Microbatch:
    assert microbatch.advantages_N is not None
    return replace(microbatch, advantages_N=microbatch.advantages_N.nan_to_num(nan=0.0))


def _backward(
    trainer: Trainer,
    recipe: Recipe,
    microbatch: Microbatch,
    prepared: Prepared,
    known_N: Tensor,
    tokens: Chosen,
) -> None:
    """Run forward and backward on one completion, at the policy that ratios are to."""
    temperature, own = trainer.job.temperature, microbatch.indices_B
    logprobs_N, _ = trainer.policy.logprobs(microbatch.row, temperature=temperature)
    output = recipe.loss(
        CompletionBatch(
            logprobs_N=logprobs_N,
            old_logprobs_N=logprobs_N.detach(),
            behaviour_logprobs_N=microbatch.behaviour_logprobs_N,
            reference_logprobs_N=None,
            entropy_N=None,
            loss_mask_N=microbatch.loss_mask_N,
            lengths_B=microbatch.lengths_B,
            advantages_B=prepared.advantages_B[own].to(trainer.device),
            token_weights_B=prepared.token_weights_B[own].to(trainer.device),
            prefix_counts_N=None,
            advantages_N=microbatch.advantages_N,
            turn_N=microbatch.turn_N,
            update_N=known_N,
            elsewhere_B=microbatch.elsewhere_B,
            **{f"{axis}_chosen_N": chosen_N for axis, chosen_N in tokens.items()},
        )
    )
    output.loss.backward()
