"""Synchronous tiny runs give bitwise the numbers that were recorded before a redesign."""

from __future__ import annotations

import json
from typing import Any

import pytest
from golden_runs import (
    CASES,
    GOLDEN,
    ROOT,
    STEPS,
    Records,
    kind_of_processor,
    records_of,
    write_model,
)

COMMAND = "PYTHONPATH=. python tests/support/golden_runs.py record ROOT"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What is on record for this kind of processor."""
    file = GOLDEN / f"{kind_of_processor()}.json"
    if not file.is_file():
        pytest.skip(
            f"no losses are on record for {file.stem}: check out a commit that you trust at ROOT, "
            f"then run `{COMMAND}`"
        )
    recorded: dict[str, Any] = json.loads(file.read_text())
    return recorded


@pytest.fixture(scope="module")
def found(expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("golden")
    digest = write_model(folder / "model")
    assert digest == expected["model_sha256"], (
        "the untrained tiny model is another than the recorded one, so no loss can be compared: "
        f"if that is meant, check out the commit before the change at ROOT and run `{COMMAND}`"
    )
    return records_of(ROOT, folder / "model", folder)


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_bitwise_those_on_record(
    case: str, expected: dict[str, Any], found: Records
) -> None:
    recorded = expected["records"][case]
    assert len(recorded) == STEPS
    assert found[case] == recorded
