"""The models of a rank: the policy that is trained, and the frozen ones that score its tokens.

Rank 0 reads the weights of each and hands out the shards. The policy has float32 shards, or those
that `learner.masters` names; what follows it has float32, frozen ones the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from common.config.algorithm import AdvantageConfig
from common.errors import UserError
from learner.policy.adapters import WithoutAdapters, adapter_parameters, add_adapters
from learner.policy.model import DTYPES, Policy, load_policy
from learner.policy.self_check import check_policy
from learner.training import fsdp
from learner.training.heap import narrow
from learner.training.job import LearnerJob
from learner.training.memory import OtherModels
from learner.training.optimizer import MASTERS
from learner.training.ways import Ways, settle, settle_attention


@dataclass(frozen=True)
class MovingAverage:
    """What follows the trained weights: (1 - rate) of itself and rate of the policy's.

    Its shards are float32, since a small share of a step would be lost to rounding. Where adapters
    are trained, each A and each B is averaged by itself. The scorer is then W + s B_E A_E beside
    the same frozen W, and the average of W + s B A differs from it where both A and B move [D].
    """

    weights: Mapping[str, Tensor]
    """By the names of `followed`."""
    rate: float
    sync_steps: int
    model: Policy | None
    """The model that `weights` are the parameters of; None where the policy borrows them."""

    @torch.no_grad()
    def after_step(self, step: int, policy: Policy) -> None:
        """Move towards `policy` after every `sync_steps`-th step; shard by shard."""
        if step % self.sync_steps:
            return
        for name, theirs in followed(policy).items():
            mine = fsdp.local(self.weights[name])
            mine.lerp_(fsdp.local(theirs).to(mine.dtype), self.rate)

    @contextmanager
    def at_hand(self, policy: Policy) -> Iterator[Policy]:
        """The model to score with; `policy` has its own adapters back behind the block."""
        if self.model is not None:
            yield self.model
            return
        self._exchange(policy)
        try:
            yield policy
        finally:
            self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: Policy) -> None:
        fsdp.reshard(policy.model)  # what is gathered has the values of before
        for name, theirs in followed(policy).items():
            mine, lent = fsdp.local(self.weights[name]), fsdp.local(theirs)
            kept = lent.clone()
            lent.copy_(mine)
            mine.copy_(kept)


def followed(policy: Policy) -> dict[str, Tensor]:
    """What an average follows: all weights, or the adapters where these alone are trained."""
    adapted = policy.adapters is not None
    named = adapter_parameters(policy) if adapted else policy.model.named_parameters()
    return {name: parameter.detach() for name, parameter in named}


@dataclass(frozen=True)
class Models:
    """What a rank holds a shard of."""

    policy: Policy
    reference: Policy | None
    """The model that the run began from."""
    teacher: Policy | None
    average: MovingAverage | None
    ways: Ways
    """How the policy is computed."""
    gap: float
    """Nats between the packed policy and the untouched model."""
    offload: torch.device | None = None
    """The device on which the teacher is wanted, where it waits on the host."""

    @contextmanager
    def scoring(self, name: str) -> Iterator[Policy | None]:
        """The model that `algorithm.advantage.scorer` names; None where the rank has none.

        Its weights are on the device for as long as they are used.
        """
        if name == "ema" and self.average is not None:
            with self.average.at_hand(self.policy) as model:
                yield model
            return
        waiting = self.teacher if name == "teacher" and self.offload is not None else None
        if waiting is not None:
            waiting.model.to(self.offload)
        known = {"reference": self.reference, "teacher": self.teacher, "policy": self.policy}
        try:
            yield known.get(name)
        finally:
            if waiting is not None:
                waiting.model.to("cpu")

    @property
    def averaged(self) -> Mapping[str, Tensor] | None:
        """The weights of the moving average; None where there is none."""
        return None if self.average is None else self.average.weights


class ModelLoader:
    """Loads and shards the models of a job on this rank. All methods are collective."""

    def __init__(
        self,
        job: LearnerJob,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        reader: bool,
        locate: Callable[[str], str],
    ) -> None:
        """`reader`: whether this rank reads the weights.

        Args:
            locate: gives a model's folder on this node for that of the driver.
        """
        self._job = job
        self._mesh = mesh
        self._device = device
        self._reader = reader
        self._locate = locate
        self._dtype = DTYPES[job.model.dtype]
        self._ways = Ways(recompute=False, reduce_once=False, compiled=False)

    def load(self, *, needs_reference: bool, advantage: AdvantageConfig) -> Models:
        """The policy, and the other models that the job asks for.

        Raises:
            UserError: no such model, or one whose packed forward pass gives other numbers.
        """
        job, on_record = self._job, self._job.scores_on_record
        policy, gap = self._policy()
        teacher: Policy | None = None
        if job.teacher_path is not None and not on_record:
            teacher = self._sharded(job.teacher_path)
        reference: Policy | None = None
        if needs_reference and policy.adapters is not None:
            reference = WithoutAdapters(policy)
        elif needs_reference:
            assert job.reference_path is not None
            reference = self._sharded(job.reference_path)
        average: MovingAverage | None = None
        if advantage.scorer == "ema" and not on_record:
            average = self._average(policy, advantage)
        offload = None
        if teacher is not None and job.teacher_offload:
            offload = self._device
            teacher.model.to("cpu")
        return Models(policy, reference, teacher, average, self._ways, gap, offload)

    def _average(self, policy: Policy, advantage: AdvantageConfig) -> MovingAverage:
        """An average that begins as `policy`: a model of its own, or adapters alone."""
        follower: Policy | None = None
        if policy.adapters is None:
            follower = self._sharded(self._job.trained_path, torch.float32)
            weights = followed(follower)
        else:
            weights = {name: value.clone() for name, value in followed(policy).items()}
        return MovingAverage(weights, advantage.ema_rate, advantage.ema_sync_steps, follower)

    def _policy(self) -> tuple[Policy, float]:
        teacher = 0 if self._job.teacher_offload else self._job.teacher_parameters
        policy, gap = self._read(self._job.trained_path, torch.float32)
        if self._job.model.adapter.rank:
            adapt(policy, self._job, reader=self._reader)
        with_masters(policy, self._job)
        self._ways = settle(
            self._job.learner,
            policy,
            self._device,
            max(self._job.tokens_per_microbatch, self._job.model.max_length),
            OtherModels.of(self._job.algorithm, teacher),
        )
        said = self._shard(policy, trainable=True)
        self._ways = replace(self._ways, notes=(*self._ways.notes, *said))
        return policy, gap

    def _sharded(self, path: str, dtype: torch.dtype | None = None) -> Policy:
        """A frozen model; `dtype` is that of its shards, by default that of the computation."""
        policy, _ = self._read(path, dtype or self._dtype)
        policy.model.requires_grad_(False)
        self._shard(policy, trainable=False)
        return policy

    def _read(self, path: str, dtype: torch.dtype) -> tuple[Policy, float]:
        policy, gap = load_policy(
            replace(self._job.model, path=self._locate(path)),
            dtype,
            logits_mib=self._job.learner.logits_mib,
            temperature=self._job.temperature,
            weights=self._reader,
        )
        gap = fsdp.gather_objects(gap)[0]
        check_policy(gap, dtype, path)
        return policy, gap

    def _shard(self, policy: Policy, *, trainable: bool) -> tuple[str, ...]:
        """Shard `policy`; returns what is to be said of its attention."""
        self._ways.apply(policy, trainable=trainable)
        fsdp.shard_from_rank_zero(policy.model, policy.layers, self._mesh, self._dtype)
        choice, temperature = self._job.learner.attention, self._job.temperature
        said = settle_attention(choice, policy, self._device, self._dtype, temperature)
        fsdp.reshard(policy.model)
        return said


def adapt(policy: Policy, job: LearnerJob, *, reader: bool) -> None:
    """Give a model that is not sharded yet adapters, the same on every rank. Collective.

    Args:
        reader: whether this rank read its weights.
    """
    add_adapters(policy, job.model.adapter, seed=job.seed, weights=reader)
    frozen = (p for p in policy.model.parameters() if not p.requires_grad)
    narrow(frozen, DTYPES[job.model.dtype])
    assert policy.adapters is not None
    base = fsdp.gather_objects(policy.adapters.base)[0]
    policy.adapters = replace(policy.adapters, base=base)


def with_masters(policy: Policy, job: LearnerJob) -> None:
    """Bring the weights of a model that is not sharded yet to the type that is trained.

    Raises:
        UserError: a forward pass would be in a wider type than that of the weights.
    """
    masters = MASTERS[job.learner.masters]
    if masters == torch.float32:
        return
    if DTYPES[job.model.dtype] != masters:
        raise UserError(
            f"learner.masters={job.learner.masters} trains weights that are narrower than "
            f"model.dtype={job.model.dtype}: set one of them to the other"
        )
    narrow(policy.model.parameters(), masters)
