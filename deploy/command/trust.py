"""Code that the configuration of a run names: whoever sent the run may have chosen it.

`resume=` and `replay` read the configuration in a run directory. A rule of one's own in it, or
`model.trust_remote_code`, would run what that says. So it must be named on the command line too, or
the run be trusted as a whole by `--trust-code`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.config.sections import Config
from common.errors import UserError

_IMPORT_PATH = re.compile(r"(?!builtin:)[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NO_CODE = ("data", "ray", "name", "runs_dir", "resume", "recipe")
"""Sections and keys whose values are never imported."""
_COMMAND = ".command"
"""Ends the keys whose value is a program with its arguments, as of an environment."""


def check_code(
    config: Config, run: Path, words: Sequence[str], ignored: Sequence[str] = ()
) -> None:
    """Refuse a run's configuration that names code which nobody here has named.

    Args:
        words: overrides of the command line; code that is named in one is wanted.
        ignored: sections whose code will not run here.

    Raises:
        UserError: it names code.
    """
    said = " ".join(words)
    found = [
        (key, value)
        for key, value in code_named(config)
        if not _is_said(key, value, said) and key.partition(".")[0] not in ignored
    ]
    if found:
        named = ", ".join(f"{key}={value}" for key, value in found)
        raise UserError(
            f"the configuration of {run} names code, which would run here: {named}. If the run is "
            "yours, or you trust who sent it, add --trust-code"
        )


def _is_said(key: str, value: str, said: str) -> bool:
    """Whether a command line names what the key would run; of a program, all of its words."""
    return all(word in said for word in (value.split() if key.endswith(_COMMAND) else [value]))


def code_named(config: Config) -> list[tuple[str, str]]:
    """Keys whose values are imported or executed, with the values."""
    found = [
        (key, value)
        for key, value in _texts(asdict(config), "")
        if (_IMPORT_PATH.fullmatch(value) or key.endswith(_COMMAND))
        and key.partition(".")[0] not in _NO_CODE
    ]
    remote = [("model.trust_remote_code", "true")] if config.model.trust_remote_code else []
    return found + remote


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        if key.endswith(_COMMAND):
            value = [" ".join(map(str, value))]
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value
