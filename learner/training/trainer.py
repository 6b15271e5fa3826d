"""One learner step: groups in, one policy update and its metrics out.

    StepBatch --recipe.prepare--> advantages --plan_packing--> micro-batches
        --policy--> log-probabilities --recipe.loss--> backward ... --> clip, optimiser

The recipe owns the maths and its one global denominator; this module owns how it is computed:
micro-batches, ranks, precision, updates. pi_old is the policy before the first optimiser step of
the batch, so the first epoch's forward pass is pi_old, and later epochs reuse what it stored.

Shapes: B completions of the step, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from common.config.sections import LearnerConfig
from common.errors import RunError, UserError
from learner.algorithm.advantages import kl_penalised_rewards
from learner.algorithm.loss import CompletionBatch, Metrics
from learner.algorithm.recipe import Prepared, Recipe
from learner.algorithm.traces import PackedAxis
from learner.policy.model import Policy
from learner.policy.packing import (
    PackedRow,
    PackingPlan,
    StepBatch,
    plan_packing,
)
from learner.training import fsdp
from learner.training.batch_checks import describe
from learner.training.credit_sheet import CreditSheet
from learner.training.guards import GradientGuard
from learner.training.heap import HeapWatch
from learner.training.job import LearnerJob
from learner.training.work import Microbatch, Part, Work, load_microbatch, parts_of

_ZERO_METRICS = ("loss/policy", "loss/kl", "clip_fraction", "is_ratio/mean", "logprob_gap/mean")
"""Metrics that are 0 where no token of the step trains."""


def learning_rate(config: LearnerConfig, step: int, total_steps: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then constant or decay to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(progress, 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate


@dataclass
class _Totals:
    """Additive results of one rank; the sum over ranks is the step's."""

    metrics: Metrics = field(default_factory=dict)
    surrogate_sums_B: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add_metrics(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            old_value, old_weight = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (old_value + value, old_weight + weight)

    def over_ranks(self) -> _Totals:
        """Totals of all ranks, summed in rank order: the same on every rank. Collective."""
        total = _Totals({}, np.zeros_like(self.surrogate_sums_B))
        for part in fsdp.gather_objects(self):
            total.add_metrics(part.metrics)
            total.surrogate_sums_B += part.surrogate_sums_B
        return total

    def means(self, updates: int) -> dict[str, float]:
        return {name: value / (weight or updates) for name, (value, weight) in self.metrics.items()}


@dataclass
class Trainer:
    """Makes learner steps: it has the sharded policy, its optimisers and the recipe."""

    job: LearnerJob
    recipe: Recipe
    policy: Policy
    reference: Policy | None
    optimizers: Sequence[torch.optim.Optimizer]
    """Every parameter belongs to one of them."""
    mesh: DeviceMesh
    device: torch.device
    keep_gathered: bool
    """Parameters stay gathered through all micro-batches of a step (`fsdp.gather_once`)."""
    step: int = 0
    """Learner steps done."""
    guard: GradientGuard = field(init=False)
    heap: HeapWatch = field(default_factory=HeapWatch)

    def __post_init__(self) -> None:
        self.guard = GradientGuard(self.job.learner)

    def train(self, batch: StepBatch, sheet: CreditSheet | None = None) -> dict[str, float]:
        """Update the policy on `batch`: one optimiser step for each part and epoch. Collective.

        Args:
            sheet: takes down what the tokens are credited with, if given.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            RunError: the gradient norms of too many steps in a row were not finite.
        """
        started = time.perf_counter()
        rate = learning_rate(self.job.learner, self.step, self.job.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        work, metrics = self._begin(batch, sheet, self.job.algorithm.objective.updates_per_batch)
        metrics["time/pack"] = time.perf_counter() - started
        probe_every = self.job.learner.credit_probe_every
        if probe_every and self.step % probe_every == 0 and self.recipe.shapes_credit:
            metrics["grad_norm/broadcast_credit"], _ = self._gradient(work, self.recipe.broadcast())
        metrics |= self._updates(work, sheet)
        metrics["learning_rate"] = rate
        metrics["time/rank_train"] = time.perf_counter() - started
        self.step += 1
        self.heap.after_step()
        return metrics

    def probe(self, batch: StepBatch, sheet: CreditSheet | None = None) -> dict[str, float]:
        """Compute the first gradient of a step on `batch`, without the step. Collective.

        Returns:
            Metrics of the step.

        Raises:
            UserError: the recipe compares with a reference policy, and there is none.
        """
        if self.recipe.needs_reference and self.reference is None:
            raise UserError(
                "algorithm.objective.kl > 0 compares with a reference policy, which the run did "
                "not have: set algorithm.objective.kl=0"
            )
        work, metrics = self._begin(batch, sheet, updates=1)
        metrics["grad_norm"], totals = self._gradient(work, self.recipe, sheet)
        return metrics | totals.over_ranks().means(updates=1)

    def _begin(
        self, batch: StepBatch, sheet: CreditSheet | None, updates: int
    ) -> tuple[Work, dict[str, float]]:
        """Prepare the step; also returns the metrics that are known before any gradient."""
        metrics = dict.fromkeys(_ZERO_METRICS, 0.0)
        if self.recipe.kl_in_reward:
            batch, penalty = self._with_kl_in_rewards(batch)
            metrics |= penalty
        estimated = self._estimate(batch)
        if sheet is not None:
            sheet.begin(batch, estimated)
        parts, efficiencies = [], []
        for members_B in parts_of(batch, updates):
            trained_B = estimated.trained_B.numpy() & members_B
            plan = self._plan(batch, trained_B)
            parts.append(Part(torch.from_numpy(members_B), self._mine(batch, plan, estimated)))
            efficiencies.append(plan.efficiency)
        first = self.recipe.weigh(estimated, parts[0].members_B)
        metrics |= describe(batch, estimated) | first.metrics
        metrics["packing/efficiency"] = float(np.mean(efficiencies))
        return Work(batch, estimated, first, parts), metrics

    def _plan(self, batch: StepBatch, trained_B: npt.NDArray[np.bool_]) -> PackingPlan:
        return plan_packing(
            batch,
            trained_B,
            ranks=self.mesh.size(),
            budget=self.job.tokens_per_microbatch,
            share_prefix=self.job.learner.packing == "shared_prefix",
            pairs_per_token=6.0 * self.policy.hidden_size,
        )

    def _mine(
        self, batch: StepBatch, plan: PackingPlan, estimated: Prepared | None = None
    ) -> list[Microbatch]:
        """Load this rank's micro-batches, with prefix counts of what `estimated` keeps."""
        kept_B = None
        if estimated is not None and self.recipe.needs_prefix_counts:
            kept_B = estimated.kept_B.numpy()
        mine = plan.microbatches[self.mesh.get_rank()]
        return [load_microbatch(batch, segments, self.device, kept_B) for segments in mine]

    def _with_kl_in_rewards(self, batch: StepBatch) -> tuple[StepBatch, dict[str, float]]:
        """Take beta times each completion's KL to the reference off its reward. Collective.

        The policy's log-probabilities are those it sampled with, which are at hand: the sum over
        sampled tokens of log mu - log pi_ref is the unbiased one-sample estimate. Collective.
        """
        kl_B = np.zeros(len(batch.group_B))
        plan = self._plan(batch, batch.lengths_B > 0)
        for microbatch in self._mine(batch, plan):
            gap_N = microbatch.behaviour_logprobs_N - self._reference_logprobs(microbatch.row)
            given_N = microbatch.behaviour_logprobs_N.isnan()  # not sampled
            sums_B = PackedAxis(microbatch.lengths_B).sum(gap_N.masked_fill(given_N, 0.0))
            kl_B[microbatch.indices_B.numpy()] = sums_B.cpu().numpy()
        kl_B = np.sum(fsdp.gather_objects(kl_B), axis=0)
        if not np.isfinite(kl_B).all():
            raise RunError(
                "the reference policy gives log-probabilities that are not finite: check the "
                "weights at model.path, or set algorithm.objective.kl=0"
            )
        rewards_B = kl_penalised_rewards(
            torch.from_numpy(batch.rewards_B), torch.from_numpy(kl_B), self.recipe.kl
        )
        penalty = {"reward/kl_penalty": float(self.recipe.kl * kl_B.mean())}
        return replace(batch, rewards_B=rewards_B.numpy()), penalty

    @torch.no_grad()
    def _reference_logprobs(self, row: PackedRow) -> Tensor:
        assert self.reference is not None
        return self.reference.logprobs(row, temperature=self.job.temperature)[0]

    def _gradient(
        self, work: Work, recipe: Recipe, sheet: CreditSheet | None = None
    ) -> tuple[float, _Totals]:
        """Compute the gradient of the first update under `recipe`; throw it away. Collective.

        It costs one forward and one backward pass. `train` measures GRPO's credit with it: against
        `grad_norm`, its norm says how far traces blow the gradient up. `probe` measures a recipe
        that the run did not have.

        Returns:
            The gradient's norm before clipping, and this rank's totals.
        """
        totals = _Totals({}, np.zeros(len(work.batch.group_B)))
        part = work.parts[0]
        self._pass(part, work.first, None, totals, recipe, sheet)
        norm = fsdp.clip_gradients(self.policy.model, math.inf) if part.microbatches else 0.0
        self.policy.model.zero_grad(set_to_none=True)
        return norm, totals

    def _pass(
        self,
        part: Part,
        prepared: Prepared,
        old: Sequence[Tensor] | None,
        totals: _Totals,
        recipe: Recipe,
        sheet: CreditSheet | None,
    ) -> list[Tensor]:
        """Run forward and backward on an update's micro-batches; returns log-probabilities.

        Args:
            old: those before the first optimiser step, None where this pass gives them.
        """
        if sheet is not None:
            sheet.add_weights(prepared.token_weights_B)
        logprobs = []
        for i, microbatch in enumerate(part.microbatches):
            fsdp.before_backward(
                self.policy.model,
                last=i == len(part.microbatches) - 1,
                keep_gathered=self.keep_gathered,
            )
            old_N = None if old is None else old[i]
            logprobs_N, credit_M = self._accumulate(microbatch, prepared, old_N, totals, recipe)
            if sheet is not None:
                sheet.add(microbatch.row, microbatch.loss_mask_N, logprobs_N, credit_M)
            logprobs.append(logprobs_N)
        return logprobs

    def _estimate(self, batch: StepBatch) -> Prepared:
        return self.recipe.estimate(
            torch.from_numpy(batch.rewards_B),
            torch.from_numpy(batch.group_B),
            torch.from_numpy(batch.trained_lengths_B),
            self.job.primary_verifier,
            torch.from_numpy(batch.lengths_B),
            torch.from_numpy(batch.truncated_B),
        )

    def _updates(self, work: Work, sheet: CreditSheet | None) -> dict[str, float]:
        """Take every optimiser step of the batch; returns the metrics that come from them."""
        old = self._old_logprobs(work)
        totals = _Totals()
        metrics = {"grad_norm": 0.0, "steps/skipped": 0.0}
        epochs = self.job.algorithm.objective.epochs
        for epoch, (index, part) in itertools.product(range(epochs), enumerate(work.parts)):
            prepared = work.first
            if epoch or index:  # the weights follow what `end_step` learned
                prepared = self.recipe.weigh(work.estimated, part.members_B)
            totals.surrogate_sums_B = np.zeros(len(work.batch.group_B))
            logprobs = self._pass(
                part, prepared, old[index], totals, self.recipe, None if epoch else sheet
            )
            old[index] = logprobs if old[index] is None else old[index]
            # Without a gradient an optimiser's momentum must not move the weights.
            finite = True
            if part.microbatches:
                metrics["grad_norm"], finite = self._optimize()
            summed = totals.over_ranks()
            if finite:
                metrics |= self.recipe.end_step(torch.from_numpy(summed.surrogate_sums_B))
            metrics["steps/skipped"] += float(not finite)
        return metrics | summed.means(epochs * len(work.parts))

    @torch.no_grad()
    def _old_logprobs(self, work: Work) -> list[list[Tensor] | None]:
        """Log-probabilities before the first optimiser step, by part; None where the part's own
        first pass gives them: that of the first part, and of all where ratios are to the sampler.
        """
        old: list[list[Tensor] | None] = [None] * len(work.parts)
        if self.job.algorithm.objective.anchor == "old":
            for index, part in enumerate(work.parts[1:], start=1):
                old[index] = [self._logprobs(microbatch.row) for microbatch in part.microbatches]
            if len(work.parts) > 1:
                fsdp.reshard(self.policy.model)
        return old

    def _logprobs(self, row: PackedRow) -> Tensor:
        return self.policy.logprobs(row, temperature=self.job.temperature)[0]

    def _accumulate(
        self,
        microbatch: Microbatch,
        prepared: Prepared,
        old_N: Tensor | None,
        totals: _Totals,
        recipe: Recipe,
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward on one micro-batch.

        Returns:
            Log-probabilities of its tokens, and the credit of those in the loss; both detached.
        """
        reference_N = None
        if recipe.kl_in_loss:
            reference_N = self._reference_logprobs(microbatch.row)
        logprobs_N, entropy_N = self.policy.logprobs(
            microbatch.row,
            temperature=self.job.temperature,
            with_entropy=recipe.needs_entropy,
        )
        if not microbatch.row.completions:  # takes part in the collectives, and adds nothing
            logprobs_N.sum().backward()
            return logprobs_N.detach(), logprobs_N.detach()
        chosen = microbatch.indices_B
        output = recipe.loss(
            CompletionBatch(
                logprobs_N=logprobs_N,
                old_logprobs_N=logprobs_N.detach() if old_N is None else old_N,
                behaviour_logprobs_N=microbatch.behaviour_logprobs_N,
                reference_logprobs_N=reference_N,
                entropy_N=entropy_N.detach() if recipe.needs_entropy else None,
                loss_mask_N=microbatch.loss_mask_N,
                lengths_B=microbatch.lengths_B,
                advantages_B=prepared.advantages_B[chosen].to(self.device),
                token_weights_B=prepared.token_weights_B[chosen].to(self.device),
                prefix_counts_N=microbatch.prefix_counts_N,
            )
        )
        output.loss.backward()
        totals.add_metrics(output.metrics)
        totals.surrogate_sums_B[chosen.numpy()] = output.surrogate_sums_B.cpu().numpy()
        return logprobs_N.detach(), output.credit_N

    def _optimize(self) -> tuple[float, bool]:
        """Step, unless the gradient is not finite; returns its norm, and whether it stepped."""
        grad_norm = fsdp.clip_gradients(self.policy.model, self.job.learner.max_grad_norm)
        allowed = self.guard.allows(grad_norm, self.step + 1)
        if allowed:
            for optimizer in self.optimizers:
                optimizer.step()
        self.policy.model.zero_grad(set_to_none=True)
        return grad_norm, allowed
