"""Questions and answers, from a reasoning-gym task, a file or a Hugging Face data set.

`load_rows`: training rows and held-out rows with no question in common. `file_records` and
`hub_records`: the records of a data set as they are, for whoever makes rows of them.
What is wrong with a row sends it into quarantine; what is wrong with the whole is a `UserError`.
Both name the place and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.data.files import file_records
from actors.data.held_out import is_held_out
from actors.data.quarantine import Quarantine
from actors.data.schemas import Columns, Row, named, to_row
from actors.verifiers.base import ReferenceCheck
from actors.verifiers.reasoning_gym import encode_entry, import_reasoning_gym
from common.config.sections import DataSetConfig, ReasoningGymConfig
from common.errors import UserError

_FRUITLESS_DRAWS = 1000
"""Draws in a row without a new question after which a task counts as exhausted."""


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows held out, which have no question in common."""

    train: list[Row]
    held_out: list[Row]
    removed: int
    """Rows that are in neither, since they ask what a row held out asks."""
    repeated: int = 0
    """Rows whose question stood in a row before."""
    contradicted: int = 0
    """Questions that are stored with more than one answer."""


def load_rows(
    config: DataSetConfig,
    held_out: int,
    seed: int,
    quarantine: Quarantine,
    checks: Sequence[ReferenceCheck] = (),
    screen: Callable[[list[Row]], list[Row]] = list,
    *,
    to_train: Callable[[list[Row]], list[Row]] = list,
    answerless: bool = False,
) -> Rows:
    """Training rows, and exactly `held_out` distinct held-out ones; bad rows to `quarantine`.

    Args:
        checks: raise `ValueError` for a reference that no completion could satisfy.
        screen: gives the rows that a prompt can be made of; all others are in quarantine then.
        to_train: likewise, of the training rows those that can be trained on. Which rows are held
            out does not depend on it.
        answerless: whether rows may be without an answer.

    Raises: `UserError` for anything wrong with the data, or too few of them.
    """
    found = _screened(config, held_out, seed, quarantine, checks, screen, answerless)
    train = to_train(found.train)
    if not train:
        quarantine.check()
        quarantine.refuse("no row is left to train on")
    return replace(found, train=train)


def _screened(
    config: DataSetConfig,
    held_out: int,
    seed: int,
    quarantine: Quarantine,
    checks: Sequence[ReferenceCheck],
    screen: Callable[[list[Row]], list[Row]],
    answerless: bool,
) -> Rows:
    if config.kind == "reasoning_gym":
        drawn = _draw_distinct(config.reasoning_gym, held_out, seed)
        quarantine.seen += len(drawn.train)
        screened = replace(drawn, train=screen(drawn.train), held_out=screen(drawn.held_out))
        if len(screened.held_out) < held_out or not screened.train:
            quarantine.refuse(f"questions of {config.reasoning_gym.task} cannot be used")
        return screened
    assert config.path is not None, "refused with the configuration"
    read = _read(config, config.path, config.split, quarantine, answerless)
    rows = screen(list(_checked(read, checks, quarantine)))
    others: list[Row] = []
    if config.eval_path is not None:
        of_file = config.kind == "file"
        path, split = (
            (config.eval_path, config.split) if of_file else (config.path, config.eval_path)
        )
        read = _read(config, path, split, quarantine, answerless)
        others = screen(list(_checked(read, checks, quarantine)))
    quarantine.check()
    if not rows:
        quarantine.refuse("no row is left to train on")
    if config.eval_path is None:
        return _split(rows, held_out, config.path)
    return _without(rows, _distinct(others), held_out, config.eval_path)


def _checked(
    rows: Iterator[Row], checks: Sequence[ReferenceCheck], quarantine: Quarantine
) -> Iterator[Row]:
    """The rows that can be graded."""
    for row in rows:
        reference = json.loads(row.reference)
        try:
            for check in checks:
                check(reference)
        except ValueError as error:
            quarantine.add(row.place, UserError(f"{row.place}: {error}"), reference)
        else:
            yield row


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
    found = _without(rows, distinct[len(distinct) - held_out :], held_out, name)
    return replace(found, removed=found.removed - held_out)


def _without(rows: list[Row], others: list[Row], held_out: int, name: str) -> Rows:
    if len(others) < held_out:
        raise UserError(
            f"{name} has {len(others)} distinct questions, fewer than eval.prompts={held_out}: "
            f"set eval.prompts={len(others)} or less"
        )
    others = others[:held_out]
    secret = {row.key for row in others}
    train = [row for row in rows if row.key not in secret]
    if not train:
        raise UserError(
            f"no training question is left: all of them are in {name} too; give data.eval_path "
            "other rows"
        )
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.key, set()).add(json.dumps(json.loads(row.reference)["answer"]))
    contradicted = sum(len(found) > 1 for found in answers.values())
    return Rows(train, others, len(rows) - len(train), len(rows) - len(answers), contradicted)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(row.key, row)
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


def first_rows(config: DataSetConfig, count: int) -> list[Row]:
    """At most `count` rows from the beginning of a file or a data set of the hub.

    Raises: `UserError`, the first one, where no row can be read.
    """
    assert config.path is not None, "refused with the configuration"
    quarantine = Quarantine(1.0)
    read = _read(config, config.path, config.split, quarantine)
    rows = list(itertools.islice(read, count))
    if not rows:
        quarantine.refuse(f"no row of {config.path} can be used")
    return rows


def together(each: Mapping[str, Rows]) -> Rows:
    """The rows of several data sets by name, one after the other; each row knows its own.

    A question that one of them holds out serves in no other.
    """
    secret = {row.key for rows in each.values() for row in rows.held_out}
    found = [
        replace(rows, train=[row for row in rows.train if row.key not in secret])
        for rows in each.values()
    ]
    empty = [name for name, rows in zip(each, found, strict=True) if not rows.train]
    if empty:
        raise UserError(
            f"no training question is left of {', '.join(empty)}: the others of data.sources hold "
            "them out"
        )
    removed = sum(len(rows.train) for rows in each.values()) - sum(len(r.train) for r in found)
    if list(each) == [""]:
        return found[0]
    return Rows(
        [named(row, name) for name, rows in zip(each, found, strict=True) for row in rows.train],
        [named(row, name) for name, rows in each.items() for row in rows.held_out],
        removed + sum(rows.removed for rows in found),
        sum(rows.repeated for rows in found),
        sum(rows.contradicted for rows in found),
    )


def _read(
    config: DataSetConfig, name: str, split: str, quarantine: Quarantine, answerless: bool = False
) -> Iterator[Row]:
    columns = Columns(
        config.prompt_column,
        config.answer_column,
        config.solution_column,
        config.difficulty_column,
        answerless,
    )
    if config.kind == "file":
        return _to_rows(columns, name, file_records(name), quarantine)
    records = hub_records(name, config.subset, split)
    return _to_rows(columns, f"{name} {split}", records, quarantine)


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
    columns: Columns, name: str, records: Iterator[tuple[str, Any]], quarantine: Quarantine
) -> Iterator[Row]:
    seen = quarantine.seen
    for place, record in records:
        quarantine.seen += 1
        if isinstance(record, UserError):
            quarantine.add(place, record)
            continue
        try:
            yield to_row(columns, place, record)
        except UserError as error:
            quarantine.add(place, error, record)
    if quarantine.seen == seen:
        raise UserError(f"{name} has no rows: check data.path and data.split")
