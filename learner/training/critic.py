"""The critic's part of a learner step: it values the states of a batch, and learns their returns.

    values   before advantages: V of every token, with the critic as it is before the step
    learn    after the policy: as many updates as the policy has, with an optimiser of its own

All completions that count teach the critic, also those without an advantage for the policy.

Shapes: B completions of the step, N all their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from common.config.algorithm import CriticConfig
from common.config.sections import LearnerConfig
from common.errors import NumbersError
from learner.algorithm.gae import explained_variance, value_losses
from learner.policy.critic import Critic
from learner.policy.model import DTYPES, Policy, load_policy
from learner.policy.packing import PackedRow
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.guards import GradientGuard
from learner.training.job import LearnerJob
from learner.training.models import adapt, with_masters
from learner.training.optimizer import make_optimizers, set_rate
from learner.training.totals import Totals
from learner.training.ways import Ways
from learner.training.work import Microbatch, Work

Values = npt.NDArray[np.float32]
Packed = Callable[[StepBatch, npt.NDArray[np.bool_]], Sequence[Microbatch]]
"""Gives this rank's micro-batches of the completions that are named."""


def make_critic(
    job: LearnerJob, config: CriticConfig, path: str, like: Policy, ways: Ways, mesh: DeviceMesh
) -> CriticTrainer:
    """The critic of a rank: the model at `path` with a head that says 0, sharded. Collective.

    Where the policy has adapters it has its own, beside frozen weights of its own.

    Args:
        like: the policy, whose kernel of attention it takes.
    """
    dtype = DTYPES[job.model.dtype]
    policy, _ = load_policy(
        replace(job.model, path=path),
        torch.float32,
        logits_mib=job.learner.logits_mib,
        temperature=job.temperature,
        weights=mesh.get_rank() == 0,
    )
    if job.model.adapter.rank:
        adapt(policy, job, reader=mesh.get_rank() == 0)
    critic = Critic(policy)  # behind the adapters, which freeze all that is there
    with_masters(policy, job)
    ways.apply(policy, trainable=True)
    fsdp.shard_from_rank_zero(policy.model, policy.layers, mesh, dtype)
    policy.model.config._attn_implementation = like.model.config._attn_implementation
    learner = replace(job.learner, learning_rate=config.learning_rate or job.learner.learning_rate)
    return CriticTrainer(
        learner,
        config,
        critic,
        make_optimizers(learner, policy.model, policy.layers, seed=job.seed + 1),
        keep_gathered=fsdp.gather_once(policy.model, mesh),
        reduce_once=ways.reduce_once,
    )


