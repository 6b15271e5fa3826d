"""From YAML files and `key=value` overrides to a checked `Config`.

Everything a run could stumble over that can be known from the configuration alone is refused
here, with the key at fault, before any process starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.absent import ABSENT
from common.config.checks import check_config
from common.config.environment import ENVIRONMENT_RULE
from common.config.keys import hints_of_keys
from common.config.sections import Config, VerifierSpec
from common.errors import UserError, nearest

REASONING_GYM = "reasoning_gym"
"""Name of the source of made-up questions, and of the rule that judges them."""


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where its values came from."""

    config: Config
    origins: dict[str, str]
    """By key, the layer that changed the value last: `recipe NAME`, `file PATH` or `command line`.
    A key that nothing changed has its default and is not here."""


@dataclass(frozen=True)
class _Layer:
    origin: str
    content: DictConfig


def load_config(
    files: Sequence[Path],
    overrides: Sequence[str],
    recipes_folder: Path | None = None,
    *,
    resolved: bool = False,
) -> Config:
    """The checked configuration of `load_with_origins`."""
    return load_with_origins(files, overrides, recipes_folder, resolved=resolved).config


def load_with_origins(
    files: Sequence[Path],
    overrides: Sequence[str],
    recipes_folder: Path | None = None,
    *,
    resolved: bool = False,
) -> Loaded:
    """Merge defaults, the recipe, `files` in order and `overrides`, and check the result.

    Each layer wins over those before it. The recipe is the one that the last layer names. One that
    is named on the command line takes the place of the file's, and stays below the file's own keys.

    Args:
        overrides: `key=value`, as on a command line.
        recipes_folder: where a recipe is looked for by its name.
        resolved: `files` were written by `dump_config`, so they hold their recipe already. It is
            not merged again. Where `overrides` name another recipe, that one takes its place.

    Raises:
        UserError: no such file or recipe, unknown key, wrong type, impossible value or combination.
    """
    command_line = _Layer("command line", _parse_overrides(overrides))
    own = [_Layer(f"file {path}", _read_yaml(path)) for path in files]
    if not resolved:
        below = _recipe_layer([*own, command_line], recipes_folder)
    elif below := _recipe_layer([command_line], recipes_folder):
        own = [_without_recipe(layer, recipes_folder) for layer in own]
    loaded = _merge([*below, *own, command_line])
    config = loaded.config
    if not config.verifier.rules and config.environment.playing:
        config.verifier.rules = [VerifierSpec(name=ENVIRONMENT_RULE)]  # it values its episodes
    if not config.verifier.rules and config.data.kinds == {REASONING_GYM}:
        config.verifier.rules = [VerifierSpec(name=REASONING_GYM)]  # its tasks judge themselves
    check_config(config)
    return loaded


