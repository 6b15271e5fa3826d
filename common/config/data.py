"""Sections `model`, `data` and `batch` of the configuration: what is trained, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from common.config.bounds import Count, Share


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
class DataConfig:
    """Where questions come from, and how they become prompts."""

    source: Literal["reasoning_gym", "file", "hub"] = "reasoning_gym"
    """Where questions come from. `reasoning_gym` draws them from a task. `file` reads a file, and
    `hub` a data set of the Hugging Face hub; both are named by `path`."""
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
    template: Literal["chat", "plain"] = "chat"
    """How a question becomes a prompt. `chat` takes the tokenizer's chat template, `plain` takes
    `plain_template`."""
    plain_template: str = "{prompt}"
    """Text of a prompt under `template: plain`, with `{prompt}` in place of the question."""
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


@dataclass
class BatchConfig:
    """The three batch knobs, and no more."""

    prompts_per_step: Count = 8
    """Prompts of a learner step. Each makes one group."""
    group_size: Count = 8
    """Completions of a group: they answer one prompt and are compared with each other."""
    tokens_per_microbatch: Count = 4096
    """Tokens of one forward and backward pass. It bounds memory and changes no gradient."""
