"""What a checkpoint's metadata may make when torch unpickles it: the classes of a checkpoint alone.

A pickle names the functions that it has called. So the metadata of a run that somebody sent could
run anything. They are read off its instructions here, before torch reads it; tensors and settings
are read by torch as plain values (`weights_only`).
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
    *(
        f"{_METADATA}.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
_TYPES = {
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
}
_ALLOWED |= {f"torch.{name}" for name in _TYPES}
_REFUSED = {"GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "REDUCE_EX"}


def check_metadata(path: Path) -> None:
    """Refuse metadata that would make anything but a checkpoint's description.

    Raises:
        UserError: it does, or cannot be read.
    """
    try:
        wrong = next((name for name in _named(path.read_bytes()) if name not in _ALLOWED), None)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read: {error}; the checkpoint is damaged") from error
    if wrong is not None:
        raise UserError(
            f"{path} would run {wrong}, which no checkpoint of this program needs: somebody has "
            "put it there. Do not use this run"
        )


def _named(pickled: bytes) -> Iterator[str]:
    """What a pickle names. An instruction that could hide a name is a name too."""
    memo: list[str | None] = []
    texts: list[str | None] = []  # what the last instructions pushed; None is no text
    for step, argument, _ in pickletools.genops(pickled):
        if step.name in _REFUSED:
            yield f"{step.name} {argument}"
        elif step.name == "STACK_GLOBAL":
            module, name = texts[-2:]
            yield f"{module}.{name}"
            texts.append(None)
        elif step.name == "MEMOIZE":
            memo.append(texts[-1])
        elif step.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            yield f"{step.name} {argument}"  # protocol 4, as torch writes it, has none
        elif step.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo[int(str(argument))])
        elif step.name.endswith("UNICODE"):
            texts.append(str(argument))
        elif step.name not in ("PROTO", "FRAME"):
            texts.append(None)


@contextmanager
def plain_values_only() -> Iterator[None]:
    """Inside, `torch.load` makes tensors and plain values, and calls nothing."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
