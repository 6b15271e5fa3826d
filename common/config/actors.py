"""Sections `generator` and `verifier` of the configuration: who samples, and who judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from common.config.bounds import (
    Count,
    Finite,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Seconds,
    Temperature,
)


@dataclass
class GeneratorConfig:
    """The actors that sample completions, each with a vLLM engine."""

    count: Count = 1
    """Generators of the run."""
    min_count: Count | None = None
    """Fewest generators with which a run on a cluster starts and goes on. The others join when
    there is room. Null waits for all."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    """Custom Ray resources that each generator asks for, such as `{H100: 1}`. They come on top of
    CPUs and GPUs and need a cluster of your own: `ray.address` other than `local`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes on which generators may stand."""
    max_completion_tokens: Count = 48
    """Longest completion in tokens; what is longer is cut."""
    temperature: Temperature = 1.0
    """Temperature of sampling. At 0 all completions of a group would be the same and teach nothing.
    Evaluation is greedy by itself."""
    stop: list[Any] = field(default_factory=list)
    """Texts and numbers of tokens at which a completion ends, beside EOS: base models need them.
    The policy is trained on the tokens of a stop; a verifier does not see them. Example:
    `["\\n\\n", "Question:", 128009]`."""
    max_staleness: Natural = 1
    """Most versions (S) that a trained token may be older than the learner. 0 is synchronous."""
    kv_cache_gib: Positive = 1.0
    """GiB of a generator's key-value cache on a CPU."""
    max_concurrent_sequences: Count = 256
    """Most completions that a generator samples at a time."""
    max_batched_tokens: Count | None = None
    """Most tokens, of prompts and completions together, that a generator computes at a time. Null
    is 8192 on CUDA, and vLLM's own choice on a CPU."""
    enforce_eager: bool = True
    """Whether vLLM runs without compilation and CUDA graphs. It starts sooner and decodes
    slower."""
    quantization: Literal["fp8", "int8"] | None = None
    """Type of eight bits in which the layers of generators multiply. `fp8` is for CUDA, `int8` for
    CPUs. Weights are quantised as they arrive. Sampling is faster, and the sampler is no longer
    quite the policy: `algorithm.correction` weighs that. Evaluation is quantised too. Null is
    off."""
    memory_fraction: PositiveShare = 0.85
    """Share of a CUDA device's memory that vLLM may take. On devices that generators and learner
    share it is that of both together while generators sample."""
    threads: Count | None = None
    """CPU threads of each generator. Null lets the core plan decide, and is 4 on a cluster."""
    num_gpus: NotNegative = 0.0
    """CUDA devices that each generator asks Ray for. 0 takes `tensor_parallel` times
    `pipeline_parallel`."""
    tensor_parallel: Count = 1
    """Devices that share every layer of a generator."""
    pipeline_parallel: Count = 1
    """Stages into which a generator's layers are cut. Each has `tensor_parallel` devices, all on
    one node."""
    start_timeout_s: Seconds = 600.0
    """Seconds for a generator to start."""
    group_timeout_s: Seconds = 600.0
    """Seconds for a group to be sampled, and for its follow-up besides. One that takes longer ends
    the run, since something hangs."""
    group_cap_s: Seconds | None = None
    """Seconds after which a group is given up and its place goes to another prompt. A follow-up has
    as many of its own. It bounds how long a straggler is held, at the price of training on fewer
    long answers. Null never does."""

    @property
    def devices(self) -> int:
        """CUDA devices of each generator."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def batched_tokens(self) -> int:
        """`max_batched_tokens` on CUDA. vLLM's default is that of a server that nobody named:
        2048, with which prompts hold up decoding."""
        return self.max_batched_tokens or 8192


@dataclass
class VerifierSpec:
    """A rule that judges completions."""

    name: str = MISSING
    """Name of a rule, or a function of your own as `package.module:function`. Names are
    `reasoning_gym`, `math_answer`, `format_rules` and the others of `actors/verifiers/`."""
    weight: Finite = 1.0
    """Factor of the rule's score in the reward. A negative one punishes."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the rule."""
    sources: list[str] = field(default_factory=list)
    """Names of `data.sources` whose completions the rule judges. Empty: it judges all."""

    def judges(self, source: str) -> bool:
        """Whether the completions of a data set are the rule's to judge."""
        return not self.sources or source in self.sources


@dataclass
class VerifierConfig:
    """The actors that judge completions, and their rules."""

    workers: Count = 1
    """Verifier actors. Each judges in a child process that can be killed."""
    resources: dict[str, NotNegative] = field(default_factory=dict)
    """Custom Ray resources that each verifier asks for."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes on which verifiers may stand."""
    timeout_s: Seconds = 10.0
    """Seconds of wall clock for the verdict on one completion."""
    network: bool = False
    """Whether rules may open network connections, as a judge behind HTTP has to."""
    sandbox: Literal["required", "trusted"] = "required"
    """`required` refuses programs of a model on a host where they could reach their judge.
    `trusted` runs them all the same. `plan` says which walls hold."""
    readable: list[str] = field(default_factory=list)
    """Files and folders that rules may read, beside Python and what can be imported."""
    rules: list[VerifierSpec] = field(default_factory=list)
    """Rules that judge each completion. The reward is the weighted sum of their scores. What is
    called accuracy is the first one's score. Empty takes the rule that fits the data, and says
    which."""