@dataclass
class CriticTrainer:
    """Trains the sharded critic. Every method is collective."""

    learner: LearnerConfig
    """With the critic's learning rate."""
    config: CriticConfig
    critic: Critic
    optimizers: Sequence[torch.optim.Optimizer]
    keep_gathered: bool
    reduce_once: bool = False
    guard: GradientGuard = field(init=False)

    def __post_init__(self) -> None:
        self.guard = GradientGuard(self.learner)

    @property
    def trained(self) -> tuple[Policy, Sequence[torch.optim.Optimizer]]:
        """What a checkpoint holds of it."""
        return self.critic.policy, self.optimizers

    @torch.no_grad()
    def values(self, batch: StepBatch, packed: Packed) -> StepBatch:
        """`batch` with the value of the state before every token.

        Raises:
            NumbersError: the critic gave a number that is not finite.
        """
        found: dict[int, Values] = {}
        for each in packed(batch, batch.lengths_B > 0):
            parts = self.critic.values(each.row).float().cpu().split(list(each.row.lengths))
            for sequence, part in zip(each.row.completions, parts, strict=True):
                found[sequence] = part.numpy()
        fsdp.reshard(self.critic.policy.model)
        values = np.zeros(len(batch.token_ids), np.float32)
        for part_of_rank in fsdp.gather_objects(found):
            for sequence, part_of_sequence in part_of_rank.items():
                values[batch.sequences.tokens_of(sequence)] = part_of_sequence
        if not np.isfinite(values).all():
            raise NumbersError(
                "the critic gives values that are not finite: lower "
                "algorithm.advantage.critic.learning_rate and go on from the last checkpoint by "
                "resume=, or look at the weights at model.path. The groups are kept in "
                "failed-batch.arrow in the run directory"
            )
        return replace(batch, values=values)

    def learn(self, work: Work, epochs: int, step: int, packed: Packed) -> dict[str, float]:
        """Make the critic's updates on a step that was prepared; returns its metrics.

        Args:
            step: learner steps done.
        """
        rate = self._rate(step)
        kept_B = work.estimated.kept_B.numpy()
        taught = _taught(work)
        parts = []
        for part in work.parts:
            members_B = part.members_B.numpy() & kept_B
            parts.append((packed(work.batch, members_B & (work.batch.lengths_B > 0)), members_B))
        totals, norm = Totals(), 0.0
        for _ in range(epochs):
            for microbatches, members_B in parts:
                tokens = int((taught & np.repeat(members_B, work.batch.lengths_B)).sum())
                if not tokens or not microbatches:  # of which every rank has as many
                    continue
                self._pass(microbatches, work, taught, tokens, totals)
                norm = self._optimize(step)
        found = totals.over_ranks().means(epochs * len(parts))
        return {
            "critic/loss": found.get("critic/loss", 0.0),
            "critic/clip_fraction": found.get("critic/clip_fraction", 0.0),
            "critic/grad_norm": norm,
            "critic/learning_rate": rate,
            **_quality(work, taught),
        }

    def _rate(self, step: int) -> float:
        """Set the learning rate of 0-based `step`, with the policy's warm-up; returns it."""
        warmed = min(1.0, (step + 1) / max(1, self.learner.warmup_steps))
        rate = self.learner.learning_rate * warmed
        set_rate(self.optimizers, rate)
        return rate

    def _pass(
        self,
        microbatches: Sequence[Microbatch],
        work: Work,
        taught: npt.NDArray[np.bool_],
        tokens: int,
        totals: Totals,
    ) -> None:
        """Add up the gradient of the mean loss over the `tokens` of an update."""
        batch, returns_N = work.batch, work.estimated.returns_N
        assert returns_N is not None
        assert batch.values is not None
        for i, each in enumerate(microbatches):
            fsdp.before_backward(
                self.critic.policy.model,
                last=i == len(microbatches) - 1,
                keep_gathered=self.keep_gathered,
                reduce_once=self.reduce_once,
            )
            values_N = self.critic.values(each.row)
            each.row.layout.derived.clear()  # dense masks of all would outlive the step
            mask_N = _of_row(each.row, batch, taught, values_N.device)
            old_N = _of_row(each.row, batch, batch.values, values_N.device)
            wanted_N = _of_row(each.row, batch, returns_N.float().numpy(), values_N.device)
            losses_N = value_losses(values_N, old_N, wanted_N, self.config.value_clip) * mask_N
            (losses_N.sum() / tokens).backward()
            moved_N = ((values_N.detach() - old_N).abs() > self.config.value_clip) & mask_N
            totals.add_metrics(
                {
                    "critic/loss": (float(losses_N.detach().double().sum()) / tokens, 0.0),
                    "critic/clip_fraction": (float(moved_N.sum()), float(mask_N.sum())),
                }
            )

    def _optimize(self, step: int) -> float:
        """Step, unless the gradient is not finite; returns its norm."""
        model = self.critic.policy.model
        norm = fsdp.clip_gradients(model, self.learner.max_grad_norm)
        if self.guard.allows(norm, step + 1) and norm > 0:
            for optimizer in self.optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)
        return norm


def _taught(work: Work) -> npt.NDArray[np.bool_]:
    """Tokens that the critic learns from, [N]: sampled, in the loss, of completions that count."""
    batch = work.batch
    kept_N = np.repeat(work.estimated.kept_B.numpy(), batch.lengths_B)
    counted: npt.NDArray[np.bool_] = kept_N & batch.loss_mask & ~np.isnan(batch.behaviour_logprobs)
    return counted


def _quality(work: Work, taught: npt.NDArray[np.bool_]) -> dict[str, float]:
    """How good the values were from which the step's advantages came."""
    returns_N, values = work.estimated.returns_N, work.batch.values
    assert returns_N is not None
    assert values is not None
    values_M = torch.from_numpy(values[taught]).double()
    returns_M = returns_N[torch.from_numpy(taught)]
    return {
        "critic/explained_variance": explained_variance(values_M, returns_M),
        "critic/value": float(values_M.mean()) if len(values_M) else 0.0,
    }


def _of_row(
    row: PackedRow, batch: StepBatch, column: npt.NDArray[np.generic], device: torch.device
) -> Tensor:
    """A column of the step at the tokens of a packed row, on its device."""
    parts = [column[batch.sequences.tokens_of(sequence)] for sequence in row.completions]
    return torch.from_numpy(np.concatenate([column[:0], *parts])).to(device)
