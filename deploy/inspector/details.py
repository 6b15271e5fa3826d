"""One group with all its tokens as JSON, joined from the trajectory log and the credit log.

Numbers are the logged ones: float32 values in the fewest digits that give the same float32, and
null where they are not finite (a token outside the loss, one that guidance put there).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import UserError
from common.record.credit_log import credit_path, credit_rules, read_group_credit
from common.record.parts import FIRST, JOINS, REPLACES
from common.record.schema import REWARD_PREFIX, VERDICT_PREFIX
from deploy.inspector.measured import Segments, values_of_branches
from deploy.inspector.tokens import TokenTexts

Credit = dict[int, dict[str, Any]]
"""Rows of the credit log by completion index, as Arrow scalars."""

_OF_GROUP = ("prompt_id", "epoch", "reference", "dispatched_s")
_OF_COMPLETION = (
    "text",
    "finish_reason",
    "generator",
    "guidance_length",
    "reward",
    "accuracy",
    "suspicious",
    "feedback",
    "turns",
    *(f"environment_{name}" for name in ("verdict", "reason", "reward", "s")),
)
_TOKENWISE = {
    "advantage": "advantages",
    "trace_weight": "trace_weights",
    "logprob": "logprobs",
    "score": "scores",
    "value": "values",
}
"""Columns of the credit log with a number for every token, by what the page calls them."""
_OF_CREDIT = ("advantage", "token_weight", "trained", *_TOKENWISE.values())


def details(
    batch: pa.RecordBatch,
    credit: Credit,
    texts: TokenTexts | None,
    others: dict[str, Credit] | None = None,
    measured: dict[int, Segments] | None = None,
) -> dict[str, Any]:
    """The group's own facts and its completions. Each has `tokens`, with one list for a quantity.

    Args:
        batch: the group, under the trajectory schema.
        credit: by completion index, from `group_credit`.
        texts: None where tokens are shown by their ids.
        others: as `credit`, under other rules by name.
        measured: by completion index, from `group_values`.
    """
    others, measured = others or {}, measured or {}
    table = pa.Table.from_batches([batch]).sort_by("completion_index")
    verifiers = [
        name.removeprefix(REWARD_PREFIX)
        for name in table.column_names
        if name.startswith(REWARD_PREFIX)
    ]
    first = {name: table[name][0].as_py() for name in (*_OF_GROUP, "prompt_text")}
    replaced = REPLACES in table["part"].to_pylist()
    return first | {
        "verifiers": verifiers,
        "rules": list(others),
        "completions": [
            _completion(table.slice(row, 1), verifiers, credit, texts, others)
            | _of_its_part(table.slice(row, 1), replaced, first["prompt_text"])
            | {"measured": _measured(table.slice(row, 1), measured)}
            for row in range(table.num_rows)
        ],
    }


def _of_its_part(row: pa.Table, replaced: bool, prompt_text: str) -> dict[str, Any]:
    """What a completion is in a group of several parts, and its prompt where that is another."""
    part, own = row["part"][0].as_py(), row["prompt_text"][0].as_py()
    continues = row["continues"][0].as_py()
    name = {FIRST: "draft" if replaced else "", REPLACES: "follow-up"}.get(part, part)
    if part == JOINS and continues >= 0:
        name = f"goes on from #{continues}"
    own_prompt = own if own != prompt_text else ""
    return {"part": name, "continues": continues, "own_prompt": own_prompt}


def _measured(row: pa.Table, measured: dict[int, Segments]) -> Segments | None:
    """What was measured of a completion afterwards, else what the run itself has measured."""
    found = measured.get(row["completion_index"][0].as_py())
    if found is not None:
        return found
    length, reward = len(row["token_ids"][0]), row["reward"][0].as_py()
    return values_of_branches(row["branches"][0].as_py(), length, reward)


def other_credit(run: Path, group_id: int, step: int | None) -> dict[str, Credit]:
    """A group's credit under the other rules that `deploy.inspector.replay` was asked about."""
    if step is None:
        return {}
    rules = credit_rules(run, step)
    return {rule: _rows(read_group_credit(run, step, group_id, rule)) for rule in rules}


