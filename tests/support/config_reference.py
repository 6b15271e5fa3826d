"""The reference of configuration keys in common/README.md.

`python tests/support/config_reference.py` writes it: a table a section with the type of each key,
its default, its bound, and the first sentence of its docstring. A test holds that it is up to date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "common" / "README.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from between_marks import with_part  # noqa: E402
from docstrings import docstrings, first_sentence  # noqa: E402

from common.config.bounds import bound_of  # noqa: E402
from common.config.names import names_in  # noqa: E402
from common.config.sections import Config  # noqa: E402

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "values"}


class Key(NamedTuple):
    """A row of the reference."""

    name: str
    type: str
    default: str
    bound: str
    text: str
    """The whole docstring."""


def keys(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every key; those of the elements of a list are `LIST[].NAME`."""
    hints, texts = get_type_hints(section, include_extras=True), texts_of(section)
    for field in fields(section):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from keys(hint, f"{name}.")
            continue
        bound = bound_of(hint)
        words = "" if bound is None else str(bound)
        yield Key(name, type_in_words(hint), default_of(field), words, texts[field.name])
        for inner in get_args(hint):
            if isinstance(inner, type) and is_dataclass(inner):
                yield from keys(inner, f"{name}[].")


@cache
def texts_of(section: type) -> dict[str, str]:
    """Docstrings of the fields of a section, inherited ones too; empty where there is none."""
    texts = {f.name: "" for f in fields(section)}
    for cls in filter(is_dataclass, reversed(section.__mro__)):
        found = {name: text for _, name, text in docstrings(Path(inspect.getfile(cls)))}
        texts |= {name: text for name in texts if (text := found.get(f"{cls.__name__}.{name}"))}
    return texts


def type_in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if names := names_in(hint):
        return f"{listed(names)}, or `package.module:name`"
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return listed(arguments)
    if origin in (Union, UnionType):
        return ", or ".join(
            "null" if each is NoneType else type_in_words(each) for each in arguments
        )
    if origin is tuple:
        return f"{len(arguments)} of type {type_in_words(arguments[0])}"
    if origin is list:
        inner = arguments[0]
        return "list of mappings" if is_dataclass(inner) else f"list of {type_in_words(inner)}"
    if origin is dict:
        return f"mapping of names to {type_in_words(arguments[1])}"
    return WORDS[hint]


def listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def default_of(field: Field[Any]) -> str:
    value = field.default
    if field.default_factory is not NO_DEFAULT:
        value = field.default_factory()
    if value == MISSING:
        return "to be set"
    return f"`{in_yaml(value)}`"


def in_yaml(value: Any) -> str:
    """A value as it would be written on the command line."""
    if is_dataclass(value):
        pairs = vars(value).items()
        return "{" + ", ".join(f"{name}: {in_yaml(each)}" for name, each in pairs if each) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def reference() -> str:
    """A table a section, a section inside of another after it."""
    sections: dict[str, list[str]] = {}
    for key in keys():
        section = key.name.partition("[")[0].rpartition(".")[0]
        cells = (f"`{key.name}`", key.type, key.default, key.bound, first_sentence(key.text))
        row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        sections.setdefault(section, []).append(row)
    tables = [
        "\n".join(
            [
                f"\n#### {section or 'the run'}\n",
                "| key | type | default | bound | what it is |",
                "|---|---|---|---|---|",
                *rows,
            ]
        )
        for section, rows in sections.items()
    ]
    return "\n".join(tables) + "\n\n"


def with_reference(text: str) -> str:
    return with_part(text, "configuration", "config_reference.py", reference())


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text()))
