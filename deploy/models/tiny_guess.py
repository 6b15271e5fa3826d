"""A tiny model that guesses numbers, turn after turn, and heeds what it is told only sometimes.

The game is `actors.environments.guess`: a number from 1 to 8, in four turns. First the model sees
careful games, whose guesses are drawn evenly from what is still possible. Then most games are
hasty: their guesses are drawn from all eight numbers, whatever was said. So the warm model can
follow what it is told, and often does not. What reinforcement learning has to find is in which turn
a guess is worth what: to heed what was said, and to halve.

Sentences of the game are single tokens, so that an episode is forty tokens long.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from actors.environments.base import Reply
from actors.environments.guess import HIGH, HIGHER, LOW, LOWER, NEXT, QUESTION, Guess
from deploy.models.tiny_model import END, build_model, build_tokenizer
from deploy.models.warm_start import Row, computing, learn

CAREFUL = 0.4
"""Share of careful games in the second phase."""
TURNS = 4
"""Guesses of a game."""

_WIDTH, _LAYERS = 64, 2
_CAREFUL_STEPS, _MIXED_STEPS, _BATCH = 200, 60, 160
_MIXED_RATE = 2e-3
_GAMES = (5000, 9999)
"""Numbers of the warm start's games; `actors.environments.guess` counts up from 1000."""
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_guess_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with a chat template, and a token for each sentence of the game."""
    tokenizer = build_tokenizer()
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    tokenizer.add_tokens([AddedToken(role, special=True) for role in roles], special_tokens=True)
    sentences = (QUESTION.format(low=LOW, high=HIGH), HIGHER, LOWER, NEXT)
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in sentences])
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def games(tokenizer: Any, seed: int, careful: float) -> Iterator[Row]:
    """The turns of games without end: what stands before a guess, and the guess.

    Args:
        careful: share of careful games.
    """
    draw, game = random.Random(seed), Guess()
    question = QUESTION.format(low=LOW, high=HIGH)
    while True:
        said = [_message("user", f"Game {draw.randint(*_GAMES)}. {question}")]
        game.reset({}, draw.randrange(2**32))
        heeds = draw.random() < careful
        for _ in range(TURNS):
            low, high = game.possible if heeds else (LOW, HIGH)
            guess = str(draw.randint(low, high))
            given = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            yield given, guess
            answer = game.step(Reply(guess))
            if answer.done:
                break
            said += [_message("assistant", guess), _message("user", answer.observation)]


def build_guess(folder: Path, seed: int = 0) -> None:
    """Write the warm-started model and its tokenizer into `folder`; half a minute on one core."""
    tokenizer = build_guess_tokenizer()
    model = build_model(tokenizer, seed, _WIDTH, _LAYERS)
    careful, mixed = games(tokenizer, seed, 1.0), games(tokenizer, seed, CAREFUL)
    with computing(1):  # it is too small to gain from a second thread
        learn(model, tokenizer, careful, _CAREFUL_STEPS, _BATCH, ends=True)
        learn(model, tokenizer, mixed, _MIXED_STEPS, _BATCH, ends=True, peak=_MIXED_RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
