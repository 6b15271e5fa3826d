"""The configuration: nested dataclasses are the schema, YAML and `key=value` only fill them.

Order of precedence, the last wins: the defaults here, the recipe, the preset or another YAML file,
the command line.
An unknown key, a wrong type or an impossible combination raises `UserError` naming the key,
before any process starts. Values that follow from others are properties, never keys.
Loading lives in `common.config.load`; every component is handed its own section only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from common.config.algorithm import AlgorithmConfig
from common.config.bounds import (
    Count,
    Finite,
    Limit,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Seconds,
    Share,
    ShareBelowOne,
    between,
)


@dataclass
class ModelConfig:
    path: str = MISSING
    """A Hugging Face folder, a hub name, or `builtin:NAME` (see `deploy.models.resolve`)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of learner and generator; master weights are always float32. `auto`: bfloat16 on
    CUDA and on CPUs that multiply in it (AVX512-BF16, AMX), float32 on others, where bfloat16 is
    emulated and several times slower."""
    max_length: Count = 512
    """Context: prompt plus completion, in tokens."""
    trust_remote_code: bool = False


@dataclass
class ReasoningGymConfig:
    task: str = "chain_sum"
    params: dict[str, Any] = field(default_factory=dict)
    size: Count = 5000
    """Number of distinct training prompts drawn from the task's generator."""


PromptOrder = Literal["shuffle", "sequential", "curriculum"]


@dataclass
class DataConfig:
    source: Literal["reasoning_gym", "file", "hub"] = "reasoning_gym"
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    path: str | None = None
    """`file`: a .jsonl or .parquet file. `hub`: a data set name, e.g. `openai/gsm8k`."""
    subset: str | None = None
    split: str = "train"
    eval_path: str | None = None
    """`file`/`hub`: held-out rows from another file or split; else the last `eval.prompts` rows."""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    solution_column: str | None = None
    """A reference solution (G2RPO-A guidance)."""
    difficulty_column: str | None = None
    template: Literal["chat", "plain"] = "chat"
    plain_template: str = "{prompt}"
    system_prompt: str | None = None
    max_bad_rows: Share = 0.01
    """Share of the rows that may be unusable: they go to quarantine.jsonl with the reason."""
    order: PromptOrder = "shuffle"
    """Of an epoch's prompts. `curriculum`: by `difficulty_column`, easy to hard (G2RPO-A)."""


@dataclass
class BatchConfig:
    """The three batch knobs, and no more."""

    prompts_per_step: Count = 8
    group_size: Count = 8
    tokens_per_microbatch: Count = 4096


@dataclass
class GeneratorConfig:
    count: Count = 1
    min_count: Count | None = None
    """On a cluster: with so many a run starts and goes on; the others join when there is room.
    None: it waits for all."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    """Of Ray, that each asks for besides CPUs and GPUs, e.g. `{H100: 1}`; not on `local`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes it may stand on."""
    max_completion_tokens: Count = 48
    temperature: Positive = 1.0
    max_staleness: Natural = 1
    """S: no trained token is more than S versions older than the learner. 0 is synchronous."""
    kv_cache_gib: Positive = 1.0
    max_concurrent_sequences: Count = 256
    enforce_eager: bool = True
    memory_fraction: PositiveShare = 0.85
    """CUDA only: the share of a device's memory vLLM may take."""
    threads: Count | None = None
    """None lets the core plan decide; 4 on a cluster."""
    num_gpus: NotNegative = 0.0
    tensor_parallel: Count = 1
    """Devices that share every layer of a generator."""
    pipeline_parallel: Count = 1
    """Stages of layers, each of `tensor_parallel` devices, all on one node."""
    start_timeout_s: Seconds = 600.0
    group_timeout_s: Seconds = 600.0
    """A group that takes longer ends the run: something hangs."""
    group_cap_s: Seconds | None = None
    """A group still generating after this long is abandoned and its place given to another prompt.
    It bounds how long a straggler is held, at the price of training on fewer long answers."""

    @property
    def devices(self) -> int:
        """Of each generator."""
        return self.tensor_parallel * self.pipeline_parallel


