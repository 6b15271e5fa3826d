"""Sections of the configuration on how a run goes: evaluation, checkpoints, restarts, Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from common.config.bounds import Count, Natural, NotNegative, Positive, Seconds


@dataclass
class EvalConfig:
    """Evaluations on held-out questions while the run goes on."""

    every: Natural = 10
    """Steps between evaluations. 0 evaluates only before and after."""
    prompts: Natural = 200
    """Held-out questions of each evaluation."""
    max_completion_tokens: Count | None = None
    """Longest answer of an evaluation in tokens. Null is `generator.max_completion_tokens`."""
    timeout_s: Seconds = 900.0
    """Seconds for an evaluation."""


@dataclass
class CheckpointConfig:
    """What is kept of a run on disk."""

    every: Natural = 20
    """Steps between checkpoints. 0 writes only the last."""
    keep_last: Natural = 2
    """Newest checkpoints to keep; older ones are removed. 0 keeps all."""
    keep_every: Natural = 0
    """Also keep checkpoints whose step is a multiple of this. 0 keeps no others."""
    stop_grace_s: NotNegative = 60.0
    """Seconds after SIGTERM to finish the step under way and save it. Less than a step loses it;
    more than what whoever sends the signal waits is of no use."""
    timeout_s: Seconds = 900.0
    """Seconds for a checkpoint to be written or read."""
    mirror: str | None = None
    """Folder for copies of the run, one after every checkpoint. It is `s3://bucket/folder`,
    `gs://`, `hdfs://` or a path. `resume=auto` on a machine without the run begins from the
    copy."""


SinkName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass
class MetricsConfig:
    """Where the numbers go besides metrics.jsonl; no run fails because of one of these."""

    sinks: list[SinkName] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl. All but `tensorboard` are extras that are installed
    with `pip install '.[wandb]'` or the like."""
    project: str = "grpo-lambda"
    """Project of W&B and Trackio, experiment of MLflow."""
    timeout_s: Seconds = 30.0
    """Seconds for a sink to take a record, and for all to close. One that takes longer is switched
    off."""


@dataclass
class RestartConfig:
    """What happens when a process of the run dies or hangs."""

    limit: Natural = 3
    """Failures from which the run goes on by itself, each time from its last checkpoint. Those
    within `window_s` count, and those in a row without a step between them. One more ends the run
    with their causes."""
    window_s: NotNegative = 1800.0
    """Seconds for which a failure counts."""
    backoff_s: NotNegative = 2.0
    """Seconds before the first restart. They double for each further one in the window."""
    heartbeat_s: NotNegative = 10.0
    """Seconds between two signs of life that are asked of every process. 0 asks for none."""
    silence_s: Seconds = 60.0
    """Seconds for a process to answer. One that takes longer hangs, and all start again."""


@dataclass
class PlacementConfig:
    """Which cores the parts of a run stand on, and which devices a plan computes with."""

    cores: Literal["auto", "split", "shared"] = "auto"
    """How the cores of a CPU machine are divided. `split` gives generators and learner disjoint
    ones, `shared` gives all to both, `auto` decides (`deploy.placement.options`)."""
    generator_device: str | None = None
    """Device of a generator that `plan` computes with, such as `H100-80GB`. A run takes the devices
    that it finds."""
    learner_device: str | None = None
    """Device of a learner rank that `plan` computes with. Null is `generator_device`."""
    gpus_per_node: Count = 8
    """Devices of a node that `plan` computes with."""


@dataclass
class RayConfig:
    """The Ray cluster of the run."""

    address: str = "local"
    """Address of the cluster. `local` starts one for the run, `auto` is that of the Ray job, and
    any other is `HOST:PORT`."""
    connect_timeout_s: Seconds = 60.0
    """Seconds for the cluster to answer."""
    interface: str | None = None
    """Network interface, such as `eth0`, over which learner ranks and generators meet (gloo, NCCL).
    Null is that of the default route; NCCL then takes InfiniBand where there is some."""
    placement_timeout_s: Seconds = 120.0
    """Seconds for a cluster to have room for the run, or for its autoscaler to make it."""
    object_store_gib: Positive = 2.0
    """GiB of the object store of a `local` cluster."""
