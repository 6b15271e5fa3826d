"""The page and a bounded sample of a run in one HTML file that needs no server and no network.

The ES modules are used as they are: put one behind the other in the order of their imports, with
the words `import` and `export` taken away. A module may therefore import only by name from its
own folder, and no two modules may give a name at their top level twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from common.errors import UserError
from deploy.inspector.query import rows
from deploy.inspector.run_data import RunData

STATIC = Path(__file__).resolve().parent / "static"
STEPS, GROUPS, POINTS = 20, 200, 2000
"""Bounds of the sample: the newest steps, their groups, and the points of a curve."""

_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)
_STYLE = '<link rel="stylesheet" href="static/style.css">'
_SCRIPT = '<script type="module" src="static/main.js"></script>'


def write_html(run: Path, file: Path, steps: int = STEPS, groups: int = GROUPS) -> None:
    """Write the page with the groups of the newest `steps` steps, at most `groups` of them.

    Raises:
        UserError: no run in `run`, a bound is not positive, or `file` cannot be written.
    """
    if steps < 1 or groups < 1:
        raise UserError(f"--steps {steps} --groups {groups}: both must be at least 1")
    html = single_file(sample(RunData(run), steps, groups))
    try:
        file.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


def sample(data: RunData, steps: int, groups: int) -> dict[str, Any]:
    """The data that the file embeds: facts, curves, rows of the table, and their groups."""
    facts = data.facts()
    chosen = newest(data.state.groups, steps, groups)
    details = [data.group(group_id) for group_id in chosen["group_id"].to_pylist()]
    series = data.series(facts["metrics"])
    longest = max((len(points) for points in series.values()), default=0)
    left_out = [
        f"This file holds {chosen.num_rows} of {facts['groups']} groups: those of the newest "
        f"{steps} steps, at most {groups}."
    ]
    if longest > POINTS:
        left_out.append(f"Curves show the newest {POINTS} of {longest} steps.")
    facts["notes"] = left_out + facts["notes"]
    facts["live"] = False
    shown = {key: points[-POINTS:] for key, points in series.items()}
    return {"facts": facts, "series": shown, "rows": rows(chosen), "details": details}


def newest(table: pa.Table, steps: int, groups: int) -> pa.Table:
    """Groups of the log that the newest `steps` steps trained on, and those never trained on that
    were dispatched as late. At most `groups`: those that were trained on come first, and among
    them the newest.
    """
    table = table.filter(pc.is_valid(table["segment"]))
    last = pc.max(table["step"]).as_py() or 0
    made_by = pc.coalesce(table["step"], pc.add(table["dispatch_version"], 1))
    table = table.filter(pc.greater(made_by, last - steps))
    return table.sort_by([("step", "descending"), ("group_id", "descending")]).slice(0, groups)


def single_file(embedded: dict[str, Any]) -> str:
    """The HTML text. Its security policy allows its own script and style, and nothing else."""
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    script = bundle("main.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    data = f'<script type="application/json" id="embedded">{as_inert_json(embedded)}</script>'
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    for mark, text in (
        ('<meta charset="utf-8">', f'<meta charset="utf-8">\n{meta}'),
        (_STYLE, f"<style>{style}</style>"),
        (_SCRIPT, f'{data}\n<script type="module">{script}</script>'),
    ):
        if page.count(mark) != 1:
            raise ValueError(f"index.html must have {mark} once")
        page = page.replace(mark, text)
    return page


def as_inert_json(value: Any) -> str:
    """JSON in which no HTML parser sees markup: ASCII, with `<`, `>` and `&` as escapes."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def bundle(entry: str) -> str:
    """One script out of `entry` and all modules that it imports."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order:
            for imported in _IMPORT.findall(_source(name)):
                visit(imported)
            order.append(name)

    visit(entry)
    parts = [_EXPORT.sub("", _IMPORT.sub("", _source(name))) for name in order]
    return "\n".join(parts)


def _source(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
