"""From YAML files and `key=value` overrides to a checked `Config`.

Everything a run could stumble over that can be known from the configuration alone is refused
here, with the key at fault, before any process starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.algorithm import CreditKind
from common.config.sections import Config
from common.errors import UserError


def load_config(
    files: Sequence[Path],
    overrides: Sequence[str],
    recipes_folder: Path | None = None,
    *,
    resolved: bool = False,
) -> Config:
    """Merge defaults, `files` in order, the recipe they name, and `overrides`; check the result.

    `resolved` files were written by `dump_config`: their recipe is in them already, with what was
    overridden, and is not merged again. A recipe among the overrides is.

    Raises:
        UserError: no such file or recipe, unknown key, wrong type, impossible combination.
    """
    layers: list[Any] = [_read_yaml(path) for path in files]
    command_line = _parse_overrides(overrides)
    recipe = _named_recipe([command_line] if resolved else [*layers, command_line])
    if recipe is not None:
        layers.append(_read_yaml(_recipe_path(recipe, recipes_folder)))
    layers.append(command_line)
    config = _merge(layers)
    check_config(config)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config(resolved=True)` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"configuration file {path} does not exist") from error
    except Exception as error:  # YAML's own errors have no common base that is exported
        raise UserError(f"configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"configuration file {path} must hold a mapping of keys")
    return loaded


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise UserError(f"'{override}' is not an override: write key=value, e.g. steps=10")
    layer = OmegaConf.create()
    for override in overrides:
        key, _, value = override.partition("=")
        if _is_text(key) and value not in ("", "null") and value[0] not in "'\"":
            OmegaConf.update(layer, key, value.replace("\\n", "\n"), force_add=True)
            continue
        try:
            layer.merge_with_dotlist([override])
        except Exception as error:  # the YAML reader's errors again
            raise UserError(f"cannot read the override {override}: {error}") from error
    return layer


def _is_text(key: str) -> bool:
    """Whether a key's values are text, which YAML would read its own way (`Q: `, `#`, `007`, `no`).

    Such a value is taken as it stands, `\\n` as a new line; in quotes it is YAML after all.
    """
    kind: Any = Config
    for part in key.split("."):
        kinds = get_type_hints(kind) if is_dataclass(kind) else {}
        if part not in kinds:
            return False
        kind = kinds[part]
    return kind in (str, str | None)


def _named_recipe(layers: Sequence[DictConfig]) -> str | None:
    """The last layer that says something decides, `recipe=null` too."""
    names = [layer["recipe"] for layer in layers if "recipe" in layer]
    return str(names[-1]) if names and names[-1] is not None else None


def _recipe_path(recipe: str, folder: Path | None) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    if folder is None:
        raise UserError(f"recipe={recipe}: no folder of recipes here; give the path of a YAML file")
    path = folder / f"{recipe}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(
            f"recipe={recipe} is not known{nearest(recipe, known)}; there are: " + ", ".join(known)
        )
    return path


def _merge(layers: Sequence[DictConfig]) -> Config:
    schema = OmegaConf.structured(Config)
    try:
        for layer in layers:
            _check_keys(layer, schema)
        merged = OmegaConf.merge(schema, *layers)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        reason = str(error).splitlines()[0]
        hint = " (set it)" if "missing mandatory value" in reason else ""
        raise UserError(f"{key}: {reason}{hint}") from error
    except TypeError as error:  # OmegaConf's word for an index into a list
        raise UserError(
            f"{error}: a list is given whole, e.g. verifier.rules='[{{name: math_answer}}]'"
        ) from error
    assert isinstance(config, Config)
    return config


def _check_keys(layer: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """Name the nearest right key for an unknown one, at any depth."""
    for key in layer:
        full_key = f"{prefix}{key!s}"
        if key not in list(schema):  # `in` is False for a mandatory key without a value
            raise UserError(
                f"unknown key {full_key}{nearest(str(key), [str(k) for k in schema])}"
                + (f" (keys of {prefix[:-1]}: {', '.join(map(str, schema))})" if prefix else "")
            )
        if OmegaConf.is_missing(schema, key) or OmegaConf.is_missing(layer, key):
            continue
        inner, inner_schema = layer[key], schema[key]
        if not isinstance(inner_schema, DictConfig) or key in _FREE_FORM:
            continue
        if not isinstance(inner, DictConfig):
            raise UserError(
                f"{full_key}={inner} must be a mapping of keys: {', '.join(map(str, inner_schema))}"
            )
        _check_keys(inner, inner_schema, f"{full_key}.")


_FREE_FORM = ("params", "resources", "labels")
"""Mappings whose keys are not ours."""


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error, with a space before it; empty where nothing is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


_POSITIVE = (
    "steps",
    "batch.prompts_per_step",
    "batch.group_size",
    "batch.tokens_per_microbatch",
    "generator.count",
    "generator.tensor_parallel",
    "generator.pipeline_parallel",
    "generator.max_completion_tokens",
    "generator.max_concurrent_sequences",
    "generator.kv_cache_gib",
    "verifier.workers",
    "learner.ranks",
    "learner.learning_rate",
    "learner.logits_mib",
    "learner.max_grad_norm",
    "model.max_length",
    "weights.bucket_mib",
    "weights.canary_sequences",
    "weights.canary_tokens",
    "placement.gpus_per_node",
    "algorithm.baseline.epsilon",
    "algorithm.objective.epochs",
    "algorithm.rollout.guidance.window",
    "algorithm.rollout.guidance.max_tokens",
)
_SECONDS = (
    "generator.start_timeout_s",
    "generator.group_timeout_s",
    "verifier.timeout_s",
    "learner.start_timeout_s",
    "learner.step_timeout_s",
    "weights.publish_timeout_s",
    "eval.timeout_s",
    "checkpoint.timeout_s",
    "metrics.timeout_s",
    "restart.silence_s",
    "ray.connect_timeout_s",
)
"""Deadlines: every wait has one."""

_NOT_NEGATIVE = (
    "generator.max_staleness",
    "generator.temperature",
    "eval.every",
    "eval.prompts",
    "checkpoint.every",
    "learner.max_skipped_steps",
    "learner.warmup_steps",
    "learner.weight_decay",
    "learner.credit_probe_every",
    "learner.credit_log_every",
    "restart.limit",
    "weights.resends",
    "data.max_bad_rows",
    "restart.window_s",
    "restart.backoff_s",
    "restart.heartbeat_s",
    "algorithm.objective.kl",
)


def check_config(config: Config) -> None:
    """Raise `UserError` for values that cannot work together, naming the keys and a remedy."""
    _require_positive(config, *_POSITIVE, *_SECONDS)
    _require_finite(config, *_SECONDS)
    _require_not_negative(config, *_NOT_NEGATIVE)
    _check_processes(config)
    _check_groups(config)
    if not config.verifier.rules:
        raise UserError("verifier.rules is empty: name at least one verifier")
    _check_colocated(config)
    _check_data(config)
    _check_guidance(config)
    kind, kinds = config.algorithm.credit.kind, get_args(CreditKind)
    if kind not in kinds and ":" not in kind:
        raise UserError(
            f"algorithm.credit.kind={kind} is not known{nearest(kind, kinds)}: use one of "
            f"{', '.join(kinds)}, or a rule of your own as package.module:function"
        )


def _check_processes(config: Config) -> None:
    generator = config.generator
    if generator.max_completion_tokens >= config.model.max_length:
        raise UserError(
            f"generator.max_completion_tokens={generator.max_completion_tokens} leaves no room for "
            f"a prompt within model.max_length={config.model.max_length}: raise the latter"
        )
    if generator.group_cap_s is not None and not generator.group_cap_s > 0:
        raise UserError(
            f"generator.group_cap_s={generator.group_cap_s} must be greater than 0; null is no cap"
        )
    fewest = generator.min_count
    if fewest is not None and not 1 <= fewest <= generator.count:
        raise UserError(
            f"generator.min_count={fewest} must lie in 1..generator.count={generator.count}"
        )
    if fewest is not None and config.weights.transport != "object_store":
        raise UserError(
            f"generator.min_count needs weights.transport=object_store: the {generator.count} "
            f"generators of weights.transport={config.weights.transport} are one collective"
        )
    ranks, shards = config.learner.ranks, config.learner.shard_ranks
    if shards is not None and (shards < 1 or ranks % shards):
        raise UserError(f"learner.shard_ranks={shards} must divide learner.ranks={ranks}")
    if not 0 < generator.memory_fraction <= 1:
        raise UserError(f"generator.memory_fraction={generator.memory_fraction} must lie in (0, 1]")


def _check_groups(config: Config) -> None:
    """What leaves a group nothing to learn from."""
    batch, rollout = config.batch, config.algorithm.rollout
    if not 0 <= rollout.prune_rate < 1 or (rollout.refill and rollout.prune_rate == 0):
        raise UserError(
            f"algorithm.rollout.prune_rate={rollout.prune_rate} must lie in [0, 1), and above 0 "
            "for algorithm.rollout.refill"
        )
    if int(batch.group_size * (1 - rollout.prune_rate)) < 1 or rollout.keep_max_variance == 1:
        raise UserError(
            f"algorithm.rollout.prune_rate={rollout.prune_rate} and keep_max_variance="
            f"{rollout.keep_max_variance} leave nothing to learn of a group of "
            f"{batch.group_size}: keep at least one by the first, two by the second (0 keeps all)"
        )
    if config.generator.temperature == 0:
        raise UserError(
            "generator.temperature=0 samples the same completion G times, which gives no "
            "advantage: use a temperature above 0 (evaluation is greedy by itself)"
        )
    if batch.group_size == 1 and config.algorithm.baseline.kind in ("grpo", "dr_grpo", "rloo"):
        raise UserError(
            f"batch.group_size=1 gives zero advantage under algorithm.baseline.kind="
            f"{config.algorithm.baseline.kind}: use at least 2"
        )


def _check_colocated(config: Config) -> None:
    generator, ranks = config.generator, config.learner.ranks
    if not config.colocated:
        return
    if generator.max_staleness > 0:
        raise UserError(
            f"weights.transport=ipc has generators and learner take turns on their devices: "
            f"generator.max_staleness={generator.max_staleness} must be 0"
        )
    if generator.count != ranks or generator.devices > 1:
        raise UserError(
            "weights.transport=ipc puts one generator and one learner rank on every device: "
            f"generator.count={generator.count} must be learner.ranks={ranks}, and "
            "generator.tensor_parallel and pipeline_parallel 1"
        )


def _check_guidance(config: Config) -> None:
    guidance, data = config.algorithm.rollout.guidance, config.data
    key = "algorithm.rollout.guidance"
    if not 0 <= guidance.ratio <= 1:
        raise UserError(f"{key}.ratio={guidance.ratio} must lie in [0, 1]")
    if guidance.ratio > 0 and data.source != "reasoning_gym" and not data.solution_column:
        raise UserError(
            f"{key}.ratio={guidance.ratio} needs data.solution_column, the worked solutions"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.source == "reasoning_gym":
        if config.eval.prompts >= data.reasoning_gym.size:
            raise UserError(
                f"eval.prompts={config.eval.prompts} leaves no training prompts of "
                f"data.reasoning_gym.size={data.reasoning_gym.size}"
            )
        return
    if not data.path:
        raise UserError(f"data.source={data.source} needs data.path: a file, or a data set's name")
    if any(rule.name == "reasoning_gym" for rule in config.verifier.rules):
        raise UserError(
            "verifier.rules names reasoning_gym, which scores the answers of its own tasks only, "
            f"and data.source={data.source}: use math_answer or another verifier"
        )


def _require_finite(config: Config, *keys: str) -> None:
    for key in keys:
        value = attrgetter(key)(config)
        if not math.isfinite(value):
            raise UserError(f"{key}={value} must be finite")


def _require_positive(config: Config, *keys: str) -> None:
    for key in keys:
        value = attrgetter(key)(config)
        if not value > 0:
            raise UserError(f"{key}={value} must be greater than 0")


def _require_not_negative(config: Config, *keys: str) -> None:
    for key in keys:
        value = attrgetter(key)(config)
        if not value >= 0:
            raise UserError(f"{key}={value} must not be negative")
