"""The reference of configuration keys: complete, true, and in plain sentences."""

from __future__ import annotations

import re

import pytest
from config_reference import PAGE, Key, keys, with_reference
from docstrings import complaint, first_sentence

from common.config.keys import hints_of_keys
from common.config.load import load_config

KEYS = list(keys())
LONGEST = 32
"""Words of a first sentence."""


def test_the_reference_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert with_reference(text) == text, "run `python tests/support/config_reference.py`"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_has_a_sentence_that_stands_alone(key: Key) -> None:
    assert key.text, f"{key.name} has no docstring"
    sentence = first_sentence(key.text)
    assert sentence.endswith("."), sentence
    assert complaint(key.text) is None
    assert len(sentence.split()) <= LONGEST, sentence


def rows() -> dict[str, list[str]]:
    """Cells by key, read from the page and not from what made it."""
    part = PAGE.read_text().partition("<!-- configuration:")[2].partition("<!-- end of")[0]
    split = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in part.splitlines()]
    found = [[cell.replace(r"\|", "|") for cell in cells] for cells in split]
    return {cells[0].strip("`"): cells[1:] for cells in found if cells[0].startswith("`")}


def test_every_key_is_on_the_page() -> None:
    assert {name for name in rows() if "[]" not in name} == {key for key, _ in hints_of_keys()}


def test_the_defaults_on_the_page_are_the_defaults() -> None:
    defaults = {name: cells[1].strip("`") for name, cells in rows().items() if "[]" not in name}
    assert defaults.pop("model.path") == "to be set"
    overrides = [f"{name}={value}" for name, value in defaults.items()]
    assert load_config([], ["model.path=x", *overrides]) == load_config([], ["model.path=x"])
