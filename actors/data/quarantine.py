"""Rows of a data set that cannot be used: left out, counted, and written down with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError

_SHOWN = 5
_NUMBERS, _QUOTED = re.compile(r"\d+"), re.compile(r"'(?:[^'\\]|\\.)*'")


@dataclass(frozen=True)
class BadRow:
    place: str
    reason: str
    record: Any
    """The row as it was read; None where it could not be."""


class Quarantine:
    """Collects bad rows while the data are read.

    Args:
        share: of all rows seen that may be bad.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.rows: list[BadRow] = []
        self.seen = 0

    def add(self, place: str, reason: UserError, record: Any = None) -> None:
        """Leave a row out."""
        self.rows.append(BadRow(place, str(reason), record))

    def check(self) -> None:
        """Raise `UserError`, with the first reasons, when too many rows are bad."""
        if len(self.rows) > self._share * self.seen:
            self.refuse(f"{len(self.rows)} of {self.seen} rows cannot be used")

    def refuse(self, what: str) -> NoReturn:
        """Raise `UserError`: `what`, and the first reasons."""
        reasons = "".join(f"{line}\n" for line in self.kinds())
        raise UserError(
            f"{reasons}{what}: mend them, or let more be left out by data.max_bad_rows "
            f"(now {self._share:g})"
        )

    def kinds(self) -> Iterator[str]:
        """Why rows cannot be used: a line for each kind of reason, with its count and first row."""
        kinds: dict[str, list[str]] = {}
        for row in self.rows:
            reason = row.reason.removeprefix(f"{row.place}: ")
            kinds.setdefault(_NUMBERS.sub("N", _QUOTED.sub("'...'", reason)), []).append(row.reason)
        common = sorted(kinds.values(), key=len, reverse=True)
        for reasons in common[:_SHOWN]:
            count = f"{len(reasons)} rows: " if len(reasons) > 1 else ""
            yield f"{count}{reasons[0]}"
        if others := common[_SHOWN:]:
            yield f"and {sum(map(len, others))} rows for {len(others)} more reasons"

    def write(self, path: Path) -> None:
        """One JSON object a line: place, reason, row. No file where no row is bad."""
        if self.rows:
            lines = [json.dumps(row.__dict__, default=repr) for row in self.rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