def differing(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values are not alike: those of `config` and of `other`."""
    one, two = (_values(OmegaConf.structured(each)) for each in (config, other))
    return {key: (one[key], two[key]) for key in _KEYS if one[key] != two[key]}


def dump_config(config: object) -> str:
    """A configuration as YAML; that of a run `load_config(resolved=True)` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def dump_with_origins(loaded: Loaded) -> str:
    """YAML of the configuration, with a comment behind a value on which layer it came from."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(loaded.config))
    return "\n".join(_marked_lines(plain, "", loaded.origins)) + "\n"


def _marked_lines(
    section: dict[str, Any], prefix: str, origins: Mapping[str, str]
) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key not in _KEYS:
            yield f"{indent}{name}:"
            yield from _marked_lines(value, f"{key}.", origins)
            continue
        lines = OmegaConf.to_yaml(OmegaConf.create({name: value})).splitlines()
        if key in origins:  # a comment may not stand inside of text that goes over several lines
            lines[-1 if isinstance(value, str) else 0] += f"  # {origins[key]}"
        yield from (f"{indent}{line}" for line in lines)


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UserError(f"configuration file {path} does not exist") from error
    except Exception as error:  # YAML's own errors have no common base that is exported
        raise UserError(f"configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"configuration file {path} must hold a mapping of keys")
    _refuse_interpolation(OmegaConf.to_container(loaded), str(path))
    return loaded


def _refuse_interpolation(value: Any, place: str) -> None:
    """Refuse `${...}`: a run directory that somebody sent would show what the environment holds,
    and a secret would be written out with the configuration.

    Raises:
        UserError: a text in `value` has it.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_interpolation(inner, f"{place}: {key}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_interpolation(inner, place)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{place}={value}: interpolation (${{...}}) is not read; write the value")


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override or override.startswith(("-", "=")):
            raise UserError(f"'{override}' is not an override: write key=value, e.g. steps=10")
    layer = OmegaConf.create()
    for override in overrides:
        key, _, value = override.partition("=")
        _refuse_interpolation(value, key)
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


def _recipe_layer(layers: Sequence[_Layer], folder: Path | None) -> list[_Layer]:
    """The recipe that the last layer to say so names; none for `recipe=null` or where none does."""
    names = [layer.content["recipe"] for layer in layers if "recipe" in layer.content]
    if not names or names[-1] is None:
        return []
    recipe = str(names[-1])
    return [_Layer(f"recipe {recipe}", _read_yaml(_recipe_path(recipe, folder)))]


def _without_recipe(layer: _Layer, folder: Path | None) -> _Layer:
    """What a resolved file says beyond the defaults and its own recipe."""
    below = OmegaConf.structured(Config)
    for recipe in _recipe_layer([layer], folder):
        below = OmegaConf.merge(below, recipe.content)
    inherited, own = _values(below), OmegaConf.create()
    for key, value in _values(OmegaConf.merge(below, layer.content)).items():
        if value != inherited[key]:
            OmegaConf.update(own, key, value, force_add=True)
    return _Layer(layer.origin, own)


_RENAMED = {"grpo_lambda_selective": "grpo_lambda_entropy_mask"}
"""Recipes whose name was another in the configuration of some runs."""


def _recipe_path(recipe: str, folder: Path | None) -> Path:
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    if folder is None:
        raise UserError(f"recipe={recipe}: no folder of recipes here; give the path of a YAML file")
    path = folder / f"{recipe}.yaml"
    if recipe in _RENAMED:
        raise UserError(f"recipe={recipe} is called {_RENAMED[recipe]}: use that name")
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(
            f"recipe={recipe} is not known{nearest(recipe, known)}; there are: " + ", ".join(known)
        )
    return path


def _merge(layers: Sequence[_Layer]) -> Loaded:
    schema = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    try:
        for layer in layers:
            _check_keys(layer.content, schema)
        merged, before = schema, _values(schema)
        for layer in layers:
            merged = OmegaConf.merge(merged, layer.content)
            values = _values(merged)
            changed = (key for key, value in values.items() if value != before[key])
            origins |= dict.fromkeys(changed, layer.origin)
            before = values
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
    return Loaded(config, origins)


def _values(config: Any) -> dict[str, Any]:
    """Every key with its value, plain; a list or a mapping of free names is one value."""
    plain: Any = OmegaConf.to_container(config)
    return {key: reduce(getitem, key.split("."), plain) for key in _KEYS}


_KEYS = [key for key, _ in hints_of_keys()]


def _check_keys(layer: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """Name the nearest right key for an unknown one, at any depth."""
    for key in layer:
        full_key = f"{prefix}{key!s}"
        if key not in list(schema):  # `in` is False for a mandatory key without a value
            if full_key in ABSENT:
                raise UserError(f"{full_key} {ABSENT[full_key]}")
            raise UserError(
                f"unknown key {full_key}{nearest(str(key), [str(k) for k in schema])}"
                + (f" (keys of {prefix[:-1]}: {', '.join(map(str, schema))})" if prefix else "")
            )
        if OmegaConf.is_missing(schema, key) or OmegaConf.is_missing(layer, key):
            continue
        inner, inner_schema = layer[key], schema[key]
        if not is_dataclass(OmegaConf.get_type(inner_schema)):  # a value, or keys of the user's own
            continue
        if not isinstance(inner, DictConfig):
            raise UserError(
                f"{full_key}={inner} must be a mapping of keys: {', '.join(map(str, inner_schema))}"
            )
        _check_keys(inner, inner_schema, f"{full_key}.")
