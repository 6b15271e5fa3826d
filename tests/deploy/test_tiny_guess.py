"""The tiny model that guesses: its tokens, its template, its warm start's games."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest

from actors.environments.guess import FIRST_GAME, tasks
from actors.rendering.renderer import Renderer
from common.config.sections import DataConfig
from deploy.models.tiny_guess import build_guess_tokenizer, games


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_guess_tokenizer()


def test_a_game_is_a_token_a_sentence_and_can_be_appended_to(tokenizer: Any) -> None:
    renderer = Renderer.start(tokenizer, DataConfig(template="chat"), roles=["user"])
    told = "The secret is lower than 5. Next guess?"
    behind = renderer.behind([{"role": "user", "content": told}], ended=True)
    assert tokenizer.decode(behind) == f"<|user|>{told}<|end|><|assistant|>"
    assert len(behind) == 6
    prompt = [{"role": "user", "content": next(tasks())["prompt"]}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert len(tokenizer(text)["input_ids"]) == 15


@pytest.mark.parametrize("careful", [0.0, 1.0])
def test_careful_games_heed_what_was_said_and_hasty_ones_do_not(
    tokenizer: Any, careful: float
) -> None:
    heeded, guesses = 0, set[str]()
    rows = list(islice(games(tokenizer, 3, careful), 600))
    for given, guess in rows:
        low, high = 1, 8
        for side, said in re.findall(r"is (higher|lower) than (\d)", given):
            if side == "higher":
                low = max(low, int(said) + 1)
            else:
                high = min(high, int(said) - 1)
        heeded += low <= int(guess) <= high
        guesses.add(guess)
    assert guesses == set("12345678")
    assert heeded == 600 if careful else heeded < 500
    assert max(given.count("<|assistant|>") for given, _ in rows) == 4


def test_no_game_of_the_warm_start_is_asked_again(tokenizer: Any) -> None:
    named = {int(given.split()[1][:-1]) for given, _ in islice(games(tokenizer, 0, 0.5), 2000)}
    asked = {int(task["prompt"].split()[1][:-1]) for task in islice(tasks(), 800)}
    assert min(asked) == FIRST_GAME
    assert not named & asked