@dataclass
class VerifierSpec:
    name: str = MISSING
    """A built-in (`reasoning_gym`, `math_answer`, `format_rules`) or `package.module:callable`."""
    weight: Finite = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class VerifierConfig:
    workers: Count = 1
    """Verifier actors; each scores in a child process that can be killed."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    """As those of generators."""
    timeout_s: Seconds = 10.0
    """Wall-clock limit of one completion's verdict."""
    network: bool = False
    """Whether rules may open network sockets (a judge behind HTTP needs it)."""
    rules: list[VerifierSpec] = field(default_factory=lambda: [VerifierSpec(name="reasoning_gym")])
    """At least one; the reward is the weighted sum. The first is the one called accuracy."""


@dataclass
class LearnerConfig:
    ranks: Count = 1
    shard_ranks: Count | None = None
    """Ranks that hold one copy of the weights and optimiser between them; None: all. With as many
    as a node has devices (hybrid sharding) layers are gathered inside nodes only."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    """As those of generators, of each rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    learning_rate: Positive = 1e-5
    warmup_steps: Natural = 5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NotNegative = 0.0
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    max_grad_norm: Limit = 1.0
    """`.inf` clips nothing."""
    max_skipped_steps: Natural = 3
    """So many steps in a row whose gradient is not finite are left out; one more ends the run."""
    logprob_gap_warn: Limit = 0.2
    logprob_gap_stop: Limit = 1.0
    """Mean |log-probability gap| a token between trainer and sampler, in nats, that warns, and
    that ends the run. bfloat16 alone makes some 0.02, eight versions of staleness 0.05."""
    logits_mib: Positive = 320.0
    """Logits that exist at one time in the fused log-probability head, MiB of float32."""
    activation_checkpointing: bool = False
    compile: bool = False
    credit_probe_every: Natural = 10
    """Steps between measurements of the gradient norm under GRPO's credit on the same batch, for
    recipes whose tokens differ in credit: each is one more forward and backward pass. 0 is off."""
    credit_log_every: Natural = 1
    """Steps between credit logs: what every token of the step was credited with, 12 bytes a token.
    0 writes none."""
    packing: Literal["shared_prefix", "sequence"] = "shared_prefix"
    """`shared_prefix`: a prompt is computed once for its completions in a micro-batch."""
    attention: Literal["grids", "varlen"] = "grids"
    """`grids`: padded to similar lengths, on any device. `varlen`: torch's variable-length
    flash-attention, without padding; CUDA and bfloat16, compared with the grids at every start."""
    threads: Count | None = None
    start_timeout_s: Seconds = 600.0
    step_timeout_s: Seconds = 1800.0


@dataclass
class WeightsConfig:
    transport: Literal["object_store", "nccl", "ipc"] = "object_store"
    """`ipc`: a generator and a learner rank share every device (`Config.colocated`)."""
    bucket_mib: Count = 64
    canary_sequences: Count = 4
    canary_tokens: Count = 24
    canary_tolerance: Positive | None = None
    """Largest mean |log-probability gap| of a canary sequence between learner and generator, in
    nats a token. None: 0.2 in bfloat16, whose logits have steps of up to 1/8, 0.001 in float32."""
    resends: Natural = 2
    """Times that weights which arrive damaged are sent again as a whole, before a restart."""
    publish_timeout_s: Seconds = 300.0


@dataclass
class EvalConfig:
    every: Natural = 10
    """Steps between evaluations; 0 evaluates only before and after."""
    prompts: Natural = 200
    max_completion_tokens: Count | None = None
    timeout_s: Seconds = 900.0


@dataclass
class CheckpointConfig:
    every: Natural = 20
    """Steps between checkpoints; 0 writes only the last."""
    keep_last: Natural = 2
    """Older checkpoints are removed; 0 keeps all."""
    keep_every: Natural = 0
    """Of the older ones those of every so many steps stay."""
    stop_grace_s: NotNegative = 60.0
    """After SIGTERM: time to finish the step under way and save it."""
    timeout_s: Seconds = 900.0
    mirror: str | None = None
    """A folder for copies of the run, one after every checkpoint: `s3://bucket/folder`, `gs://`,
    `hdfs://` or a path. `resume=auto` on a machine without the run begins from the copy."""


