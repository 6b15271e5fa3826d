"""Questions and answers, from a reasoning-gym task, a file or a Hugging Face data set.

`load_rows`: training rows and held-out rows with no question in common. `file_records` and
`hub_records`: the records of a data set as they are, for whoever makes rows of them.
What is wrong with a row sends it into quarantine; what is wrong with the whole is a `UserError`.
Both name the place and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.data.held_out import is_held_out
from actors.data.quarantine import Quarantine
from actors.verifiers.reasoning_gym import encode_entry, import_reasoning_gym
from common.config.sections import DataConfig, ReasoningGymConfig
from common.errors import UserError

_FRUITLESS_DRAWS = 1000
"""Draws in a row without a new question after which a task counts as exhausted."""


@dataclass(frozen=True)
class Row:
    """One question. `place` says where it came from, for messages."""

    question: str
    reference: str
    solution: str | None
    difficulty: float | None
    place: str


@dataclass(frozen=True)
class Rows:
    """`held_out` and `train` have no question in common; `removed` training rows had."""

    train: list[Row]
    held_out: list[Row]
    removed: int


def load_rows(config: DataConfig, held_out: int, seed: int, quarantine: Quarantine) -> Rows:
    """Training rows, and exactly `held_out` distinct held-out ones; bad rows to `quarantine`.

    Raises: `UserError` for anything wrong with the data, or too few of them.
    """
    if config.source == "reasoning_gym":
        drawn = _draw_distinct(config.reasoning_gym, held_out, seed)
        quarantine.seen += len(drawn.train)
        return drawn
    assert config.path is not None, "refused with the configuration"
    read = _read_file if config.source == "file" else _read_hub
    rows = list(read(config, config.path, config.split, quarantine))
    others: list[Row] = []
    if config.eval_path is not None and config.source == "file":
        others = list(read(config, config.eval_path, config.split, quarantine))
    elif config.eval_path is not None:
        others = list(read(config, config.path, config.eval_path, quarantine))
    quarantine.check()
    if config.eval_path is None:
        return _split(rows, held_out, config.path)
    return _without(rows, _distinct(others), held_out, config.eval_path)


def question_key(question: str) -> str:
    """What makes two questions the same: their text, white space aside."""
    return " ".join(question.split())


def _split(rows: list[Row], held_out: int, name: str) -> Rows:
    """Hold out the last `held_out` distinct questions."""
    distinct = _distinct(rows)
    if len(distinct) <= held_out:
        raise UserError(
            f"{name} has {len(distinct)} distinct questions, too few to hold out "
            f"eval.prompts={held_out} and train on the rest: lower eval.prompts"
        )
    return _without(rows, distinct[len(distinct) - held_out :], held_out, name)


def _without(rows: list[Row], others: list[Row], held_out: int, name: str) -> Rows:
    if len(others) < held_out:
        raise UserError(
            f"{name} has {len(others)} distinct questions, fewer than eval.prompts={held_out}: "
            f"set eval.prompts={len(others)} or less"
        )
    others = others[:held_out]
    secret = {question_key(row.question) for row in others}
    train = [row for row in rows if question_key(row.question) not in secret]
    if not train:
        raise UserError(
            f"no training question is left: all of them are in {name} too; give data.eval_path "
            "other rows"
        )
    return Rows(train, others, len(rows) - len(train))


def _distinct(rows: Sequence[Row]) -> list[Row]:
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(question_key(row.question), row)
    return list(seen.values())


def _draw_distinct(config: ReasoningGymConfig, held_out: int, seed: int) -> Rows:
    """`size` training and `held_out` evaluation questions, distinct, each in the order drawn.

    `actors.data.held_out` says on which side a question stands, whatever the seed: what one run
    holds out, no other run and no warm start has seen.
    """
    if config.size < 1:
        raise UserError(f"data.reasoning_gym.size={config.size}: at least one prompt is needed")
    task = _create_task(config, config.size + held_out, seed)
    sides: dict[bool, dict[str, Row]] = {False: {}, True: {}}
    wanted = {False: config.size, True: held_out}
    index = fruitless = 0
    while fruitless < _FRUITLESS_DRAWS and any(len(sides[s]) < wanted[s] for s in sides):
        entry = task[index]
        index, fruitless = index + 1, fruitless + 1
        key = question_key(entry["question"])
        side = is_held_out(entry["question"])
        if key not in sides[side] and len(sides[side]) < wanted[side]:
            sides[side][key] = _task_row(config, entry, index - 1)
            fruitless = 0
    train, others = list(sides[False].values()), list(sides[True].values())
    if len(train) < config.size or len(others) < held_out:
        raise UserError(
            f"reasoning-gym task {config.task!r} with params {dict(config.params)} gave, in "
            f"{index} draws, {len(train)} distinct questions to train on and {len(others)} to hold "
            f"out; wanted are data.reasoning_gym.size={config.size} and eval.prompts={held_out}: "
            "lower what it cannot give, or widen data.reasoning_gym.params"
        )
    return Rows(train, others, 0)


def _create_task(config: ReasoningGymConfig, size: int, seed: int) -> Any:
    package = import_reasoning_gym()
    tasks: Mapping[str, tuple[Any, Any]] = package.factory.DATASETS
    if config.task not in tasks:
        near = difflib.get_close_matches(config.task, tasks, 3, 0.4)
        raise UserError(
            f"data.reasoning_gym.task={config.task!r} is none of reasoning-gym's {len(tasks)} tasks"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )
    own = {"seed", "size"} & config.params.keys()
    if own:
        raise UserError(
            f"data.reasoning_gym.params holds {', '.join(sorted(own))}: "
            "use the keys seed and data.reasoning_gym.size"
        )
    try:
        return package.create_dataset(config.task, seed=seed, size=size, **config.params)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        names = [field.name for field in dataclasses.fields(tasks[config.task][1])]
        known = ", ".join(name for name in names if name not in ("seed", "size"))
        raise UserError(
            f"reasoning-gym task {config.task!r} refused data.reasoning_gym.params="
            f"{dict(config.params)}: {error}. Its params are {known}"
        ) from error


def _task_row(config: ReasoningGymConfig, entry: dict[str, Any], index: int) -> Row:
    try:
        encoded = encode_entry(entry)
    except TypeError as error:
        raise UserError(
            f"reasoning-gym task {config.task!r} cannot be used: {error}; choose another "
            "data.reasoning_gym.task"
        ) from error
    reference = {
        "prompt": entry["question"],
        "answer": entry["answer"],
        "task": config.task,
        "params": dict(config.params),
        "entry": encoded,
    }
    place = f"{config.task} draw {index}"
    return Row(entry["question"], json.dumps(reference), None, None, place)


def _read_file(config: DataConfig, name: str, split: str, quarantine: Quarantine) -> Iterator[Row]:
    yield from _to_rows(config, name, file_records(name), quarantine)


def file_records(name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of a .jsonl or .parquet file, or (place, `UserError`) of a line that is none.

    Raises: `UserError` when there is no such file, or it is neither.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"data file {name} does not exist (looked in {Path.cwd()}): check data.path and "
            "data.eval_path"
        )
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise UserError(
            f"data file {name} is neither .jsonl nor .parquet: convert it to one of them"
        )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, object), or (place, why the line is none)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                yield place, _json_object(place, line.removeprefix(b"\xef\xbb\xbf"))
            except UserError as error:
                yield place, error


def _json_object(place: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte {error.start} is "
            f"0x{error.object[error.start]:02x}): save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: a {type(record).__name__}, not a JSON object")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {number}", record
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet: {error}; write it again, or give a .jsonl file"
        ) from error


def _read_hub(config: DataConfig, name: str, split: str, quarantine: Quarantine) -> Iterator[Row]:
    records = hub_records(name, config.subset, split)
    yield from _to_rows(config, f"{name} {split}", records, quarantine)


def hub_records(
    name: str, subset: str | None, split: str, files: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """(place, record) of a data set of the hub, or of a folder with a copy.

    `files`: JSON lines in the data set's repository that are read alone, as one split.
    Raises: `UserError` when it cannot be had.
    """
    import datasets

    try:
        data = _load_data_set(name, subset, split, files)
    except ConnectionError as error:
        raise UserError(
            f"data set {name!r} cannot be reached: {error}. Without a network, give data.path the "
            "folder of a copy (`datasets.save_to_disk`, or its Parquet files) "
            "or use data.source=file"
        ) from error
    except (
        *(ValueError, OSError, KeyError, datasets.exceptions.DatasetsError),
        RuntimeError,  # a data set that is a program: not run any more
    ) as error:
        raise UserError(
            f"data set {name!r} (subset {subset}, split {split!r}) cannot be loaded: "
            f"{error}. Check data.path, data.subset, data.split and data.eval_path; of a data set "
            "with a loading script take a copy as Parquet, or data.source=file"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        data = data[split]
    for number, record in enumerate(data):
        yield f"{name} {split} row {number}", record


def _load_data_set(name: str, subset: str | None, split: str, files: Sequence[str]) -> Any:
    """A hub data set, a folder of data files, or a folder that `save_to_disk` wrote."""
    import datasets

    if files:
        urls = [f"hf://datasets/{name}/{file}" for file in files]
        return datasets.load_dataset("json", data_files=urls, split="train")
    folder = Path(name).expanduser()
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return datasets.load_dataset(name, subset, split=split)
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(data)}")
        return data[split]
    return data


def _to_rows(
    config: DataConfig, name: str, records: Iterator[tuple[str, Any]], quarantine: Quarantine
) -> Iterator[Row]:
    seen = quarantine.seen
    for place, record in records:
        quarantine.seen += 1
        if isinstance(record, UserError):
            quarantine.add(place, record)
            continue
        try:
            yield _row(config, place, record)
        except UserError as error:
            quarantine.add(place, error, record)
    if quarantine.seen == seen:
        raise UserError(f"{name} has no rows: check data.path and data.split")


def _row(config: DataConfig, place: str, record: Mapping[str, Any]) -> Row:
    question = _text(record, config.prompt_column, "data.prompt_column", place)
    if not question.strip():
        raise UserError(f"{place}: column {config.prompt_column!r} is blank")
    answer = _value(record, config.answer_column, "data.answer_column", place)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise _wrong_type(place, config.answer_column, "text or a number", answer)
    reference = {"prompt": question, "answer": str(answer), "task": None, "entry": None}
    solution = difficulty = None
    if config.solution_column is not None:
        solution = _text(record, config.solution_column, "data.solution_column", place)
    if config.difficulty_column is not None:
        difficulty = _number(record, config.difficulty_column, place)
    return Row(question, json.dumps(reference), solution, difficulty, place)


def _value(record: Mapping[str, Any], column: str, key: str, place: str) -> Any:
    if column not in record:
        raise UserError(
            f"{place}: no column {column!r} ({key}); its columns are {', '.join(record) or 'none'}"
        )
    return record[column]


def _text(record: Mapping[str, Any], column: str, key: str, place: str) -> str:
    value = _value(record, column, key, place)
    if not isinstance(value, str):
        raise _wrong_type(place, column, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: column {column!r} is no valid Unicode text: {error.reason}"
        ) from error
    return value


def _number(record: Mapping[str, Any], column: str, place: str) -> float:
    value = _value(record, column, "data.difficulty_column", place)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _wrong_type(place, column, "a number", value)
    return float(value)


def _wrong_type(place: str, column: str, wanted: str, value: object) -> UserError:
    return UserError(
        f"{place}: column {column!r} must be {wanted}, "
        f"found a {type(value).__name__}: {value!r:.80}"
    )
