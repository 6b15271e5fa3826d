"""A run directory as the inspector sees it: one state, read again when a file has changed."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from common.errors import UserError, first_line
from common.record.credit_log import FOLDER as CREDIT
from common.record.credit_log import credit_steps
from common.record.episodes import ENDS
from common.record.metrics import read_metrics
from deploy.inspector.account import is_live
from deploy.inspector.details import details, group_credit, other_credit
from deploy.inspector.ledger_view import read_fate, read_groups
from deploy.inspector.measured import group_values, measured_files
from deploy.inspector.query import GroupQuery, page_of, rows, select
from deploy.inspector.segments import LogIndex
from deploy.inspector.tokens import TokenTexts, load_tokenizer
from deploy.run.directory import LEDGER

METRICS = "metrics.jsonl"
NOT_LOGGED = "the trajectory log does not have this group: it was not, or not yet, verified"
SEARCH_S = 2.0
"""Time for one request to search texts, in seconds. The next request goes on from there."""
_SEARCHES = 8
"""How many searches are remembered."""


@dataclass(frozen=True)
class State:
    """What the files held at one moment."""

    version: str
    """Changes whenever a file does."""
    groups: pa.Table
    """The groups of log and ledger together, ascending by `group_id`. `segment` is null where the
    log has no such group."""
    metrics: list[dict[str, float]]
    credit_steps: list[int]
    live: bool


class RunData:
    """One run directory. Safe to use from several threads.

    Raises:
        UserError: there is no run, or another release wrote it.
    """

    def __init__(self, run: Path) -> None:
        if not (run / "config.yaml").is_file():
            raise UserError(f"there is no run in {run} (no config.yaml)")
        self.run = run
        self.config, self._model = _read_config(run / "config.yaml")
        self._log = LogIndex(run / "trajectories")
        self._lock = threading.Lock()
        self._searches: OrderedDict[str, _Search] = OrderedDict()
        self._texts: TokenTexts | None = None
        self._texts_from = ""
        self.state = self._read(self._signature())

    def refresh(self) -> State:
        """The present state. It is read again only when a file has changed."""
        with self._lock:
            signature = self._signature()
            if signature != self.state.version:
                self.state = self._read(signature)
            return self.state

    def facts(self) -> dict[str, Any]:
        """Facts of the run for the head of the page."""
        state = self.state
        groups = state.groups
        logged = groups.filter(pc.is_valid(groups["segment"]))
        return {
            "name": self.run.resolve().name,
            "version": state.version,
            "live": state.live,
            "config": self.config,
            "groups": groups.num_rows,
            "completions": pc.sum(logged["completions"]).as_py() or 0,
            "steps": pc.max(groups["step"]).as_py() or 0,
            "credit_steps": len(state.credit_steps),
            "episodes": _has_episodes(logged),
            "metrics": sorted({key for record in state.metrics for key in record} - {"step"}),
            "notes": self._notes(),
        }

    def series(self, keys: list[str]) -> dict[str, list[list[float | None]]]:
        """The curve of each metric as [[step, value], ...]. An unknown metric has an empty one."""
        return {
            key: [[record["step"], record[key]] for record in self.state.metrics if key in record]
            for key in keys
        }

    def page(self, query: GroupQuery) -> dict[str, Any]:
        """One page of the table of groups.

        `searched` is the share of the log in which a text was looked for; ask again while it is
        below 1.
        """
        groups, searched = self.state.groups, 1.0
        if query.text:
            found, searched = self._search(query.text)
            groups = groups.filter(pc.is_in(groups["group_id"], pa.array(found)))
        groups = select(groups, query)
        page = page_of(groups, query)
        return {"total": groups.num_rows, "searched": searched, "rows": rows(page)}

    def group(self, group_id: int) -> dict[str, Any] | None:
        """One group with all its tokens; None when neither log nor ledger has it."""
        groups = self.state.groups
        place = pc.index(groups["group_id"], group_id).as_py()
        if place < 0:
            return None
        row = groups.slice(place, 1)
        summary = rows(row)[0] | {
            "ticket": row["ticket"][0].as_py(),
            "dispatch_version": row["dispatch_version"][0].as_py(),
        }
        fate = read_fate(self.run / LEDGER, group_id)
        segment = row["segment"][0].as_py()
        if segment is None:
            return summary | fate | {"completions": [], "note": NOT_LOGGED}
        with self._lock:
            batch = self._log.segments[segment].group(row["row"][0].as_py())
            texts = self._tokenizer()
        credit, note = group_credit(self.run, group_id, summary["step"])
        others = other_credit(self.run, group_id, summary["step"])
        values, wrong = group_values(self.run, group_id, summary["step"])
        note = "; ".join(each for each in (note, wrong) if each)
        return summary | fate | {"note": note} | details(batch, credit, texts, others, values)

    def _tokenizer(self) -> TokenTexts | None:
        """The tokenizer, looked for again until the first checkpoint brings one."""
        if self._texts is None:
            self._texts, self._texts_from = load_tokenizer(self.run, self._model)
        return self._texts

    def _notes(self) -> list[str]:
        """Sentences about what this run lacks."""
        with self._lock:
            missing = self._tokenizer() is None
        notes = [f"Tokens are shown by their ids: {self._texts_from}."] if missing else []
        if not (self.run / LEDGER).is_file():
            notes.append("There is no ledger: states, steps, lengths and staleness are unknown.")
        if not self.state.metrics:
            notes.append("There are no metrics yet.")
        if not self.state.credit_steps:
            notes.append("No step has credit on record: what the log itself says is shown.")
        return notes

    def _search(self, text: str) -> tuple[npt.NDArray[np.int64], float]:
        with self._lock:
            search = self._searches.pop(text, None) or _Search(text)
            self._searches[text] = search
            while len(self._searches) > _SEARCHES:
                self._searches.popitem(last=False)
            return search.go_on(self._log, SEARCH_S)

    def _signature(self) -> str:
        """Digest of the sizes and times of all files that count, and of whether the run goes on."""
        names = [METRICS, LEDGER, f"{LEDGER}-wal", CREDIT]
        paths = [self.run / name for name in names]
        paths += sorted((self.run / "trajectories").glob("segment-*.arrow"))
        paths += measured_files(self.run)
        found = []
        for path in paths:
            if path.exists():
                stat = path.stat()
                found.append((str(path.relative_to(self.run)), stat.st_size, stat.st_mtime_ns))
        text = json.dumps([found, is_live(self.run)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _read(self, version: str) -> State:
        metrics = self.run / METRICS
        self._log.refresh()
        return State(
            version=version,
            groups=_joined(self._log.table(), read_groups(self.run / LEDGER)),
            metrics=read_metrics(metrics) if metrics.is_file() else [],
            credit_steps=credit_steps(self.run),
            live=is_live(self.run),
        )


class _Search:
    """A search for a text, segment by segment, the newest first. It goes on where it stopped."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._searched: dict[int, int] = {}
        self._found: dict[int, list[npt.NDArray[np.int64]]] = {}

    def go_on(self, log: LogIndex, seconds: float) -> tuple[npt.NDArray[np.int64], float]:
        """Search on; returns the ids of all groups found so far and the share of the log searched.

        At least one segment is searched, however long that takes: it has a bounded size.
        """
        ends = time.monotonic() + seconds
        for number in reversed(range(len(log.segments))):
            segment = log.segments[number]
            first = self._searched.get(number, 0)
            if first < segment.groups.num_rows:
                matching = segment.search(self._text, first)
                ids = segment.groups["group_id"].to_numpy()[matching]
                self._found.setdefault(number, []).append(ids)
                self._searched[number] = segment.groups.num_rows
                if time.monotonic() > ends:
                    break
        found = [ids for parts in self._found.values() for ids in parts]
        total = sum(segment.groups.num_rows for segment in log.segments)
        share = sum(self._searched.values()) / total if total else 1.0
        return np.concatenate([np.arange(0), *found]), share


