"""How a generator lends weights to its worker, by name or by file, and what the worker refuses."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import WeightsError
from common.weights.buckets import Buffer, WeightBucket, check_bucket, pack_tensors, unpack_tensors
from common.weights.lending import MemoryFile, buffer_at, lend

TENSORS = {"a": torch.arange(5.0), "b": torch.ones(3, 7, dtype=torch.bfloat16)}


def bucket() -> WeightBucket[Buffer]:
    (made,) = pack_tensors(TENSORS.items(), 2**20)
    return made


@pytest.mark.parametrize("in_process", [True, False])
def test_what_was_lent_is_what_the_worker_loads(in_process: bool) -> None:
    packed = bucket()
    open_before = len(os.listdir("/proc/self/fd"))
    with lend(packed.buffer, in_process) as place:
        loaded = {name: t.clone() for name, t in unpack_tensors(packed, buffer_at(place))}
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_a_loan_ends_with_its_context() -> None:
    with lend(bucket().buffer, in_process=True) as place:
        pass
    with pytest.raises(WeightsError, match="not lent"):
        buffer_at(place)


def test_an_empty_file_is_refused() -> None:
    with (
        MemoryFile(np.empty(0, np.uint8)) as place,
        pytest.raises(WeightsError, match="is empty"),
    ):
        buffer_at(place)


@pytest.mark.parametrize("byte", [0, 19, -1])
def test_one_changed_byte_is_seen(byte: int) -> None:
    packed = bucket()
    packed.buffer[byte] ^= 1
    with pytest.raises(WeightsError, match="arrived damaged"):
        check_bucket(packed, packed.buffer)


def test_a_shorter_buffer_and_another_buckets_are_refused() -> None:
    packed = bucket()
    with pytest.raises(WeightsError, match="arrived damaged"):
        check_bucket(packed, packed.buffer[:-64])
    with pytest.raises(WeightsError, match="arrived damaged"):
        check_bucket(replace(packed, checksum=packed.checksum + 1), packed.buffer)
