"""Sections `learner` and `weights` of the configuration: who trains, and how weights go back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from common.config.bounds import (
    Count,
    Limit,
    Natural,
    NotNegative,
    Positive,
    Seconds,
    ShareBelowOne,
)
from common.config.names import Names
from common.weights.registry import PublishName, TransportName

OptimizerName = Annotated[
    str,
    Names(
        "AdamW",
        "SGD",
        "Muon",
        "Adam",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "Adagrad",
        "ASGD",
        "RMSprop",
    ),
]
"""Those of torch that step on sharded parameters."""


@dataclass
class OptimizerConfig:
    """What turns gradients into steps."""

    kind: OptimizerName = "AdamW"
    """Class of `torch.optim`. One of your own must step on sharded parameters (DTensor)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class, besides the learning rate, which is
    `learner.learning_rate`."""
    matrices_only: bool = False
    """Whether the class gets the weight matrices of the layers alone, and AdamW the rest. With Muon
    this is always so, and its `adjust_lr_fn` is `match_rms_adamw`, so that one learning rate serves
    both."""
    state: Literal["float32", "8bit"] = "float32"
    """Numbers in which AdamW keeps its two moments. `8bit` takes a quarter of the memory, in blocks
    of 256 with a scale each. Steps differ by the rounding."""


@dataclass
class LearnerConfig:
    """The processes that train (FSDP2), and the optimiser."""

    ranks: Count = 1
    """Processes that train together, each on a device of its own."""
    shard_ranks: Count | None = None
    """Ranks that hold one copy of the weights and the optimiser between them; null is all. With as
    many as a node has devices, layers are gathered inside nodes only (hybrid sharding)."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    """Custom Ray resources that each rank asks for."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes on which ranks may stand."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Devices of the learner. `auto` takes CUDA where there is any."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masters: Literal["float32", "bfloat16"] = "float32"
    """Numbers in which the weights are kept that AdamW trains. `bfloat16` takes half, and rounds
    stochastically: a step that is smaller than the distance of two numbers arrives on average.
    Gradients are bfloat16 then, too, where they are exchanged in every micro-batch."""
    learning_rate: Positive = 1e-5
    """Learning rate after the warm-up."""
    warmup_steps: Natural = 5
    """Steps in which the learning rate rises to its full value."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up. `constant` keeps it; `linear` and `cosine`
    lower it to 0 at the last step."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW; other optimisers take theirs in `learner.optimizer.args`."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: Limit = 1.0
    """Norm to which a larger gradient is scaled down. `.inf` clips nothing."""
    max_skipped_steps: Natural = 3
    """Steps in a row that may be left out because their gradient is not finite. One more ends the
    run."""
    logprob_gap_warn: Limit = 0.2
    """Mean gap between learner's and sampler's log-probability of a token, in nats, that warns.
    bfloat16 alone makes some 0.02, eight versions of staleness 0.05."""
    logprob_gap_stop: Limit = 1.0
    """Mean gap between learner's and sampler's log-probability of a token, in nats, that ends the
    run."""
    logits_mib: Positive = 320.0
    """MiB of float32 logits that exist at a time in the fused log-probability head."""
    activation_checkpointing: bool | None = None
    """Whether activations are computed again in the backward pass instead of kept. It saves memory
    and costs a second forward pass. Null does so on CUDA devices where a step needs it to fit."""
    activation_offload: bool = False
    """Whether the inputs of layers wait in the memory of the host until the backward pass computes
    the layers again. It changes no number. For CUDA alone."""
    reduce_once: bool | None = None
    """Whether ranks add up gradients by themselves and exchange them once a step. It saves messages
    and holds a whole float32 gradient on every rank. Null does so for models of up to four billion
    parameters where that fits. On CPUs it is always so."""
    compile: bool | None = None
    """Whether torch compiles the layers of the model and the log-probability head. Null does so on
    CUDA devices."""
    credit_probe_every: Natural = 10
    """Steps from one measurement of the gradient norm under GRPO's credit on the same batch to the
    next, and to the first. Each costs a forward and a backward pass, and is made only where tokens
    differ in credit. 0 is off."""
    credit_log_every: Natural = 1
    """Steps between credit logs, which hold what every token was credited with. One takes 12 bytes
    a token. 0 writes none."""
    packing: Literal["shared_prefix", "sequence"] = "shared_prefix"
    """How completions share a micro-batch. `shared_prefix` computes a prompt once for all of its
    completions there, `sequence` once for each."""
    attention: Literal["auto", "grids", "varlen"] = "auto"
    """How attention is computed. `grids` pads sequences to similar lengths, on any device. `varlen`
    is torch's variable-length flash-attention, without padding. It needs CUDA and bfloat16, and is
    compared with the grids at every start. `auto` takes it where that comparison holds."""
    threads: Count | None = None
    """CPU threads of each rank. Null lets the core plan decide, and is 4 on a cluster."""
    start_timeout_s: Seconds = 600.0
    """Seconds for the ranks to start."""
    step_timeout_s: Seconds = 1800.0
    """Seconds for a learner step."""


@dataclass
class TeacherConfig:
    """A larger model that scores what the policy sampled (`algorithm.advantage.scorer=teacher`)."""

    path: str | None = None
    """Model of the teacher, named as in `model.path`. It needs the policy's vocabulary and chat
    template, and a context of at least `model.max_length`. The learner's ranks hold it in shards
    beside the policy, in `model.dtype`, unless it has generators of its own."""
    count: Natural = 0
    """Generators of the teacher's own, for one that does not fit beside the policy. vLLM scores the
    completions there, as log-probabilities of a prompt. 0 has the learner's ranks hold it."""
    tensor_parallel: Count = 1
    """Devices that share every layer of such a generator."""
    score_timeout_s: Seconds = 300.0
    """Seconds for such a generator to score a group. One that takes longer ends the run."""
    offload: bool = False
    """Whether the teacher's weights wait in the memory of the host between its passes. It takes
    none of a CUDA device in a gradient step then, and a pass begins with their copy. For CUDA
    alone."""


@dataclass
class WeightsConfig:
    """How new weights reach the generators, and how that is proved."""

    transport: TransportName = "object_store"
    """How weights travel. `object_store` sends them through Ray, on any device; `nccl` from device
    to device. With `ipc` a generator and a learner rank share every device and take turns."""
    publish: PublishName = "merged"
    """What travels where adapters are trained (`model.adapter`). `merged` sends all weights with
    the adapters added, and vLLM samples as fast as without any. `adapter` sends the adapters alone,
    a few per cent of the bytes, and vLLM computes them beside the weights: slower on a CPU."""
    bucket_mib: Count = 64
    """MiB of weights that are sent at a time."""
    canary_sequences: Count = 4
    """Prompts that learner and generators both score after every update, as its proof: the
    canary."""
    canary_tokens: Count = 24
    """Last tokens of a canary sequence, those that are scored."""
    canary_tolerance: Positive | None = None
    """Largest mean gap in nats a token of a canary sequence between learner and generator. Null is
    0.2 in bfloat16, whose logits have steps of up to 1/8, 0.001 in float32, and 0.4 with
    `generator.quantization`."""
    canary_growth: Limit = 10.0
    """Largest gap of a version as a multiple of the largest one before it. Gaps below a quarter of
    the tolerance always pass: they may be rounding. `.inf` leaves the tolerance alone."""
    resends: Natural = 2
    """Times that weights which arrive damaged are sent again as a whole, before a restart."""
    publish_timeout_s: Seconds = 300.0
    """Seconds for a version to reach the generators and be proved."""