def _joined(log: pa.Table, booked: pa.Table) -> pa.Table:
    """Groups of the log and of the ledger, each once.

    `length` is the mean of the sampled tokens of a completion. `staleness` is the learner's
    version at the step less the version that every generator held at the dispatch: no token of
    the group was older.
    """
    ids = pa.array(np.union1d(log["group_id"].to_numpy(), booked["group_id"].to_numpy()))
    logged = log.take(pc.index_in(ids, log["group_id"]))
    known = booked.take(pc.index_in(ids, booked["group_id"]))

    def either(name: str) -> pa.ChunkedArray:
        return pc.coalesce(logged[name], known[name])

    tokens = pc.if_else(pc.greater(known["tokens"], 0), known["tokens"], None)
    completions, dispatched = either("completions"), either("dispatch_version")
    sampled = pc.coalesce(known["completions"], completions)  # probes are not in the log
    return pa.table(
        {
            "group_id": ids,
            "ticket": either("ticket"),
            "step": known["step"],
            "state": known["state"],
            "completions": completions,
            "dispatch_version": dispatched,
            "length": pc.divide(tokens.cast(pa.float64()), sampled.cast(pa.float64())),
            "staleness": pc.subtract(pc.subtract(known["step"], 1), dispatched),
            **{
                name: logged[name]
                for name in (
                    "scored",
                    "reward_mean",
                    "reward_std",
                    "accuracy",
                    "turns",
                    "tool_errors",
                    "ended",
                    "question",
                    "segment",
                    "row",
                )
            },
        }
    ).combine_chunks()


def _has_episodes(groups: pa.Table) -> bool:
    """Whether any completion had turns, or an end that an answer cannot have."""
    of_answers = 1 << ENDS.index("stop") | 1 << ENDS.index("length")
    other = pc.bit_wise_and(groups["ended"], pa.scalar(~of_answers))
    return bool(pc.any(pc.or_(pc.greater(groups["turns"], 1), pc.not_equal(other, 0))).as_py())


def _read_config(path: Path) -> tuple[str, str]:
    """The configuration of a run as it is written, and its `model.path`.

    Nothing in it is resolved: somebody else may have sent the run.

    Raises:
        UserError: it is no configuration of a run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        model = yaml.safe_load(text)["model"]["path"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no configuration of a run: {first_line(error)}") from error
    return text, str(model)
