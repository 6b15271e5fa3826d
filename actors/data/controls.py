"""Control tokens that are spelled in a text stay text.

A chat template writes its own control tokens, `<|im_end|>` and the like. Where a user, a tool or a
file spells one, it must not become that token, or anybody could end a turn and begin another.
`Controls.hide` puts a word in the place of every such spelling before the template is applied, and
`Controls.encode` encodes what stood there letter by letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

_MARK = "grpolambdamark"
"""Letters that no template and no tokenizer treats in a way of its own."""

_Said = TypeVar("_Said")


class Encoder(Protocol):
    """A tokenizer, called on texts."""

    def __call__(self, text: list[str], add_special_tokens: bool, **kwargs: Any) -> Any: ...


def control_tokens(tokenizer: Any) -> list[str]:
    """All special tokens of a tokenizer, those too that have no name in it.

    Llama 3's `<|start_header_id|>` is such a one: it is special, and no attribute says so.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)]


class Controls:
    """The control tokens that what is said must not become."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(token for token in tokens if len(token) > 1)
        # Longest first: one may begin with another. The mark too, lest a text hold one of ours.
        spelled = sorted(self.tokens | {_MARK}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spelled)))

    def hide(self, said: _Said) -> tuple[_Said, dict[str, str]]:
        """`said`, a text or messages, with a word in place of every control token it spells.

        Returns:
            what is left, and what each word stands for; empty where nothing was spelled.
        """
        words: dict[str, str] = {}

        def word(found: re.Match[str]) -> str:
            chosen = f"{_MARK}{len(words)}x"
            words[chosen] = found[0]
            return chosen

        def hidden(part: Any) -> Any:
            if isinstance(part, str):
                return self._pattern.sub(word, part)
            if isinstance(part, Mapping):
                return {key: hidden(value) for key, value in part.items()}
            if isinstance(part, Sequence):
                return [hidden(value) for value in part]
            return part

        return cast("_Said", hidden(said)), words

    def encode(
        self, encoder: Encoder, text: str, words: Mapping[str, str], add_special_tokens: bool
    ) -> list[int]:
        """Token ids of a rendered text; what `words` stand for becomes no control token."""
        if not words:
            return _ids(encoder, text, add_special_tokens)
        ids: list[int] = []
        for number, part in enumerate(re.split(f"({'|'.join(words)})", text)):
            if part in words:
                ids += _letters(encoder, words[part])
            else:
                ids += _ids(encoder, part, add_special_tokens and number == 0)
        return ids


def _letters(encoder: Encoder, spelled: str) -> list[int]:
    ids = _ids(encoder, spelled, False, split_special_tokens=True)
    if len(ids) == 1:  # tokenizers split special tokens alone, and others can mark a role too
        halves = (spelled[:1], spelled[1:])
        return [id_ for half in halves for id_ in _ids(encoder, half, False)]
    return ids


def _ids(encoder: Encoder, text: str, add_special_tokens: bool, **kwargs: Any) -> list[int]:
    ids: list[list[int]] = encoder([text], add_special_tokens=add_special_tokens, **kwargs)[
        "input_ids"
    ]
    return ids[0]
