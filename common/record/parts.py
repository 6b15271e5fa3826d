"""The parts of a group: what was asked for first, and what its verdicts asked for after that.

The column `part` says what a completion is in its group:

    ""         sampled at once; of a group without follow-ups all are
    replaces   the learner gets these instead of the first, which are *drafts* then
    joins      the learner gets these beside the first
    probe      a continuation of the first tokens of another completion, to measure what they are
               worth; it is never logged

What joins may continue a completion too, whose first `guidance_length` tokens it was given; the
column `continues` has the index of that completion. Such a group is a tree: each token of it was
sampled once, and is trained once, in the completion that it was sampled in.

A probe has the index of the completion that it continues, and so many first tokens of it as its
`guidance_length` says. `folded` makes *branches* of probes: at which token, the mean reward of the
continuations from there, and of how many. They are entries of the column `branches` of the
completion. So a log has what probes have shown, and not their tokens. It also has when the last of
them ended, and which walls of the sandbox their programs touched.

`prompt_ids` is what a completion is trained behind. Where it was sampled behind something else,
the column `sampled_behind` has that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from common.record.turns import sampled_lengths

FIRST, REPLACES, JOINS, PROBE = "", "replaces", "joins", "probe"

BRANCH = pa.struct(
    [
        pa.field("at", pa.int32(), nullable=False),  # tokens of the completion before it
        pa.field("value", pa.float32()),  # mean reward of what went on from there; null: none has
        pa.field("error", pa.float32()),  # standard error of that mean; null for fewer than two
        pa.field("count", pa.int32(), nullable=False),  # continuations with a reward
        pa.field("probes", pa.int32(), nullable=False),  # continuations
        pa.field("tokens", pa.int32(), nullable=False),  # of all of them
        pa.field("newest", pa.int32(), nullable=False),  # version that any was sampled with
        pa.field("finished_s", pa.float64()),  # of the last of them; null before log version 10
        pa.field("suspicious", pa.list_(pa.string())),  # of each that touched a wall; likewise
    ]
)


@dataclass(frozen=True)
class Aside:
    """Completions of a group that were sampled and by design are not trained on."""

    completions: int
    tokens: int


NOTHING = Aside(0, 0)


def learnt(group: pa.RecordBatch) -> pa.RecordBatch:
    """The completions that the learner gets of a group; `group` itself where that is all."""
    replaced = _parts(group) == REPLACES
    return group.filter(pa.array(replaced)) if replaced.any() else group


def drafts(group: pa.RecordBatch) -> Aside:
    """The first completions of a group, where others have taken their place."""
    parts = _parts(group)
    if not (parts == REPLACES).any():
        return NOTHING
    return _sum(group, parts != REPLACES)


def probes(group: pa.RecordBatch) -> Aside:
    """The continuations that the branches of a group were made of."""
    if (found := _branches(group)) is None:
        return NOTHING
    return Aside(*(pc.sum(pc.struct_field(found, name)).as_py() for name in ("probes", "tokens")))


def newest_probe(group: pa.RecordBatch) -> int:
    """The newest version that a probe of a group was sampled with; -1 without any."""
    if (found := _branches(group)) is None:
        return -1
    return int(pc.max(pc.struct_field(found, "newest")).as_py())


def last_probe_s(group: pa.RecordBatch) -> float:
    """When the last probe of a group ended, Unix time; minus infinity where that is not known."""
    if (found := _branches(group)) is None:
        return -math.inf
    last = pc.max(pc.struct_field(found, "finished_s")).as_py()
    return -math.inf if last is None else float(last)


def suspicious_probes(group: pa.RecordBatch) -> tuple[str, ...]:
    """The walls that each probe touched which touched any, as in the column `suspicious`."""
    if (found := _branches(group)) is None:
        return ()
    return tuple(pc.list_flatten(pc.struct_field(found, "suspicious")).to_pylist())


def logged_tokens(group: pa.RecordBatch) -> int:
    """What the ledger books of a group: its sampled tokens, and those of its probes."""
    return int(sampled_lengths(group).sum()) + probes(group).tokens


def folded(group: pa.RecordBatch) -> pa.RecordBatch:
    """A group without its probes, whose values are branches now.

    A probe without a reward is in no mean.
    """
    are_probes = _parts(group) == PROBE
    if not are_probes.any():
        return group
    lengths_G = sampled_lengths(group)
    found: dict[tuple[int, int], list[_Probe]] = defaultdict(list)
    names = (
        *("completion_index", "guidance_length", "reward", "weight_versions"),
        *("finished_s", "suspicious"),
    )
    rows = list(zip(*(group.column(name).to_pylist() for name in names), strict=True))
    dispatched = group.column("dispatch_version")[0].as_py()
    for row in np.flatnonzero(are_probes):
        index, at, reward, versions, *ended = rows[row]
        newest = max(versions, default=dispatched)
        found[index, at].append(_Probe(reward, int(lengths_G[row]), newest, *ended))
    kept = group.filter(pa.array(~are_probes))
    branches: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for (index, at), probed in sorted(found.items()):
        branches[index].append(_branch(at, probed))
    place = kept.schema.get_field_index("branches")
    field = kept.schema.field(place)
    indices = kept.column("completion_index").to_pylist()
    return kept.set_column(place, field, pa.array([branches[i] for i in indices], field.type))


class _Probe(NamedTuple):
    reward: float | None
    tokens: int
    newest: int
    finished_s: float
    suspicious: str


def _branch(at: int, probed: list[_Probe]) -> dict[str, Any]:
    rewards = np.array([probe.reward for probe in probed if probe.reward is not None])
    several = len(rewards) > 1
    return {
        "at": at,
        "value": float(rewards.mean()) if len(rewards) else None,
        "error": float(rewards.std(ddof=1) / len(rewards) ** 0.5) if several else None,
        "count": len(rewards),
        "probes": len(probed),
        "tokens": sum(probe.tokens for probe in probed),
        "newest": max(probe.newest for probe in probed),
        "finished_s": max(probe.finished_s for probe in probed),
        "suspicious": [probe.suspicious for probe in probed if probe.suspicious],
    }


def _branches(group: pa.RecordBatch) -> pa.Array | None:
    """All branches of a group; None where it has none, as most, of which nothing is to be summed.

    A call of `pyarrow.compute` costs more than all the rest of such a group.
    """
    if "branches" not in group.schema.names:  # logged before there were any
        return None
    found = group.column("branches").flatten()
    return found if len(found) else None


def _parts(group: pa.RecordBatch) -> npt.NDArray[Any]:
    if "part" not in group.schema.names:  # logged before there were any
        return np.full(group.num_rows, FIRST)
    return np.asarray(group.column("part").to_pylist(), dtype=object)


def _sum(group: pa.RecordBatch, which: npt.NDArray[np.bool_]) -> Aside:
    return Aside(int(which.sum()), int(sampled_lengths(group)[which].sum()))
