"""The text of single tokens, by the tokenizer of the run itself.

`tokenizer.json` is looked for in the newest checkpoint, then where the configuration's model is:
its folder, the folder of built models, the hub's cache. Nothing is downloaded, built or run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from deploy.models.resolve import BUILTIN, cache_folder

FILE = "tokenizer.json"
REPLACEMENT = "\ufffd"
"""The sign that a decoder gives for bytes that are no whole character."""
_LONGEST_CHARACTER = 4
"""The most bytes of UTF-8, and so the most tokens, that one character takes."""
_WORD_START = "\u2581"
"""SentencePiece's mark of a leading space, which decoding a token alone drops."""


class Decoder(Protocol):
    """The methods of `tokenizers.Tokenizer` that are used here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...

    def id_to_token(self, id: int) -> str | None: ...

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Any: ...


class TokenTexts:
    """Looks up the text of tokens, and remembers it."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._replacement = tokenizer.encode(REPLACEMENT, add_special_tokens=False).ids
        """Tokens of U+FFFD. A text may hold it, and it decodes like bytes that make up nothing."""

    def texts(self, ids: list[int]) -> list[str]:
        """A text for each token.

        A character that several tokens make up stands at the first of them, and the others have
        an empty text. Bytes that make up no character are U+FFFD.
        """
        texts = [self._text(token) for token in ids]
        start = 0
        while start < len(ids):
            end = self._character(ids, texts, start) if REPLACEMENT in texts[start] else None
            if end is not None:
                texts[start:end] = [
                    self._decode(ids[start:end]),
                    *[""] * (end - start - 1),
                ]
            start = start + 1 if end is None else end
        return texts

    def _character(self, ids: list[int], texts: list[str], start: int) -> int | None:
        """End of the shortest span from `start` whose tokens make up whole characters."""
        itself = start + len(self._replacement)
        if self._replacement and ids[start:itself] == self._replacement:
            return itself
        for end in range(start + 2, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
            if REPLACEMENT not in texts[end - 1]:
                return None
            if REPLACEMENT not in self._decode(ids[start:end]):
                return end
        return None

    def _text(self, token: int) -> str:
        if token not in self._alone:
            piece = self._tokenizer.id_to_token(token)
            text = f"⟨{token}⟩" if piece is None else self._decode([token])
            if piece is not None and piece.startswith(_WORD_START) and not text.startswith(" "):
                text = f" {text}"
            self._alone[token] = text
        return self._alone[token]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(run: Path, model: str) -> tuple[TokenTexts | None, str]:
    """(texts, where the tokenizer was found), or (None, why there is none).

    Args:
        run: run directory.
        model: `model.path` of its configuration.
    """
    folders = sorted(run.glob("checkpoints/step-*"), key=_step, reverse=True)
    tried = [folder / FILE for folder in folders] + _of_model(model)
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        return None, f"no {FILE} in a checkpoint or with model.path={model}"
    try:
        return TokenTexts(Tokenizer.from_file(str(found))), str(found)
    except Exception as error:  # the tokenizers library raises nothing more specific
        return None, f"{found} cannot be read: {error}"


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _of_model(model: str) -> list[Path]:
    if model.startswith(BUILTIN):
        return [cache_folder() / model.removeprefix(BUILTIN) / FILE]
    folder = Path(model).expanduser()
    if folder.is_dir() or model.count("/") != 1 or model.startswith(("/", ".", "~")):
        return [folder / FILE]
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, FILE)
    return [Path(cached)] if isinstance(cached, str) else []