def group_credit(run: Path, group_id: int, step: int | None) -> tuple[Credit, str]:
    """A group's credit by completion index, and why there is none where it is empty."""
    if step is None:
        return {}, "no learner step has trained on this group"
    if not credit_path(run, step).is_file():
        return {}, f"step {step} has no credit on record: the credit log was off, or was removed"
    try:
        rows = read_group_credit(run, step, group_id)
    except UserError as error:
        return {}, str(error)
    found = _rows(rows)
    return found, "" if found else f"the credit log of step {step} does not have this group"


def _rows(rows: pa.Table) -> Credit:
    return {
        rows["completion_index"][row].as_py(): {name: rows[name][row] for name in _OF_CREDIT}
        for row in range(rows.num_rows)
    }


def _completion(
    row: pa.Table,
    verifiers: list[str],
    credit: Credit,
    texts: TokenTexts | None,
    others: dict[str, Credit],
) -> dict[str, Any]:
    index = row["completion_index"][0].as_py()
    value = {name: row[name][0].as_py() for name in _OF_COMPLETION}
    ids: list[int] = row["token_ids"][0].as_py()
    given = credit.get(index, {})
    lists = {
        quantity: _tokenwise(given.get(column), len(ids)) for quantity, column in _TOKENWISE.items()
    }
    return value | {
        "index": index,
        "verdicts": {
            name: {
                "reward": row[REWARD_PREFIX + name][0].as_py(),
                "verdict": row[VERDICT_PREFIX + name][0].as_py(),
            }
            for name in verifiers
        },
        "segments": [
            {"begin": each["begin"], "prompt": _text(each["prompt_ids"], texts)}
            for each in row["segments"][0].as_py()
        ],
        "seconds": row["finished_s"][0].as_py() - row["dispatched_s"][0].as_py(),
        "advantage": given["advantage"].as_py() if given else None,
        "token_weight": given["token_weight"].as_py() if given else None,
        "trained": given["trained"].as_py() if given else None,
        "rules": {
            rule: _under(found[index], len(ids)) for rule, found in others.items() if index in found
        },
        "tokens": {
            "id": ids,
            "text": None if texts is None else texts.texts(ids),
            "version": row["weight_versions"][0].as_py(),
            "in_loss": row["loss_mask"][0].as_py(),
            "behaviour_logprob": _shortest(row["behaviour_logprobs"][0]),
            **lists,
        },
    }


def _text(ids: list[int], texts: TokenTexts | None) -> str:
    """Tokens as text, or their ids where there is no tokenizer."""
    return " ".join(map(str, ids)) if texts is None else "".join(texts.texts(ids))


def _under(given: dict[str, pa.Scalar], length: int) -> dict[str, Any]:
    """What another rule would have given to a completion."""
    return {
        "advantage": given["advantage"].as_py(),
        "trained": given["trained"].as_py(),
        "tokens": {
            "advantage": _tokenwise(given["advantages"], length),
            "trace_weight": _tokenwise(given["trace_weights"], length),
        },
    }


def _tokenwise(values: pa.Scalar | None, length: int) -> list[float | None] | None:
    """[T] values, one a token; None where the completion has none.

    Raises:
        UserError: their number is not that of the completion's tokens.
    """
    if values is None or not values.is_valid:
        return None
    found = _shortest(values)
    if len(found) != length:
        raise UserError(
            f"the credit log has {len(found)} tokens for a completion of {length}: it is not that "
            "of this trajectory log"
        )
    return found


def _shortest(values: pa.ListScalar) -> list[float | None]:
    """[T] float32 values in the fewest digits that name them; null where not finite."""
    array = values.values.to_numpy(zero_copy_only=False).astype(np.float32)
    digits = array.astype("U16")  # NumPy prints the shortest decimal that reads back the same
    return [
        float(text) if finite else None
        for text, finite in zip(digits.tolist(), np.isfinite(array).tolist(), strict=True)
    ]
