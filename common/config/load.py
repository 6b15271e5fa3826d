"""From YAML files and `key=value` overrides to a checked `Config`.

Everything a run could stumble over that can be known from the configuration alone is refused
here, with the key at fault, before any process starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.checks import check_config
from common.config.sections import Config
from common.errors import UserError, nearest


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
