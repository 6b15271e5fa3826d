"""A script of tests against a program that is in another process.

The script's own interpreter is not the program's: each name that the script takes from the program
is a stand-in, which asks the program and returns plain values (`actors.verifiers.values`). So
`assert f(3) == 9` compares an integer of ours with an integer of ours, whatever the program made.

What such values cannot carry is the task's fault: a script that hands a function, an iterator or
an object of its own to the program cannot be judged here, and says so (`CANNOT_JUDGE`).

`run_script` forks: a script may do what it likes to its interpreter.
"""

from __future__ import annotations

import ast
import builtins
import os
import symtable
from collections.abc import Callable, Sequence
from typing import Any

from actors.verifiers.values import Handles, read_message, write_message

PASSED = "passed"
CANNOT_JUDGE = "cannot judge: "
"""Begins a report that says nothing of the program."""
_REPORT_CHARACTERS = 500
_ENDED = "it ended before its tests had"


class ProgramError(Exception):
    """The program raised an exception of its own; raised in its place in the script."""


class _Lost(BaseException):
    """The program ended, or answers nonsense: no `except Exception` of the script may hide it."""


class _NotPlainError(BaseException):
    """The script hands over what is no plain value; nor may the script hide that."""


class Link:
    """The program as the script's side asks it."""

    def __init__(self, questions: int, answers: int) -> None:
        self._questions, self._answers = questions, answers
        self._handles = Handles(lambda number: Remote(self, number), _number_of)

    def ask(
        self,
        kind: str,
        of: int,
        positional: tuple[Any, ...],
        named: dict[str, Any] | None = None,
        *,
        iterates: bool = False,
    ) -> Any:
        """One question. Raises what the program raised, as an exception of ours.

        Args:
            iterates: it asks an iterator, which may say that it is at its end.
        """
        try:
            given = self._handles.encode(list(positional)), self._handles.encode(named or {})
        except TypeError as error:
            raise _NotPlainError(str(error)) from error
        question = {"ask": kind, "of": of, "positional": given[0], "named": given[1]}
        try:
            write_message(self._questions, question)
            answer = read_message(self._answers)
            if answer is None:
                raise _Lost(_ENDED)
            if "raised" in answer:
                raised = _exception(answer["raised"], str(answer["text"]))
            else:
                _take_over(positional, self._handles.decode(answer["positional"]))
                return self._handles.decode(answer["value"])
        except BrokenPipeError as error:  # it ended before the question, not after
            raise _Lost(_ENDED) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise _Lost(f"it answers its tests with nonsense ({type(error).__name__})") from error
        if isinstance(raised, StopIteration) and not iterates:
            # It would end a loop of the script's over its tests, as `map` runs one.
            raise RuntimeError("the program raised StopIteration") from raised
        raise raised


class Remote:
    """An object of the program; equal to nothing of ours, whatever it says itself."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.ask("call", self._number, positional, named)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("attribute", self._number, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("assign", self._number, (name, value))

    def _method(self, name: str, *positional: Any) -> Any:
        """What the program's own method says; `getattr` would find the one of this class."""
        try:
            number = _number_of(self._link.ask("attribute", self._number, (name,)))
        except AttributeError as error:
            raise TypeError(f"the program's object has no {name}") from error
        if number is None:
            raise TypeError(f"the program's {name} is no method")
        return self._link.ask("call", number, positional, iterates=name == "__next__")

    def __eq__(self, other: object) -> bool:
        """Two objects of the program are equal when it says so; one of ours is another thing."""
        return isinstance(other, Remote) and self._method("__eq__", other) is True

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return int(self._method("__len__"))

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(self._method("__iter__")) if not self._iterates() else self

    def _iterates(self) -> bool:
        try:
            self._link.ask("attribute", self._number, ("__next__",))
        except AttributeError:
            return False
        return True

    def __next__(self) -> Any:
        return self._method("__next__")

    def __getitem__(self, key: Any) -> Any:
        return self._method("__getitem__", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._method("__setitem__", key, value)

    def __contains__(self, item: Any) -> bool:
        return self._method("__contains__", item) is True


def _number_of(value: Any) -> int | None:
    return object.__getattribute__(value, "_number") if type(value) is Remote else None


def _exception(names: list[str], text: str) -> Exception:
    """The nearest exception of Python's own that the program's is a kind of."""
    for name in names:
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception) and found is not Exception:
            try:
                return found(text)
            except TypeError:
                continue
    return ProgramError(f"{names[0] if names else ''}: {text}")


def _take_over(positional: tuple[Any, ...], afterwards: Any) -> None:
    """Lists, dictionaries and sets that were handed over, as the program left them."""
    if not isinstance(afterwards, list) or len(afterwards) != len(positional):
        raise ValueError("the arguments did not come back")
    for ours, theirs in zip(positional, afterwards, strict=True):
        if type(ours) is not type(theirs):
            continue
        if isinstance(ours, list):
            ours[:] = theirs
        elif isinstance(ours, (dict, set)):
            ours.clear()
            ours.update(theirs)


def check_script(setup: str, script: str) -> None:
    """Raise `ValueError` when the tests of a prompt cannot be read."""
    for part, text in (("setup", setup), ("script", script)):
        try:
            compile(text, part, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"the {part} of the tests is no Python: {error}") from error


def wanted_names(script: str) -> list[str]:
    """The names that a script uses and does not define."""
    used, defined = set[str](), set(vars(builtins))
    waiting = [symtable.symtable(script, "script", "exec")]
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        top = table.get_type() == "module"
        for symbol in table.get_symbols():
            if symbol.is_global() or top:
                used.add(symbol.get_name())
            made = symbol.is_assigned() or symbol.is_imported()
            if made and (top or symbol.is_declared_global()):
                defined.add(symbol.get_name())
    return sorted(used - defined)


def unfinished_names(setup: str) -> set[str]:
    """Functions and classes of a setup that the program is to fill in: with a docstring alone."""
    return {
        node.name
        for node in ast.parse(setup).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and all(_says_nothing(part) for part in node.body)
    }


def _says_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def run_script(
    setup: str, script: str, questions: int, answers: int, report: int, others: Sequence[int]
) -> int:
    """Fork a process that runs the tests and writes to `report` what failed, or `PASSED`.

    Args:
        questions: descriptor that questions to the program are written to.
        answers: descriptor that its answers are read from.
        others: descriptors of the program's ends, to be closed in the new process.

    Returns: its process id. The caller waits for it.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        for descriptor in others:
            os.close(descriptor)
        os.write(report, _outcome(lambda: _run(setup, script, Link(questions, answers))).encode())
    finally:
        os._exit(0)


def _run(setup: str, script: str, link: Link) -> None:
    space: dict[str, Any] = {"__name__": "tests"}
    exec(compile(setup, "setup", "exec", dont_inherit=True), space)
    missing = unfinished_names(setup)
    for name in wanted_names(script):
        if name in missing or name not in space:
            space[name] = link.ask("name", -1, (name,))
    exec(compile(script, "tests", "exec", dont_inherit=True), space)


def _outcome(run: Callable[[], None]) -> str:
    try:
        run()
    except _Lost as lost:
        return str(lost)
    except _NotPlainError as error:
        return CANNOT_JUDGE + str(error)
    except BaseException as error:  # of the script: nothing else runs in this process
        return f"a test failed: {type(error).__name__}: {error}"[:_REPORT_CHARACTERS].rstrip(": ")
    return PASSED
