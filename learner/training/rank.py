"""One rank of the learner, as an actor sees it.

`LearnerRank` owns the sharded policy, its optimiser and the recipe. All ranks are called with
the same arguments, in the same order: every method except `rendezvous_address`, `fetch_ahead`,
`ping` and `shutdown` is a collective. `write_checkpoint`, `fetch_ahead` and `ping` may run beside
another, in threads of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import DeviceMesh

from common.errors import RunError
from common.record.schema import check_schema
from common.supervision.calls import Ref, in_group, put
from common.supervision.faults import reached
from common.supervision.heartbeat import HEALTH
from common.supervision.stacks import arm
from common.weights.registry import TRANSPORTS
from common.weights.transport import FullWeights, Receivers, Sender, SendingRank, Shipment
from learner.algorithm.recipe import Recipe
from learner.policy.model import DTYPES
from learner.policy.packing import pack_row, split_by_length
from learner.policy.step_batch import StepBatch
from learner.training import fsdp
from learner.training.addresses import free_address, host_address
from learner.training.batch_checks import check_staleness
from learner.training.checkpoint import (
    Snapshot,
    TrainerState,
    load_checkpoint,
    pinned_stager,
    take_snapshot,
    write_snapshot,
)
from learner.training.counters import Counters
from learner.training.credit_sheet import CreditSheet
from learner.training.critic import CriticTrainer, make_critic
from learner.training.fetch import fetch, fetch_ahead, fetch_scores
from learner.training.heap import keep_freed_memory, release_freed_memory
from learner.training.job import LearnerJob
from learner.training.models import ModelLoader, Models
from learner.training.optimizer import make_optimizers
from learner.training.scoring import Scores
from learner.training.trainer import Trainer

_WRITING = "writing"
"""The concurrency group in which checkpoints are written."""


class LearnerRank:
    """A rank: construct, `setup`, then `step` and `export_weights` in turns.

    Args:
        cores: CPU cores of this process; None leaves it where it is.
        locate: gives the model's folder on this node for that of the driver.
        put: stores a weight buffer and returns its reference.
    """

    def __init__(
        self,
        job: LearnerJob,
        rank: int,
        cores: list[int] | None = None,
        put: Callable[[npt.NDArray[np.uint8]], Ref[npt.NDArray[np.uint8]]] = put,
        locate: Callable[[str], str] = str,
    ) -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        self._rank = rank
        self._put = put
        self._locate = locate
        self.begin(job)

    def begin(self, job: LearnerJob) -> None:
        """Start over for another run in the same process; `setup` follows."""
        self._job = job
        self._config = job.learner
        self._recipe = Recipe(job.algorithm, job.correction_kind, job.max_completion_tokens)
        self._dtype = DTYPES[job.model.dtype]
        self._device = torch.device("cpu")
        self._store: TCPStore | None = None
        self._trainer: Trainer | None = None
        self._counters: Counters | None = None
        self._sender: Sender | None = None
        self._snapshot: Snapshot | None = None
        self._stager: DefaultStager | None = None
        self._writing_group: dist.ProcessGroup | None = None

    def rendezvous_address(self) -> tuple[str, int]:
        """Rank 0 only: open the rendezvous and say where it is."""
        if self._rank != 0:
            raise RunError(f"rank {self._rank} was asked for rank 0's rendezvous: please report it")
        self._store, host, port = fsdp.serve_rendezvous(
            self._config.ranks, self._config.start_timeout_s
        )
        return host, port

    def setup(self, master_host: str, master_port: int) -> dict[str, Any]:
        """Join the other ranks, load and shard the model, prove it, make the optimiser.

        Returns:
            Facts: device, parameters (count), self_check_gap (nats), host, pid, reach, the range in
            tokens behind which the model computes otherwise (0: none), and notes: how it computes,
            in sentences.

        Raises:
            UserError: no such model, or one whose packed forward pass gives other numbers.
        """
        arm()
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        fsdp.seed_everything(self._job.seed + self._rank)
        self._device = fsdp.pick_device(self._config.device, self._rank)
        if self._device.type == "cpu":
            keep_freed_memory()
        store = self._store or fsdp.connect_rendezvous(
            master_host, master_port, self._config.ranks, self._config.start_timeout_s
        )
        fsdp.join_process_group(
            store, self._device, self._rank, self._config.ranks, self._config.step_timeout_s
        )
        self._writing_group = fsdp.writing_group(self._job.checkpoint_timeout_s)
        mesh = fsdp.data_mesh(self._device, self._config.shard_ranks)
        loader = ModelLoader(
            self._job, mesh, self._device, reader=self._rank == 0, locate=self._locate
        )
        models = loader.load(
            needs_reference=self._recipe.needs_reference, advantage=self._recipe.advantage
        )
        policy = models.policy
        self._trainer = self._make_trainer(models, mesh)
        parameters = sum(p.numel() for p in policy.model.parameters())
        trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        self._counters = Counters(
            self._device, policy.model, parameters, trained, self._config.ranks
        )
        self._stager = pinned_stager(self._device)
        notes = models.ways.notes
        if policy.adapters is not None:
            notes = (f"adapters: {trained:,} of {parameters:,} parameters are trained", *notes)
        return {
            "device": str(self._device),
            "parameters": parameters,
            "self_check_gap": models.gap,
            "reach": policy.reach,
            "host": host_address(self._config.ranks),
            "pid": os.getpid(),
            "notes": notes,
        }

    def _make_trainer(self, models: Models, mesh: DeviceMesh) -> Trainer:
        """A trainer of the policy, with the critic that its recipe may need besides. Collective."""
        policy = models.policy
        critic: CriticTrainer | None = None
        if self._recipe.critic is not None:
            path, settings = self._locate(self._job.trained_path), self._recipe.critic
            critic = make_critic(self._job, settings, path, policy, models.ways, mesh)
        return Trainer(
            self._job,
            self._recipe,
            models,
            make_optimizers(self._config, policy.model, policy.layers, seed=self._job.seed),
            mesh,
            self._device,
            keep_gathered=fsdp.gather_once(policy.model, mesh),
            reduce_once=models.ways.reduce_once,
            critic=critic,
        )

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RunError(f"learner rank {self._rank} was used before `setup`: please report it")
        return self._trainer

    def step(
        self,
        batches: Sequence[pa.RecordBatch | Ref[pa.RecordBatch]],
        version: int,
        max_staleness: int,
        credit_run: str | None = None,
        scores: Sequence[Scores | Ref[Scores]] | None = None,
    ) -> dict[str, float]:
        """One learner step on whole groups; the metrics are the same on every rank.

        Args:
            batches: record batches under `trajectory_schema`, or Ray references to them.
            version: weight version of the policy before this step.
            credit_run: run directory that gets this step's credit log, written by rank 0.
            scores: what the scorer said of every token, group by group, where that is on record or
                was asked elsewhere; or Ray references to it.

        Raises:
            RunError: a token is staler than `max_staleness`, the gradient is not finite, or the
                disk does not take the credit log.
        """
        started = time.perf_counter()
        groups = fetch(batches)
        for group in groups:
            check_schema(group.schema)
        batch = StepBatch.from_record_batches(groups)
        if scores is not None:
            batch = replace(batch, scores=fetch_scores(scores, len(batch.token_ids)))
        staleness = check_staleness(batch, version, max_staleness)
        fetched_s = time.perf_counter() - started
        sheet = CreditSheet() if credit_run is not None else None
        assert self._counters is not None
        self._counters.begin()
        metrics = self.trainer.train(batch, sheet)
        tokens = metrics["tokens/trained"] + batch.prompt_tokens
        metrics |= self._counters.metrics(tokens, metrics["time/rank_train"])
        if sheet is not None and credit_run is not None:
            metrics["time/credit"] = sheet.write(Path(credit_run), version + 1, groups)
        reached("gradient step done")
        return metrics | staleness | {"time/fetch": fetched_s}

    def open_transport(self, receivers: Receivers) -> None:
        """Make this rank's end of the weight transport. Collective."""

        def agree_on_address() -> tuple[str, int]:
            address: tuple[str, int] = fsdp.gather_objects(free_address())[0]
            return address

        rank = SendingRank(
            self._rank,
            self._published(),
            self._job.bucket_mib * 2**20,
            self._put,
            agree_on_address,
        )
        self._sender = TRANSPORTS[self._job.transport].open(rank, receivers)

    def _published(self) -> FullWeights:
        """What travels: all weights, or the adapters alone."""
        policy = self.trainer.policy
        if self._job.publish == "adapter":
            return fsdp.AdapterWeights(policy)
        return fsdp.PolicyWeights(policy, self._dtype)

    def export_weights(self, version: int) -> Shipment:
        """Send the weights on their way. Collective; rank 0's answer counts."""
        if self._sender is None:
            raise RunError("export_weights before open_transport: please report it")
        return self._sender.send(version)

    def release_memory(self) -> None:
        """Give freed memory back to the device, for a generator that shares it."""
        release_freed_memory()

    @torch.no_grad()
    def score(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
    ) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each sequence behind its prompt, in nats."""
        parts = [
            (np.asarray(ids[:n], np.int64), [np.asarray(ids[n:], np.int64)])
            for ids, n in zip(sequences, prompt_lengths, strict=True)
        ]
        row = pack_row(parts, range(len(parts)), self._device)
        policy = self.trainer.policy
        logprobs_N, _ = policy.logprobs(row, temperature=1.0)
        fsdp.reshard(policy.model)
        return split_by_length(logprobs_N.tolist(), row.lengths)

    def take_checkpoint(self, extra: dict[str, Any]) -> None:
        """Copy a checkpoint into memory; `extra` is JSON and comes back on load."""
        trainer = self.trainer
        schedule = {
            "kind": self._config.schedule,
            "warmup_steps": self._config.warmup_steps,
            "total_steps": self._job.total_steps,
            "learning_rate": self._config.learning_rate,
        }
        state = TrainerState(trainer.step, schedule, self._recipe.state_dict(), extra)
        critic = trainer.critic.trained if trainer.critic else None
        self._snapshot = take_snapshot(
            trainer.policy,
            trainer.optimizers,
            state,
            self._dtype,
            self._stager,
            critic,
            trainer.models.averaged,
        )

    @in_group(_WRITING)
    def write_checkpoint(self, folder: str) -> None:
        """Write what `take_checkpoint` took (see `learner.training.checkpoint`); `step` may go on
        beside it.

        Raises:
            RunError: nothing was taken.
            OSError: the disk does not take it.
        """
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None or self._writing_group is None:
            raise RunError("write_checkpoint before take_checkpoint: please report it")
        policy = self.trainer.policy
        write_snapshot(snapshot, Path(folder), policy, self._dtype, self._writing_group)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Go on from a checkpoint, whatever number of ranks wrote it; returns its `extra`."""
        trainer = self.trainer
        critic = trainer.critic.trained if trainer.critic else None
        state = load_checkpoint(
            Path(folder),
            trainer.policy,
            trainer.optimizers,
            critic,
            trainer.models.averaged,
        )
        trainer.step = state.step
        self._recipe.load_state_dict(state.recipe)
        return state.extra

    @in_group(HEALTH)
    def fetch_ahead(self, batches: Sequence[Ref[pa.RecordBatch]]) -> None:
        """Begin to bring batches of a later step, given as Ray references, to this node."""
        fetch_ahead(batches)

    @in_group(HEALTH)
    def ping(self) -> None:
        """Answer, as a sign of life."""

    def shutdown(self) -> None:
        """Leave the process group and let go of the policy; `begin` may follow."""
        self._trainer = self._sender = self._snapshot = self._writing_group = self._stager = None
        if dist.is_initialized():
            dist.destroy_process_group()
        release_freed_memory()
