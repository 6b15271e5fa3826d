"""The page of recipes: complete, and with the numbers that stand in the YAML and the results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import ListConfig, OmegaConf
from oracle_table import AGREES, RECORD
from recipe_pages import OVERRIDES, PAGE, RESULTS, rows_of, with_parts

from common.config.load import load_config
from deploy.command.presets import CONFIGS, RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def sections() -> dict[str, str]:
    parts = re.split(r"^## `(\w+)`: .+\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(section: str, header: str) -> list[list[str]]:
    """The cells of all rows under every header line that begins so."""
    found = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)*)", section, re.MULTILINE)
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for rows in found
        for row in rows.splitlines()
    ]


def keys(node: object, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix}
    return set().union(*(keys(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in node.items()))


def test_every_recipe_has_a_section_and_every_section_a_recipe() -> None:
    assert sorted(sections()) == NAMES
    assert PAGE.read_text().count("\n## `") == len(NAMES)


def test_every_recipe_says_with_whom_it_agrees() -> None:
    """TRL's rows carry a measured number; a difference beyond rounding has its reason."""
    assert sorted(AGREES) == NAMES
    rows = {row[0].strip("`"): row for row in table(PAGE.read_text(), "recipe \\| agrees")}
    measured = json.loads(RECORD.read_text())
    assert set(measured) <= set(NAMES)
    for name, (_, agrees, differs) in rows.items():
        assert agrees, name
        if name in measured:
            worst = max(measured[name].values())
            assert f"TRL 1.16 {worst:.0e}" in agrees
            assert worst < 1e-14 or differs != "-", name


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == with_parts(PAGE.read_text()), (
        "run python tests/support/recipe_pages.py"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_constants_are_those_of_the_yaml(name: str) -> None:
    """Read from the page, not from what made it."""
    shown = {key.strip("`"): value for key, value in table(sections()[name], "constant")}
    path = RECIPES / f"{name}.yaml"
    assert set(shown) == keys(OmegaConf.to_container(OmegaConf.load(path)))
    resolved = OmegaConf.structured(load_config([path], ["model.path=none"]))
    for key, text in shown.items():
        value = OmegaConf.select(resolved, key)
        if isinstance(value, ListConfig):
            assert json.loads(text) == OmegaConf.to_container(value)
        elif isinstance(value, bool | str):
            assert text in (str(value).lower(), json.dumps(value))
        elif OmegaConf.is_list(value):
            assert json.loads(text) == list(value)
        else:
            assert float(text) == value


@pytest.mark.parametrize("name", NAMES)
def test_the_measured_numbers_are_those_of_the_results(name: str) -> None:
    lines = [
        (path.stem, line) for path in RESULTS.glob("*.md") for line in path.read_text().splitlines()
    ]
    rows = table(sections()[name], "row")
    assert len(rows) == len(rows_of(name))
    for cells, (stem, label) in zip(rows, rows_of(name), strict=True):
        assert cells[0] == label
        assert (
            sum(line.startswith(f"| {' | '.join(cells)} |") for at, line in lines if at == stem)
            == 1
        )
    commands = {line.strip("`") for stem, line in lines if line.startswith("`python ")}
    found = re.findall(r"^Measured by `([^`]+)`", sections()[name], re.MULTILINE)
    assert set(found) <= commands
    assert bool(found) == bool(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_section_says_what_how_and_whence(name: str) -> None:
    text = sections()[name]
    written = (RECIPES / f"{name}.yaml").read_text()
    assert re.search(r"^Sources: .*(\[(P|R|3P|D|I)\b|ours)", text, re.MULTILINE)
    assert re.search(
        r"^    \S.*[=≤]|^    .*(highest|kept|weight of)", text, re.MULTILINE
    )  # formula
    papers = set(re.findall(r"\d{4}\.\d{5}", text))
    assert papers & set(re.findall(r"\d{4}\.\d{5}", written))
    command = text[text.rindex(".venv/bin/grpo-lambda") :].replace("\\\n", " ")
    words = shlex.split(command.partition("<!--")[0])
    overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
    config = load_config([Path(CONFIGS / "tiny.yaml")], overrides, RECIPES)
    assert config.recipe == name
    assert (name in OVERRIDES) == (len(overrides) > 1)