SinkName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass
class MetricsConfig:
    """Where the numbers go besides metrics.jsonl; no run fails because of one of these."""

    sinks: list[SinkName] = field(default_factory=lambda: ["tensorboard"])
    """`wandb`, `mlflow` and `trackio` are extras: `pip install 'grpo-lambda[wandb]'`."""
    project: str = "grpo-lambda"
    """W&B's and Trackio's project, MLflow's experiment."""
    timeout_s: Seconds = 30.0
    """For a sink to take a record, and for all to close: one that takes longer is switched off."""


@dataclass
class RestartConfig:
    """What happens when a process of the run dies or hangs."""

    limit: Natural = 3
    """So often within `window_s`, or in a row without a step more, the run goes on by itself from
    its last checkpoint; then it ends with the causes. 0: the first one ends it."""
    window_s: NotNegative = 1800.0
    backoff_s: NotNegative = 2.0
    """Before the first restart; doubled for each further one in the window."""
    heartbeat_s: NotNegative = 10.0
    """Between two signs of life that are asked of every process; 0: none are asked."""
    silence_s: Seconds = 60.0
    """A process that has not answered for so long hangs: all start again."""


@dataclass
class PlacementConfig:
    cores: Literal["auto", "split", "shared"] = "auto"
    """CPU only. `split`: disjoint cores for generators and learner; `shared`: all cores to both;
    `auto` decides (see `deploy.placement.options`)."""
    generator_device: str | None = None
    """What `plan` computes with, e.g. `H100-80GB`; a run takes the devices that it finds."""
    learner_device: str | None = None
    """None: as `generator_device`."""
    gpus_per_node: Count = 8
    """For `plan`."""


@dataclass
class RayConfig:
    address: str = "local"
    """`local` starts a cluster of its own; `auto` inside a Ray job; `host:port`."""
    connect_timeout_s: Seconds = 60.0
    placement_timeout_s: Seconds = 120.0
    """For a cluster to have room for the run, an autoscaled one to make it."""
    object_store_gib: Positive = 2.0
    """`local` only."""


@dataclass
class Config:
    """One run."""

    name: str | None = None
    runs_dir: str = "runs"
    resume: str | None = None
    """A run directory to go on with. `auto`: that of `name` if it is there, else a new one, so that
    a job which a cluster submits again goes on by itself."""
    recipe: str | None = None
    """The recipe: a file of deploy/configs/recipes by its name, or any YAML file by its path."""
    seed: Annotated[int, between(0, 2**31 - 1)] = 0
    steps: Count = 30
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    restart: RestartConfig = field(default_factory=RestartConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def groups_per_step(self) -> int:
        """P: the groups that a learner step takes (CPPO's refill takes more than the batch)."""
        rollout, prompts = self.algorithm.rollout, self.batch.prompts_per_step
        return int(prompts / (1.0 - rollout.prune_rate) + 1e-9) if rollout.refill else prompts

    @property
    def colocated(self) -> bool:
        """A generator and a learner rank on every device, at work in turns: vLLM gives its memory
        back while the learner steps."""
        return self.weights.transport == "ipc"

    @property
    def completions_per_step(self) -> int:
        return self.groups_per_step * self.batch.group_size

    @property
    def max_groups_in_flight(self) -> int:
        """(S + 1) * P: the staleness budget."""
        return (self.generator.max_staleness + 1) * self.groups_per_step

    @property
    def verify_timeout_s(self) -> float:
        """Of one group. Groups queue for a verifier: all of the budget may stand before it."""
        verdicts = self.batch.group_size * len(self.verifier.rules)
        return 60.0 + self.verifier.timeout_s * verdicts * self.max_groups_in_flight

    @property
    def canary_tolerance(self) -> float:
        if self.weights.canary_tolerance is not None:
            return self.weights.canary_tolerance
        return 1e-3 if self.model.dtype == "float32" else 0.2

    @property
    def correction_kind(self) -> str:
        kind = self.algorithm.correction.kind
        if kind != "auto":
            return kind
        return "tis" if self.generator.max_staleness > 0 else "none"
