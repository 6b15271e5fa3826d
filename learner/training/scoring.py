"""What other models than the policy say of a step's tokens: a scorer's columns, a KL in the reward.

A forward pass without gradient over the whole batch, dealt to the ranks as a step is. A scorer may
read something else before a completion than the policy did (`learner.policy.contexts`).

Shapes: B completions of the step, N completion tokens, of all or of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from common.errors import NumbersError, RunError, UserError
from learner.algorithm.advantages import kl_penalised_rewards
from learner.algorithm.recipe import Recipe
from learner.algorithm.traces import PackedAxis
from learner.policy.contexts import in_context
from learner.policy.model import Policy
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.consistency import with_consistency_bonus
from learner.training.job import LearnerJob
from learner.training.models import Models
from learner.training.work import Microbatch

Scores = npt.NDArray[np.float32]
Deal = Callable[[StepBatch, npt.NDArray[np.bool_]], Sequence[Microbatch]]
"""(batch, which completions) -> this rank's micro-batches of them."""


@dataclass(frozen=True)
class Scoring:
    """Scores the steps of a run. All methods are collective."""

    job: LearnerJob
    models: Models
    deal: Deal

    def scored(self, recipe: Recipe, batch: StepBatch) -> tuple[StepBatch, dict[str, float]]:
        """`batch` with what other models say of its tokens; scores it has stay.

        Raises:
            NumbersError: a scorer gave a number that is not finite.
            UserError: the learner does not hold the scorer, or the run has no contexts.
        """
        started, scorer = time.perf_counter(), recipe.scorer
        metrics = dict[str, float]()
        if scorer is None:
            batch = replace(batch, scores=None)
        else:
            batch, metrics = self._by_scorer(recipe, scorer, batch)
            metrics["time/score"] = time.perf_counter() - started
        if recipe.kl_in_reward:
            plain = scorer == "reference" and batch.scored_B is None
            known = batch.scores if plain else None
            reference = self._score("reference", batch) if known is None else known
            batch, penalty = with_kl_in_rewards(batch, reference, recipe.kl)
            metrics |= penalty
        if recipe.consistency.weight:
            batch, bonus = with_consistency_bonus(batch, recipe.consistency)
            metrics |= bonus
        return batch, metrics

    def _by_scorer(
        self, recipe: Recipe, scorer: str, batch: StepBatch
    ) -> tuple[StepBatch, dict[str, float]]:
        """`batch` with the scorer's column, and that of the policy where it is compared with."""
        advantage, read, metrics = recipe.advantage, batch, dict[str, float]()
        chosen_B = batch.lengths_B > 0
        if advantage.context != "prompt":
            found = in_context(
                batch,
                sibling=advantage.context == "sibling",
                sibling_reward=advantage.sibling_reward,
                max_length=self.job.model.max_length,
            )
            read, chosen_B = found.batch, found.scored_B & chosen_B
            batch = replace(batch, scored_B=found.scored_B)
            metrics["scorer/without_context"] = float(found.missing)
            metrics["scorer/context_too_long"] = float(found.too_long)
        if batch.scores is None:
            batch = replace(batch, scores=self._score(scorer, read, chosen_B))
        if advantage.against == "policy":
            batch = replace(batch, own=self._score("policy", batch))
        return batch, metrics | check_scores(batch, scorer)

    def _score(
        self, name: str, batch: StepBatch, chosen_B: npt.NDArray[np.bool_] | None = None
    ) -> Scores:
        """What a model says of every token of the step; NaN for completions not `chosen_B`."""
        mine = self.deal(batch, batch.lengths_B > 0 if chosen_B is None else chosen_B)
        with self.models.scoring(name) as policy:
            if policy is None:
                raise UserError(
                    f"algorithm.advantage.scorer={name}: the learner does not hold that model, "
                    "and the run has no scores of the step on record: ask for another rule"
                )
            return score_tokens(policy, batch, mine, self.job.temperature)


@torch.no_grad()
def score_tokens(
    policy: Policy, batch: StepBatch, mine: Sequence[Microbatch], temperature: float
) -> Scores:
    """Log-probability of every token of the step under `policy`, [N]. Collective.

    Args:
        mine: this rank's micro-batches; those of all ranks hold every completion once.
    """
    found: dict[int, Scores] = {}
    for each in mine:
        logprobs_N = policy.logprobs(each.row, temperature=temperature)[0].float().cpu()
        parts = logprobs_N.split(list(each.row.lengths))
        for sequence, part in zip(each.row.completions, parts, strict=True):
            found[sequence] = part.numpy()
    fsdp.reshard(policy.model)
    scores = np.full(len(batch.token_ids), np.nan, np.float32)
    for part_of_rank in fsdp.gather_objects(found):
        for sequence, values in part_of_rank.items():
            scores[batch.sequences.tokens_of(sequence)] = values
    return scores


def check_scores(batch: StepBatch, scorer: str) -> dict[str, float]:
    """How far the sampler is from the scorer, in the mean over sampled tokens in the loss.

    Raises:
        NumbersError: the scorer gave a number that is not finite.
    """
    assert batch.scores is not None
    counted = batch.loss_mask & ~np.isnan(batch.behaviour_logprobs)
    if batch.scored_B is not None:
        counted &= np.repeat(batch.scored_B, batch.lengths_B)
    wrong = np.flatnonzero(counted & ~np.isfinite(batch.scores))
    if len(wrong):
        completion = int(np.searchsorted(batch.offsets, wrong[0], side="right")) - 1
        whose = "teacher.path" if scorer == "teacher" else "model.path"
        raise NumbersError(
            f"the scorer ({scorer}) gives {len(wrong)} log-probabilities that are not finite, the "
            f"first for token {int(wrong[0] - batch.offsets[completion])} of completion "
            f"{completion} of the step: check the weights at {whose}, or set "
            "algorithm.advantage.scorer=null with another algorithm.advantage.kind. The groups are "
            "kept in failed-batch.arrow in the run directory"
        )
    gap = (batch.behaviour_logprobs - batch.scores)[counted].astype(np.float64)
    return {"scorer/gap": float(gap.mean()) if len(gap) else 0.0}


def with_kl_in_rewards(
    batch: StepBatch, reference: Scores, beta: float
) -> tuple[StepBatch, dict[str, float]]:
    """Take beta times each completion's KL to the reference off its reward.

    The policy's log-probabilities are those it sampled with, which are at hand: the sum over
    sampled tokens in the loss of log mu - log pi_ref is the unbiased one-sample estimate.

    Args:
        reference: what the reference says of every token of the step, [N].
    """
    gap_N = torch.from_numpy(batch.behaviour_logprobs - reference)
    given_N = torch.from_numpy(np.isnan(batch.behaviour_logprobs) | ~batch.loss_mask)
    axis = PackedAxis(torch.from_numpy(batch.lengths_B))
    kl_B = axis.sum(gap_N.masked_fill(given_N, 0.0)).numpy()
    if not np.isfinite(kl_B).all():
        raise RunError(
            "the reference policy gives log-probabilities that are not finite: check the "
            "weights at model.path, or set algorithm.objective.kl=0"
        )
    rewards_B = kl_penalised_rewards(
        torch.from_numpy(batch.rewards_B), torch.from_numpy(kl_B), beta
    )
    penalty = {"reward/kl_penalty": float(beta * kl_B.mean())}
    # No verifier has a space in its name.
    parts = batch.parts and {**batch.parts, "KL penalty": -beta * kl_B}
    return replace(batch, rewards_B=rewards_B.numpy(), parts=parts), penalty
