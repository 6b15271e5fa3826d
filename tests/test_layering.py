"""What may import what, and how long a file or function may be: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from source_tree import PACKAGES, ROOT, sources, tree

import common
from common.weights.registry import TransportName

FORBIDDEN = {
    "common": {"actors", "learner", "deploy"},
    "actors": {"learner", "deploy"},
    "learner": {"actors", "deploy"},
    "deploy": set[str](),
}
MATHS = sorted(path.stem for path in (ROOT / "learner" / "algorithm").glob("[a-z]*.py"))
HEAVY = {"ray", "vllm", "transformers"}
FILE_LINES, FUNCTION_LINES = 400, 60


def imported(path: Path) -> Iterator[str]:
    """Modules named by any import in `path`, those inside functions and type checks included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> Iterator[Path]:
    """Files of ours that importing `path` runs, one step."""
    for name in imported(path):
        parts = name.split(".")
        for end in (len(parts), len(parts) - 1):
            candidate = ROOT.joinpath(*parts[:end]).with_suffix(".py")
            if parts[0] in PACKAGES and candidate.is_file():
                yield candidate
                break


def test_the_packages_are_those_of_this_repository() -> None:
    assert common.__file__ is not None
    assert Path(common.__file__).resolve().is_relative_to(ROOT)
    assert all(sources(package) for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_run_from_common_to_deploy(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_the_walls_do_not_know_what_stands_behind_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("actors/sandbox")
        for name in imported(path)
        if name.startswith("actors.") and not name.startswith("actors.sandbox")
    ]
    assert not wrong


@pytest.mark.parametrize("name", MATHS)
def test_the_maths_needs_neither_ray_nor_vllm_nor_transformers(name: str) -> None:
    waiting, seen = [ROOT / "learner" / "algorithm" / f"{name}.py"], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        heavy = {module.split(".")[0] for module in imported(path)} & HEAVY
        assert not heavy, f"{name} reaches {path.relative_to(ROOT)}, which imports {heavy}"
        waiting.extend(own_modules(path))


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_fit_on_a_screen(package: str) -> None:
    too_long = []
    for path in sources(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    too_long.append(f"{place} {node.name}: {length} lines")
    assert not too_long


CALLS = ROOT / "common" / "supervision" / "calls.py"
"""The one module that may call an actor's method by its name."""


@pytest.mark.parametrize("package", PACKAGES)
def test_calls_of_actors_name_their_method(package: str) -> None:
    """`ask(handle, Class.method, ...)`, which grep, IDE and mypy can follow."""
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        if path != CALLS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr in ("remote", "actor")
    ]
    assert not nameless


@pytest.mark.parametrize("package", PACKAGES)
def test_transports_are_known_by_their_facts(package: str) -> None:
    """`config.transport.needs_cuda`, not a comparison with a name."""
    compared = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Constant) and side.value in get_args(TransportName)
    ]
    assert not compared


def test_tests_share_what_is_in_support_and_nothing_else() -> None:
    """Who changes a test must not look for other tests that lean on it."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        leaning = [name for name in imported(path) if name.rpartition(".")[2].startswith("test_")]
        assert not leaning, f"{path.relative_to(ROOT)} imports {leaning}"
