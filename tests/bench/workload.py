"""Work that is the same in every step: completions of one length, rewards that differ."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any


def without_end(model: Path, copy: Path) -> str:
    """The model with an end-of-text token it has never seen: every completion is as long.

    Its vocabulary has room beyond what its tokenizer knows, and training has made that unlikely.
    """
    from transformers import AutoTokenizer

    shutil.copytree(model, copy, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((copy / "config.json").read_text())
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    if tokenizer.eos_token_id >= config["vocab_size"]:
        raise ValueError(f"the vocabulary of {model} has no room for one more token")
    tokenizer.save_pretrained(copy)
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    return str(copy)


def coin(text: str, reference: dict[str, Any]) -> float:
    """A verifier: half of all texts pass, so that no group is without a gradient."""
    return float(zlib.crc32(text.encode()) % 2)
