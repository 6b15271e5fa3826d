"""Suites: YAML files of `deploy/configs/suites`, and the problems they describe.

`load_suite`: a checked `Suite`. `load_problems`: its questions as `Row`s of `actors.data.sources`,
prompt applied, with the reference its grader needs. How a record of a data set becomes a row is a
choice from `_ROWS`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.data.files import file_records
from actors.data.quarantine import Quarantine
from actors.data.schemas import Columns, Row, to_row
from actors.data.sources import hub_records, load_rows
from actors.verifiers.choice import LETTERS
from common.config.bounds import Count, Seconds, Seed, Temperature, check_bounds
from common.config.environment import ENVIRONMENT_RULE
from common.config.sections import (
    DataConfig,
    EnvironmentConfig,
    ReasoningGymConfig,
    VerifierSpec,
)
from common.errors import UserError, nearest
from deploy.eval import code_problems

SUITES = Path(__file__).resolve().parent.parent / "configs" / "suites"
_SLOT = "{question}"

Record = Mapping[str, Any]


@dataclass
class Suite:
    """One file of `deploy/configs/suites`; its name is the file's."""

    name: str = MISSING
    about: str = MISSING
    """One line."""
    source: Literal["hub", "file", "reasoning_gym"] = "hub"
    path: str | None = None
    """`hub`: a data set name, or a folder with a copy. `file`: a file of rows as training reads
    them (`actors.data.schemas`), from the suite's folder on."""
    subset: str | None = None
    split: str = "test"
    files: list[str] = field(default_factory=list)
    """`hub`: JSON lines in the repository that are read alone."""
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    """`size` counts the problems, all of them on the held-out side of `actors.data.held_out`."""
    rows: Literal["answer", "choice", "human_eval", "live_code_bench"] = "answer"
    question_column: str = "question"
    answer_column: str = "answer"
    wrong_columns: list[str] = field(default_factory=list)
    """`choice`: the other options."""
    prompt: str = _SLOT
    """The question's place is {question}; the chat template comes on top."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """What each question is played in, turn after turn. Without a name it is answered once."""
    grader: VerifierSpec = field(default_factory=lambda: VerifierSpec(name="math_answer"))
    """`environment` takes the reward of the environment; other rules judge the last turn."""
    verdict_timeout_s: Seconds = 10.0
    samples: Count = 1
    temperature: Temperature = 0.6
    """With more than one sample; one is greedy."""
    max_tokens: Count = MISSING
    """Longest answer in tokens; the longest episode where there is an environment."""
    problems: Count | None = None
    """How many there should be; another number is refused. None: not known."""
    seed: Seed = 0
    """Decides which questions are drawn, and the order of options."""
    license: str = MISSING
    """The licence of the data, as far as it is known."""
    unverified: str = ""
    """What nobody could check when the file was written."""


def known_suites() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """The suite called `name`, or that of a YAML file of your own.

    Raises: `UserError` for an unknown name or key, a wrong type, an impossible value or
    combination.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"--suite {name} is not known{nearest(name, known_suites())}; there are "
            f"{', '.join(known_suites())}, or give a YAML file of your own"
        )
    try:
        layer = OmegaConf.load(path)
        if not isinstance(layer, DictConfig):
            raise UserError(f"{path} must hold a mapping of keys")
        suite = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Suite), {"name": path.stem}, layer)
        )
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{path}: {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(suite, Suite)
    _check(suite, path)
    if suite.source == "file":
        suite.path = str(path.parent / str(suite.path))
    return suite


def _check(suite: Suite, path: Path) -> None:
    try:
        check_bounds(suite)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    wrong = [
        (suite.name != path.stem, f"name={suite.name} must be the file's, {path.stem}"),
        (_SLOT not in suite.prompt, f"prompt has no {_SLOT}, the question's place"),
        (suite.source == "hub" and not suite.path, "source=hub needs path, a data set name"),
        (suite.source == "file" and not suite.path, "source=file needs path, a file"),
        (
            suite.source == "file" and suite.rows != "answer",
            f"source=file and rows={suite.rows}: its rows are read as those of training",
        ),
        (
            (suite.rows == "choice") != bool(suite.wrong_columns),
            "rows=choice and wrong_columns, the other options, go together",
        ),
        (
            len(suite.wrong_columns) >= len(LETTERS),
            f"wrong_columns: at most {len(LETTERS) - 1} other options have a letter",
        ),
    ]
    for failed, reason in wrong:
        if failed:
            raise UserError(f"{path}: {reason}")


def load_problems(suite: Suite, data: str | None = None, limit: int | None = None) -> list[Row]:
    """The problems in their order, the first `limit` of them; `question` is the whole user message.

    Args:
        data: a .jsonl or .parquet file with the columns of the suite, instead of the hub.

    Raises: `UserError` when they cannot be had, or a record is not as the suite says.
    """
    if suite.source == "reasoning_gym":
        if data is not None:
            raise UserError(f"--data: {suite.name} draws its questions and reads no file")
        rows = _drawn(suite)
    else:
        rows = list(_read(suite, data))
        if not rows:
            raise UserError(f"{data or suite.path} has no rows")
        if suite.problems is not None and len(rows) != suite.problems:
            raise UserError(
                f"{suite.name} has {suite.problems} problems and {data or suite.path} has "
                f"{len(rows)} rows: it is not this suite's data, or only a part of it"
            )
    if limit is not None:
        if not 1 <= limit <= len(rows):
            raise UserError(f"--limit {limit} must lie in 1..{len(rows)}, the problems there are")
        rows = rows[:limit]
    return [_asked(suite, row) for row in rows]


def _asked(suite: Suite, row: Row) -> Row:
    """`row` with the suite's prompt around its question, which is the last turn of the user."""
    question, turns = suite.prompt.replace(_SLOT, row.question), list(row.messages)
    for place in reversed(range(len(turns))):
        if turns[place] == ("user", row.question):
            turns[place] = ("user", question)
            break
    return replace(row, question=question, messages=tuple(turns))


def _drawn(suite: Suite) -> list[Row]:
    gym = suite.reasoning_gym
    # One question for training, which is not used: the held-out ones are those of any run.
    config = DataConfig(reasoning_gym=ReasoningGymConfig(task=gym.task, params=gym.params, size=1))
    return load_rows(config, gym.size, suite.seed, Quarantine(0.0)).held_out


def _read(suite: Suite, data: str | None) -> Iterator[Row]:
    assert suite.path is not None
    if data is None and suite.source == "file":
        data = suite.path
    records = (
        file_records(data)
        if data is not None
        else hub_records(suite.path, suite.subset, suite.split, suite.files)
    )
    make = _ROWS[suite.rows]
    for place, record in records:
        if isinstance(record, UserError):
            raise record
        if suite.source == "file":
            yield _row_of_a_file(suite, place, record)
            continue
        try:
            question, reference = make(suite, record)
        except (KeyError, TypeError, ValueError) as error:
            found = ", ".join(record) or "none"
            raise UserError(
                f"{place} is not a row of {suite.name} (rows={suite.rows}): "
                f"{type(error).__name__}: {error}; its columns are {found}"
            ) from error
        yield Row(question, json.dumps({"prompt": question, **reference}), None, None, place)


def _answer_row(suite: Suite, record: Record) -> tuple[str, dict[str, Any]]:
    if not {suite.question_column, suite.answer_column} & record.keys():
        return _row_of_another_schema(record)
    answer = record[suite.answer_column]
    parts = answer if isinstance(answer, list) else [answer]
    if not parts or any(part is None or str(part).strip() == "" for part in parts):
        raise ValueError(f"column {suite.answer_column!r} is empty")
    return _text(record, suite.question_column), {"answer": ", ".join(map(str, parts))}


def _row_of_a_file(suite: Suite, place: str, record: Record) -> Row:
    """A row as training reads it: earlier turns are kept, and every column is in the reference."""
    named = (suite.question_column, suite.answer_column)
    question, answer = (name if name in record else None for name in named)
    answerless = suite.grader.name == ENVIRONMENT_RULE
    return to_row(Columns(question, answer, answerless=answerless), place, record)


def _row_of_another_schema(record: Record) -> tuple[str, dict[str, Any]]:
    """A copy of a suite's data as others wrote it (`actors.data.schemas`), such as verl's."""
    try:
        row = to_row(Columns(), "the row", record)
    except UserError as error:
        raise ValueError(str(error)) from error
    if row.messages:
        raise ValueError("it has more turns than the question")
    return row.question, {"answer": json.loads(row.reference)["answer"]}


def _choice_row(suite: Suite, record: Record) -> tuple[str, dict[str, Any]]:
    """Options in an order of the problem's own, the same in every call."""
    question = _text(record, suite.question_column).strip()
    right = _text(record, suite.answer_column).strip()
    options = [right, *(_text(record, column).strip() for column in suite.wrong_columns)]
    if options.count(right) > 1:
        raise ValueError("the right answer is among the wrong ones")
    random.Random(f"{suite.seed}/{question}").shuffle(options)
    listed = "\n".join(f"{LETTERS[i]}) {option}" for i, option in enumerate(options))
    answer = LETTERS[options.index(right)]
    return f"{question}\n\n{listed}", {"answer": answer, "options": options}


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} must be text, found {value!r:.40}")
    return value


_ROWS: dict[str, Callable[[Suite, Record], tuple[str, dict[str, Any]]]] = {
    "answer": _answer_row,
    "choice": _choice_row,
    "human_eval": lambda _, record: code_problems.human_eval(record),
    "live_code_bench": lambda _, record: code_problems.live_code_bench(record),
}
