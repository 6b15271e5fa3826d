"""Records of a data set as questions: the schemas that data sets have, and columns by name.

    verl          prompt = messages, reward_model.ground_truth, data_source, extra_info
    TRL           prompt = text or messages, solution
    messages      OpenAI's: all turns, the last one of the assistant is the reference answer
    conversations ShareGPT's: the same with `from` and `value`
    columns       question and answer under the names that public data sets use

A name with dots goes into nested columns. Every column of a record that is not the prompt reaches
the verifiers in the reference, beside `prompt` and `answer`. Where an environment alone says what
an episode was worth, a row needs no answer.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.verifiers.final_answer import final_answer
from common.errors import UserError

Record = Mapping[str, Any]
Message = dict[str, str]
"""`role` and `content` of one turn."""

PROMPTS = (
    *("prompt", "messages", "conversations", "question", "problem", "query", "instruction"),
    "input",
)
"""Columns with the question, those looked at first first."""
ANSWERS = (
    *("reward_model.ground_truth", "answer", "ground_truth", "solution", "final_answer"),
    *("expected_answer", "gold", "target", "label", "completion", "output", "response"),
)
DATA_SET = "data_set"
"""Name in the reference of the row's data set, among several."""
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None: the first of `PROMPTS` or `ANSWERS` that is there."""

    prompt: str | None = None
    answer: str | None = None
    solution: str | None = None
    difficulty: str | None = None
    answerless: bool = False
    """Whether a row may be without an answer: nobody asks for it."""


@dataclass(frozen=True)
class Row:
    """One question. `place` says where it came from, for messages."""

    question: str
    """Text of the last turn of the user."""
    reference: str
    """What the verifiers are given, a JSON object."""
    solution: str | None
    difficulty: float | None
    place: str
    messages: tuple[tuple[str, str], ...] = ()
    """All turns as (role, content), where there are more than the question."""
    schema: str = ""
    """What was found where, in words."""
    source: str = ""
    """Name of its data set, among several."""
    answerless: bool = False
    """It has no answer, and needs none: it is a task of an environment."""

    @property
    def conversation(self) -> list[Message]:
        """All turns that the policy reads."""
        turns = self.messages or (("user", self.question),)
        return [{"role": role, "content": content} for role, content in turns]

    @property
    def record(self) -> dict[str, Any]:
        """What the verifiers are given."""
        found: dict[str, Any] = json.loads(self.reference)
        return found

    @property
    def key(self) -> str:
        """What makes two questions the same: the text of all turns, white space aside. Tasks
        without an answer are the same where their other columns are, too."""
        turns = self.messages or (("user", self.question),)
        texts = [" ".join(content.split()) for _, content in turns]
        return "\0".join([*texts, self.reference] if self.answerless else texts)


def named(row: Row, source: str) -> Row:
    """The row as one of the data set called `source`, which its verifiers are told."""
    reference = json.loads(row.reference) | {DATA_SET: source}
    return replace(row, source=source, reference=json.dumps(reference))


def to_row(columns: Columns, place: str, record: Record) -> Row:
    """A record as a row. Raises: `UserError` that names the place, the column and the key."""
    prompt = columns.prompt or _first(record, PROMPTS, place, "question", "data.prompt_column")
    turns, said = _turns(_value(record, prompt, "data.prompt_column", place), place, prompt)
    question = next((content for role, content in reversed(turns) if role == "user"), "")
    if not question.strip():
        raise UserError(f"{place}: column {prompt!r} is blank, or has no turn of the user")
    answer, found = _answer(columns, place, record, said)
    reference = {"prompt": question, "answer": answer, "task": None, "entry": None}
    used = {prompt, columns.answer or "answer", "prompt", "answer"}
    reference |= {name: value for name, value in record.items() if name not in used}
    if len(turns) > 1:
        reference["messages"] = [{"role": role, "content": text} for role, text in turns]
    solution = difficulty = None
    if columns.solution is not None:
        solution = _text(record, columns.solution, "data.solution_column", place)
    if columns.difficulty is not None:
        difficulty = _number(record, columns.difficulty, place)
    return Row(
        question,
        json.dumps(_plain(reference)),
        solution,
        difficulty,
        place,
        tuple(turns) if len(turns) > 1 else (),
        f"question in {prompt}, {f'answer in {found}' if found else 'no answer'}",
        answerless=not found,
    )


def _first(record: Record, names: Sequence[str], place: str, what: str, key: str) -> str:
    for name in names:
        if _reach(record, name) is not None:
            return name
    raise UserError(
        f"{place}: no column with the {what} (looked for {', '.join(names)}); its columns are "
        f"{', '.join(record) or 'none'}: name one with {key}"
    )


def _turns(value: Any, place: str, column: str) -> tuple[list[tuple[str, str]], str | None]:
    """The turns before the answer, and the answer where the last turn is the assistant's."""
    if isinstance(value, str):
        return [("user", _valid(value, place, column))], None
    if not isinstance(value, (list, tuple)) or not value:
        raise _wrong_type(place, column, "text or a list of messages", value)
    turns = [_turn(message, place, column) for message in value]
    if len(turns) > 1 and turns[-1][0] == "assistant":
        return turns[:-1], turns[-1][1]
    return turns, None


