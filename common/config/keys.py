"""Every key of the configuration, by walking its dataclasses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from common.config.sections import Config


def hints_of_keys(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type hint, in the order of the fields, e.g. `batch.group_size`.

    Hints are whole: `Annotated` with its bounds. A list, also one of sections, is one key.
    """
    for name, hint in get_type_hints(section, include_extras=True).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from hints_of_keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint
