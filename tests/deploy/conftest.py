"""Fixtures that the tests of deploy/ share."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.models import resolve


@pytest.fixture(scope="session")
def empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no-models")


@pytest.fixture(autouse=True)
def no_model_is_built(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """A warm start takes a minute, and on a busy machine longer than any unit test may take.

    Who has the model in the cache would not notice. A fresh clone would: the deadline ends the
    test's process, whatever the test was about.
    """

    def refuse(folder: Path) -> None:
        pytest.fail(f"a unit test wants the built-in model {folder.stem}: give it a small folder")

    monkeypatch.setenv("GRPO_LAMBDA_CACHE", str(empty_cache))
    monkeypatch.setattr(resolve, "_BUILDERS", dict.fromkeys(resolve._BUILDERS, refuse))