def _turn(message: Any, place: str, column: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise _wrong_type(place, column, "text or a list of messages", message)
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = _SHAREGPT.get(str(role), str(role))
    if role not in _ROLES:
        raise UserError(f"{place}: column {column!r} has a turn of {role!r}, none of {_ROLES}")
    if isinstance(content, list):  # parts, of which text can be read
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}: column {column!r} has parts that are no text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise _wrong_type(place, column, "messages with a text as content", content)
    return role, _valid(content, place, column)


def _answer(columns: Columns, place: str, record: Record, said: str | None) -> tuple[Any, str]:
    """The right answer, text where it is one thing, and in words where it was found; None and ""
    where there is none and none is needed."""
    if columns.answer is None and not any(_reach(record, name) is not None for name in ANSWERS):
        if said is not None:
            return final_answer(said) or said, "the last turn of the assistant"
        if record.get("tests") is not None:
            return None, "tests"
        if columns.answerless:
            return None, ""
    name = columns.answer or _first(record, ANSWERS, place, "answer", "data.answer_column")
    value = _value(record, name, "data.answer_column", place)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        turns, answer = _turns([{"role": "user", "content": ""}, *value], place, name)
        value = answer if answer is not None else turns[-1][1]
        value = final_answer(value) or value
    parts = value if isinstance(value, list) else [value]
    if not parts or any(_is_empty(part) for part in parts):
        if columns.answerless and columns.answer is None:
            return None, ""
        raise UserError(f"{place}: column {name!r} has no answer: {value!r:.40}")
    if isinstance(value, dict) or any(isinstance(part, (list, dict)) for part in parts):
        return value, name
    return ", ".join(map(_as_text, parts)), name


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reach(record: Record, column: str) -> Any:
    """The value of a column, also inside others; None where there is none."""
    if column in record:
        return record[column]
    found: Any = record
    for name in column.split("."):
        if not isinstance(found, dict) or name not in found:
            return None
        found = found[name]
    return found


def _value(record: Record, column: str, key: str, place: str) -> Any:
    value = _reach(record, column)
    if value is None and column not in record:
        raise UserError(
            f"{place}: no column {column!r} ({key}); its columns are {', '.join(record) or 'none'}"
        )
    return value


def _text(record: Record, column: str, key: str, place: str) -> str:
    value = _value(record, column, key, place)
    if not isinstance(value, str):
        raise _wrong_type(place, column, "text", value)
    return _valid(value, place, column)


def _valid(text: str, place: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: column {column!r} is no valid Unicode text: {error.reason}"
        ) from error
    return text


def _number(record: Record, column: str, place: str) -> float:
    value = _value(record, column, "data.difficulty_column", place)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _wrong_type(place, column, "a number", value)
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(
            f"{place}: column {column!r} is a number of {len(str(value))} digits, more than a "
            "difficulty can have"
        ) from error


def _plain(value: Any) -> Any:
    """A value as JSON holds it. Parquet has more: arrays, bytes, dates, decimals, NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # arrays and numbers of numpy
        return _plain(value.tolist())
    return str(value)


def _wrong_type(place: str, column: str, wanted: str, value: object) -> UserError:
    return UserError(
        f"{place}: column {column!r} must be {wanted}, "
        f"found a {type(value).__name__}: {value!r:.80}"
    )
