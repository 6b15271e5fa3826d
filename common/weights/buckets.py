"""Model weights on the wire: tensors packed into byte buckets.

The learner packs tensors into contiguous byte buffers of bounded size. A `WeightBucket` says where
every tensor lies in its buffer, or in what stands for it: a reference, or a place. Readers get
views of the buffer, without a copy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from common.errors import WeightsError
from common.weights.staging import host_buffer, wait_for_copies

_ALIGNMENT = 64
"""Bytes; every tensor starts at a multiple, so that any dtype can be viewed in place."""

Buffer = npt.NDArray[np.uint8]
B = TypeVar("B")
C = TypeVar("C")


@dataclass(frozen=True)
class WeightBucket(Generic[B]):
    """Some tensors of one weight version. The sequences run over the bucket's tensors.

    Attributes:
        buffer: the bytes, or what stands for them.
        names: parameter names as in a Hugging Face checkpoint.
        dtypes: torch dtype names, e.g. `bfloat16`.
        shapes: full (unsharded) shapes.
        offsets: first byte of each tensor in the buffer.
        nbytes: size of the buffer.
        checksum: XXH3 of the buffer, 64 bits.
    """

    buffer: B
    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int
    checksum: int

    def at(self, buffer: C) -> WeightBucket[C]:
        """Return this bucket with another buffer, or another stand-in for it."""
        fields: dict[str, Any] = vars(self) | {"buffer": buffer}
        return WeightBucket(**fields)


def pack_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int
) -> Iterator[WeightBucket[Buffer]]:
    """Buckets in fresh buffers of at most `bucket_bytes`, in order.

    A tensor larger than `bucket_bytes` has a bucket of its own. Tensors are consumed one by one.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for name, tensor in tensors:
        nbytes = _aligned(tensor.numel() * tensor.element_size())
        if pending and filled + nbytes > bucket_bytes:
            yield _bucket(pending, filled)
            pending, filled = [], 0
        pending.append((name, tensor.detach().contiguous()))
        filled += nbytes
    if pending:
        yield _bucket(pending, filled)


def check_bucket(bucket: WeightBucket[Any], buffer: Buffer) -> None:
    """Raise `WeightsError` when `buffer` is not what the learner packed."""
    found = xxhash.xxh3_64_intdigest(buffer.data)
    if buffer.nbytes != bucket.nbytes or found != bucket.checksum:
        raise WeightsError(
            f"weight bucket {bucket.names[0]}..{bucket.names[-1]} arrived damaged: "
            f"{buffer.nbytes} bytes with checksum {found:#x}, "
            f"expected {bucket.nbytes} with {bucket.checksum:#x}"
        )


def unpack_tensors(bucket: WeightBucket[Any], buffer: Buffer) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) views of `buffer`, which may be read-only memory: do not write to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(buffer)
    for name, dtype_name, shape, offset in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True
    ):
        dtype = getattr(torch, dtype_name)
        yield (
            name,
            flat[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape),
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _bucket(tensors: list[tuple[str, torch.Tensor]], nbytes: int) -> WeightBucket[Buffer]:
    device = tensors[0][1].device
    target = host_buffer(nbytes, device)  # what lies between tensors is never read
    offsets = []
    offset = 0
    for _, tensor in tensors:
        flat = tensor.reshape(-1).view(torch.uint8)
        target[offset : offset + flat.numel()].copy_(flat, non_blocking=True)
        offsets.append(offset)
        offset += _aligned(flat.numel())
    wait_for_copies(device)
    buffer = target.numpy()
    return WeightBucket(
        buffer=buffer,
        names=tuple(name for name, _ in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        offsets=tuple(offsets),
        nbytes=nbytes,
        checksum=xxhash.xxh3_64_intdigest(buffer.data),
    )
