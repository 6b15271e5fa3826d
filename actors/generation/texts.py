"""From the tokens of a completion to the text that verifiers read.

Special tokens stay, since models write their thoughts between some. Only what ends a completion is
left out: tokens of EOS and PAD behind it, and a stop text (`generator.stop`) with what its last
token says beyond it. The tokens of both stay in the trajectory: the policy has sampled them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.generation.engine import Completion


class Decoder(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> Any: ...


class Texts:
    """Decodes completions.

    Args:
        ends: tokens that end a completion.
        stop: `generator.stop`, texts and tokens.
    """

    def __init__(self, tokenizer: Decoder, ends: Sequence[int], stop: Sequence[str | int]) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset([*ends, *(one for one in stop if isinstance(one, int))])
        self._stops = [one for one in stop if isinstance(one, str)]

    def text(self, completion: Completion) -> str:
        """All that a completion says, guidance included."""
        token_ids, given = completion.token_ids, completion.guidance_length
        last = len(token_ids)
        while last > given and token_ids[last - 1] in self._ends:
            last -= 1
        text = self._decoded(token_ids[:last])
        if not self._stops:
            return text
        begin = len(self._decoded(token_ids[:given])) if given else 0
        return before_stop(text, self._stops, begin)

    def answer_span(self, completion: Completion, pattern: str) -> tuple[int, int]:
        """Tokens [begin, end) of the answer: of the last match of `pattern`; (0, 0) for none.

        A match that is of several groups is the first that took part, one of none all of it.
        """
        found = list(re.finditer(pattern, self.text(completion)))
        if not found:
            return 0, 0
        last = found[-1]
        group = next((n for n, text in enumerate(last.groups(), 1) if text is not None), 0)
        begin, end = last.span(group)
        ids = completion.token_ids
        return self._tokens_within(ids, begin), self._tokens_within(ids, end - 1) + 1

    def _tokens_within(self, token_ids: list[int], place: int) -> int:
        """The token that says the character at `place` of the text."""
        places = range(len(token_ids))
        return bisect_right(places, place, key=lambda n: len(self._decoded(token_ids[: n + 1])))

    def _decoded(self, token_ids: list[int]) -> str:
        # Tidying spaces up would change what a model wrote: `x != y` would be `x!= y`.
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def before_stop(text: str, stops: Sequence[str], begin: int = 0) -> str:
    """`text` up to the stop text that is complete first behind `begin`; all of it without one."""
    found = [(text.find(stop, begin), len(stop)) for stop in stops]
    ends = [(place + length, place) for place, length in found if place >= 0]
    return text[: min(ends)[1]] if ends else text


def ending_tokens(tokenizer: Any, folder: str) -> list[int]:
    """EOS and PAD of the tokenizer, and all EOS that the model's folder names.

    vLLM ends a completion at each of them: instruction-tuned models often have several.
    """
    found = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found.update(named if isinstance(named, list) else [named])
    return sorted(token for token in found if token is not None)
