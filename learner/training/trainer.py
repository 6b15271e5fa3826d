"""One learner step: groups in, one policy update and its metrics out.

    StepBatch --recipe.prepare--> advantages --plan_packing--> micro-batches
        --policy--> log-probabilities --recipe.loss--> backward ... --> clip, optimiser

The recipe owns the maths and its one global denominator; this module owns how it is computed.
pi_old is the policy before the first optimiser step of the batch, so the first epoch's forward pass
is pi_old, and later epochs reuse what it stored.

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

from common.errors import UserError
from learner.algorithm.choices import TokenShare
from learner.algorithm.loss import CompletionBatch, LossOutput
from learner.algorithm.prepared import Prepared
from learner.algorithm.recipe import Recipe
from learner.policy.model import Policy
from learner.policy.packing import PackedRow, PackingPlan, plan_packing
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.batch_checks import describe
from learner.training.credit_sheet import CreditSheet
from learner.training.critic import CriticTrainer
from learner.training.guards import GradientGuard
from learner.training.heap import HeapWatch
from learner.training.job import LearnerJob
from learner.training.models import Models
from learner.training.optimizer import set_rate
from learner.training.schedule import learning_rate
from learner.training.scoring import Scoring
from learner.training.token_choices import Chosen, choose_tokens
from learner.training.totals import Totals
from learner.training.work import (
    Microbatch,
    Part,
    Work,
    load_microbatch,
    parts_of,
    step_rewards,
)

_ZERO_METRICS = ("loss/policy", "loss/kl", "clip_fraction", "is_ratio/mean", "logprob_gap/mean")
"""Metrics that are 0 where no token of the step trains."""


@dataclass
class Trainer:
    """Makes learner steps: it has the sharded models, the policy's optimisers and the recipe."""

    job: LearnerJob
    recipe: Recipe
    models: Models
    optimizers: Sequence[torch.optim.Optimizer]
    """Every parameter belongs to one of them."""
    mesh: DeviceMesh
    device: torch.device
    keep_gathered: bool
    """Parameters stay gathered through all micro-batches of a step (`fsdp.gather_once`)."""
    reduce_once: bool = False
    """Gradients are added up on every rank, and reduced in the last micro-batch alone."""
    critic: CriticTrainer | None = None
    step: int = 0
    """Learner steps done."""
    guard: GradientGuard = field(init=False)
    heap: HeapWatch = field(default_factory=HeapWatch)

    def __post_init__(self) -> None:
        self.guard = GradientGuard(self.job.learner)

    @property
    def policy(self) -> Policy:
        return self.models.policy

    @property
    def scoring(self) -> Scoring:
        """What the other models of this rank say of a step."""
        return Scoring(self.job, self.models, self._packed)

    def train(self, batch: StepBatch, sheet: CreditSheet | None = None) -> dict[str, float]:
        """Update the policy on `batch`: one optimiser step for each part and epoch. Collective.

        Args:
            sheet: takes down what the tokens are credited with, if given.

        Returns: the step's metrics, the same on every rank.

        Raises:
            RunError: the gradient norms of too many steps in a row were not finite.
        """
        started = time.perf_counter()
        rate = learning_rate(
            self.job.learner, self.step, self.job.total_steps, self.recipe.held_steps
        )
        set_rate(self.optimizers, rate)
        work, metrics = self._begin(batch, sheet, self.job.algorithm.objective.updates_per_batch)
        metrics["time/pack"] = time.perf_counter() - started
        probe_every = self.job.learner.credit_probe_every
        due = probe_every and (self.step + 1) % probe_every == 0  # the first step has much to do
        if due and self.recipe.shapes_credit:
            metrics["grad_norm/broadcast_credit"], _ = self._gradient(work, self.recipe.broadcast())
        metrics |= self._updates(work, sheet)
        metrics["learning_rate"] = rate
        if self.critic is not None:
            epochs, began = self.job.algorithm.objective.epochs, time.perf_counter()
            metrics |= self.critic.learn(work, epochs, self.step, self._packed)
            metrics["time/critic"] += time.perf_counter() - began
        self.step += 1
        if self.models.average is not None:
            self.models.average.after_step(self.step, self.policy)
        metrics["time/rank_train"] = time.perf_counter() - started
        self.heap.after_step()
        return metrics

    def probe(self, batch: StepBatch, sheet: CreditSheet | None = None) -> dict[str, float]:
        """Compute the first gradient of a step on `batch`, without the step. Collective.

        Returns: metrics of the step.

        Raises:
            UserError: the recipe needs a policy that is not here.
        """
        if self.recipe.needs_reference and self.models.reference is None:
            raise UserError(
                "the rule compares with a reference policy, which the run did not have: set "
                "algorithm.objective.kl=0 and no algorithm.advantage.scorer=reference"
            )
        if self.recipe.critic is not None and self.critic is None:
            raise UserError(
                "the rule goes by a critic, which the run did not have: use another "
                "algorithm.advantage.kind"
            )
        work, metrics = self._begin(batch, sheet, updates=1)
        metrics["grad_norm"], totals = self._gradient(work, self.recipe, sheet)
        return metrics | totals.over_ranks().means(updates=1)

    def _begin(
        self, batch: StepBatch, sheet: CreditSheet | None, updates: int
    ) -> tuple[Work, dict[str, float]]:
        """Prepare the step; also returns the metrics that are known before any gradient."""
        metrics = dict.fromkeys(_ZERO_METRICS, 0.0)
        batch, scored = self.scoring.scored(self.recipe, batch)
        metrics |= scored
        if self.critic is not None:
            started = time.perf_counter()
            batch = self.critic.values(batch, self._packed)
            metrics["time/critic"] = time.perf_counter() - started
        rewarded = replace(step_rewards(batch, self.job), step=self.step)
        estimated = self.recipe.estimate(rewarded)
        if self.step < self.recipe.held_steps:  # the critic learns alone
            estimated = replace(estimated, trained_B=torch.zeros_like(estimated.trained_B))
        whole = batch
        if estimated.counted_N is not None:
            batch = replace(batch, loss_mask=batch.loss_mask & estimated.counted_N.numpy())
        if sheet is not None:
            sheet.begin(batch, estimated)
        parts, efficiencies = [], []
        for members_B in parts_of(batch, updates):
            trained_B = estimated.trained_B.numpy() & members_B
            plan = self._plan(batch, trained_B)
            parts.append(Part(torch.from_numpy(members_B), self._mine(batch, plan, estimated)))
            efficiencies.append(plan.efficiency)
        first = self.recipe.weigh(estimated, parts[0].members_B)
        metrics |= describe(whole, estimated) | first.metrics
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
        kept_B = advantages_N = None
        if estimated is not None:
            advantages_N = estimated.advantages_N
            if self.recipe.needs_prefix_counts:
                kept_B = estimated.kept_B.numpy()
        mine = plan.microbatches[self.mesh.get_rank()]
        return [
            load_microbatch(batch, segments, self.device, kept_B, advantages_N) for segments in mine
        ]

    def _packed(self, batch: StepBatch, members_B: npt.NDArray[np.bool_]) -> list[Microbatch]:
        """This rank's micro-batches of the completions in `members_B`."""
        return self._mine(batch, self._plan(batch, members_B))

    @torch.no_grad()
    def _reference_logprobs(self, row: PackedRow) -> Tensor:
        assert self.models.reference is not None
        return self.models.reference.logprobs(row, temperature=self.job.temperature)[0]

    def _gradient(
        self, work: Work, recipe: Recipe, sheet: CreditSheet | None = None
    ) -> tuple[float, Totals]:
        """Compute the gradient of the first update under `recipe`; throw it away. Collective.

        It costs one forward and one backward pass. `train` measures GRPO's credit with it: against
        `grad_norm`, its norm says how far traces blow the gradient up. `probe` measures a recipe
        that the run did not have.

        Returns:
            The gradient's norm before clipping, and this rank's totals.
        """
        totals = Totals({}, np.zeros(len(work.batch.group_B)))
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
        totals: Totals,
        recipe: Recipe,
        sheet: CreditSheet | None,
        share: TokenShare | None = None,
    ) -> list[Tensor]:
        """Run forward and backward on an update's micro-batches; returns log-probabilities.

        Args:
            old: those before the first optimiser step, None where this pass gives them.
            share: tokens that the update is for; None: all.
        """
        if sheet is not None:
            sheet.add_weights(prepared.token_weights_B)
        logprobs = []
        chosen = choose_tokens(
            recipe,
            self.policy,
            part.microbatches,
            old,
            prepared,
            self.job.temperature,
            share,
        )
        for i, microbatch in enumerate(part.microbatches):
            fsdp.before_backward(
                self.policy.model,
                last=i == len(part.microbatches) - 1,
                keep_gathered=self.keep_gathered,
                reduce_once=self.reduce_once,
            )
            old_N = None if old is None else old[i]
            logprobs_N, output = self._accumulate(
                microbatch, prepared, old_N, totals, recipe, chosen[i], share
            )
            microbatch.row.layout.derived.clear()  # dense masks of all would outlive the step
            if sheet is not None and output is not None:
                sheet.add(microbatch.row, microbatch.loss_mask_N, logprobs_N, output)
            logprobs.append(logprobs_N)
        return logprobs

    def _updates(self, work: Work, sheet: CreditSheet | None) -> dict[str, float]:
        """Take every optimiser step of the batch; returns the metrics that come from them."""
        old = self._old_logprobs(work)
        totals = Totals()
        metrics = {"grad_norm": 0.0, "steps/skipped": 0.0}
        epochs = range(self.job.algorithm.objective.epochs)
        shares = self.recipe.token_shares()
        updates = list(itertools.product(epochs, shares, enumerate(work.parts)))
        for number, (epoch, share, (index, part)) in enumerate(updates):
            prepared = work.first
            if number:  # the weights follow what `end_step` learned
                prepared = self.recipe.weigh(work.estimated, part.members_B)
            totals.surrogate_sums_B = np.zeros(len(work.batch.group_B))
            logprobs = self._pass(
                part, prepared, old[index], totals, self.recipe, None if epoch else sheet, share
            )
            old[index] = logprobs if old[index] is None else old[index]
            finite = True
            if part.microbatches:  # of which every rank has as many
                norm, finite = self._optimize()
                metrics["grad_norm"] = norm or metrics["grad_norm"]
            summed = totals.over_ranks()
            if finite:
                metrics |= self.recipe.end_step(torch.from_numpy(summed.surrogate_sums_B))
            metrics["steps/skipped"] += float(not finite)
        return metrics | summed.means(len(updates))

    @torch.no_grad()
    def _old_logprobs(self, work: Work) -> list[list[Tensor] | None]:
        """Log-probabilities before the first optimiser step, by part; None where the part's own
        first pass gives them: that of the first part, and of all where ratios are to the sampler.
        """
        old: list[list[Tensor] | None] = [None] * len(work.parts)
        # What was sampled behind another prompt is anchored to the policy under every anchor.
        if self.job.algorithm.objective.anchor == "old" or work.batch.elsewhere_B is not None:
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
        totals: Totals,
        recipe: Recipe,
        tokens: Chosen,
        share: TokenShare | None,
    ) -> tuple[Tensor, LossOutput | None]:
        """Run forward and backward on one micro-batch.

        Returns:
            Log-probabilities of its tokens, detached, and its loss; None where it has no token.
        """
        reference_N = None
        if recipe.kl_in_loss:
            reference_N = self._reference_logprobs(microbatch.row)
        logprobs_N, entropy_N = self.policy.logprobs(
            microbatch.row,
            temperature=self.job.temperature,
            with_entropy=recipe.needs_entropy,
            entropy_learns=recipe.entropy_bonus,
        )
        if not microbatch.row.completions:  # takes part in the collectives, and adds nothing
            logprobs_N.sum().backward()
            return logprobs_N.detach(), None
        chosen = microbatch.indices_B
        old_N = logprobs_N.detach() if old_N is None else old_N
        output = recipe.loss(
            CompletionBatch(
                logprobs_N=logprobs_N,
                old_logprobs_N=old_N,
                behaviour_logprobs_N=microbatch.behaviour_logprobs_N,
                reference_logprobs_N=reference_N,
                entropy_N=entropy_N if recipe.needs_entropy else None,
                loss_mask_N=microbatch.loss_mask_N,
                lengths_B=microbatch.lengths_B,
                advantages_B=prepared.advantages_B[chosen].to(self.device),
                token_weights_B=prepared.token_weights_B[chosen].to(self.device),
                likelihood_weights_B=prepared.likelihood_of(chosen, self.device),
                prefix_counts_N=microbatch.prefix_counts_N,
                advantages_N=microbatch.advantages_N,
                turn_N=microbatch.turn_N,
                update_N=None if share is None else share(old_N),
                elsewhere_B=microbatch.elsewhere_B,
                **{f"{axis}_chosen_N": chosen_N for axis, chosen_N in tokens.items()},
            )
        )
        output.loss.backward()
        totals.add_metrics(output.metrics)
        np.add.at(totals.surrogate_sums_B, chosen.numpy(), output.surrogate_sums_B.cpu().numpy())
        return logprobs_N.detach(), output

    def _optimize(self) -> tuple[float, bool]:
        """Step, unless the gradient is not finite; returns its norm, and whether it is.

        Where it is 0, as of groups without a signal, momentum must not move the weights.
        """
        grad_norm = fsdp.clip_gradients(self.policy.model, self.job.learner.max_grad_norm)
        allowed = self.guard.allows(grad_norm, self.step + 1)
        if allowed and grad_norm > 0:
            for optimizer in self.optimizers:
                optimizer.step()
        self.policy.model.zero_grad(set_to_none=True)
        return grad_norm, allowed
