"""Sections `model`, `data` and `batch` of the configuration: what is trained, and on what."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from common.config.bounds import Count, Natural, Positive, Share

ALL_LINEAR = "all-linear"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM makes room: its `MaxLoRARanks`."""


@dataclass
class AdapterConfig:
    """LoRA: pairs of small matrices are trained beside frozen weights. `weights.publish` says how
    they reach the generators."""

    rank: Natural = 0
    """Rank of the adapters. 0 trains all weights; 1 to 32 is usual for reinforcement learning.
    Adapters learn at about ten times the `learner.learning_rate` of full fine-tuning."""
    alpha: Count = 32
    """An adapter's product counts `alpha / rank` times. So one learning rate serves every rank."""
    targets: str = ALL_LINEAR
    """Layers that get an adapter, by the last parts of their names with commas between, such as
    `q_proj,v_proj`. `all-linear` is all but embedding and output head."""

    @property
    def served_rank(self) -> int:
        """The smallest rank for which vLLM makes room that holds these; 0 where none does."""
        return next((rank for rank in SERVED_RANKS if rank >= self.rank), 0)


@dataclass
class ModelConfig:
    """The model that is trained."""

    path: str = MISSING
    """Model to train: a Hugging Face folder, a name on the hub, or `builtin:NAME`. Built-in names
    stand in `deploy.models.resolve`."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number type in which learner and generators compute. Master weights are always float32.
    `auto` takes bfloat16 on CUDA and on CPUs that multiply in it (AVX512-BF16, AMX). On other CPUs
    bfloat16 is emulated and several times slower, so it takes float32 there."""
    max_length: Count = 512
    """Longest context in tokens, prompt and completion together."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run. It may do anything then."""


@dataclass
class ReasoningGymConfig:
    """A task of reasoning-gym, which makes up questions and checks answers."""

    task: str = "chain_sum"
    """Name of the task."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the task, such as `{min_terms: 2, max_terms: 4}`."""
    size: Count = 5000
    """Distinct questions to train on that are drawn from the task."""


PromptOrder = Literal["shuffle", "sequential", "curriculum"]


@dataclass
class DataSetConfig:
    """One data set: where it is, and which columns of it mean what."""

    source: Literal["reasoning_gym", "file", "hub"] | None = None
    """Where questions come from. `reasoning_gym` draws them from a task. `file` reads a file, and
    `hub` a data set of the Hugging Face hub; both are named by `path`. Null is `reasoning_gym`
    without a `path`; with one it is `hub` for OWNER/NAME that is no folder here, else `file`."""
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    path: str | None = None
    """Data to read: a file, a folder, a pattern such as `train-*.parquet`, or the name of a data
    set on the hub such as `openai/gsm8k`. Files are .jsonl, .json, .csv or .parquet, also with
    .gz."""
    subset: str | None = None
    """Subset of the hub's data set, such as `main`; null where it has only one."""
    split: str = "train"
    """Split of the hub's data set to train on."""
    eval_path: str | None = None
    """Held-out rows: another file, or another split of the hub's data set. Null holds out the last
    `eval.prompts` distinct questions of the data."""
    prompt_column: str | None = None
    """Column with the question, text or a list of messages; `a.b` is the column b inside a. Null
    takes the first that is there of those that data sets use (`actors/data/schemas.py`)."""
    answer_column: str | None = None
    """Column with the right answer, which verifiers are given as `reference["answer"]`. Null takes
    the first that is there, as `reward_model.ground_truth`, `answer` or `solution`."""
    solution_column: str | None = None
    """Column with a worked solution, whose first tokens guide completions under G2RPO-A."""
    difficulty_column: str | None = None
    """Column with a number that says how hard the question is."""

    @property
    def kind(self) -> Literal["reasoning_gym", "file", "hub"]:
        """What `source` is, or comes to where it is null."""
        if self.source is not None:
            return self.source
        if self.path is None:
            return "reasoning_gym"
        named = _HUB_NAME.fullmatch(self.path) and not Path(self.path).exists()
        return "hub" if named else "file"


_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/(?![^/]*\.(?:jsonl?|csv|parquet|gz)\Z)[\w.-]+")
"""OWNER/NAME, which is no file of data."""


@dataclass
class DataSource(DataSetConfig):
    """One data set among several."""

    name: str = MISSING
    """Name of the data set in the trajectory log, in the metrics and in
    `verifier.rules[].sources`."""
    weight: Positive = 1.0
    """Share of the prompts that come from this data set, in proportion to the weights of the
    others."""


@dataclass
class DataConfig(DataSetConfig):
    """Where questions come from, and how they become prompts."""

    sources: list[DataSource] = field(default_factory=list)
    """Several data sets instead of one, each a mapping with a `name`, a `weight` and the keys of
    this section that say where it is. Every step has them in these proportions."""
    template: Literal["chat", "plain"] = "chat"
    """How a question becomes a prompt. `chat` takes the tokenizer's chat template, `plain` takes
    `plain_template`."""
    plain_template: str = "{prompt}"
    """Text of a prompt under `template: plain`, with `{prompt}` in place of the question. Turns of
    a row before the question stand before it, an empty line behind each."""
    system_prompt: str | None = None
    """System message before the question under `template: chat`. A row's own comes before it."""
    chat_template: str | None = None
    """File with a chat template that takes the place of the tokenizer's."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is told besides, such as `{enable_thinking: false}` for Qwen3."""
    max_bad_rows: Share = 0.01
    """Share of the rows that may be unusable. They go to quarantine.jsonl with the reason; more end
    the run."""
    order: PromptOrder = "shuffle"
    """Order of the prompts of an epoch. `shuffle` draws a new one for each epoch, `sequential` is
    that of the data, `curriculum` goes from easy to hard by `difficulty_column` (G2RPO-A)."""

    @property
    def each(self) -> list[DataSource]:
        """All data sets; one without a name where there is only one."""
        own = {one.name: getattr(self, one.name) for one in fields(DataSetConfig)}
        return self.sources or [DataSource(name="", **own)]

    def held_out(self, questions: int) -> list[int]:
        """How many of so many held-out questions come from each data set: evenly."""
        share, rest = divmod(questions, len(self.each))
        return [share + (place < rest) for place in range(len(self.each))]

    @property
    def kinds(self) -> set[str]:
        """What the data sets come from."""
        return {one.kind for one in self.each}


@dataclass
class BatchConfig:
    """The three batch knobs, and no more."""

    prompts_per_step: Count = 8
    """Prompts of a learner step. Each makes one group."""
    group_size: Count = 8
    """Completions of a group: they answer one prompt and are compared with each other."""
    tokens_per_microbatch: Count = 4096
    """Tokens of one forward and backward pass. It bounds memory and changes no gradient."""
