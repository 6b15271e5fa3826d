"""From a device to the host through pinned memory; the device is played by a subclass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash

import common.weights.buckets as buckets
from common.weights.buckets import check_bucket, pack_tensors, unpack_tensors
from common.weights.staging import to_host, wait_for_copies

CUDA = torch.device("cuda", 0)


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a CUDA device."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was pinned, copied without waiting, and waited for."""
    found: list[Any] = []
    empty, copy = torch.empty, torch.Tensor.copy_

    def pinned(*size: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
        found.append(("pinned" if pin_memory else "pageable", *size))
        return empty(*size, **given)

    def copied(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        found.append("begun" if non_blocking else "copied")
        return copy(self, source.as_subclass(torch.Tensor))

    stream = SimpleNamespace(synchronize=lambda: found.append("waited"))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return found


def test_what_leaves_a_device_goes_through_pinned_memory(events: list[Any]) -> None:
    original = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    arrived = to_host(on_device(original))
    wait_for_copies(CUDA)
    assert events == [("pinned", 12), "begun", "waited"]
    assert arrived.dtype == torch.bfloat16
    assert torch.equal(arrived, original)


def test_what_is_on_the_host_is_not_copied(events: list[Any]) -> None:
    original = torch.arange(6.0)
    assert to_host(original) is original
    wait_for_copies(original.device)
    assert events == []


def test_a_bucket_is_read_when_all_of_it_is_there(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum would be that of what the buffer held before."""
    digest = xxhash.xxh3_64_intdigest

    def checked(data: Any) -> int:
        events.append("read")
        return digest(data)

    monkeypatch.setattr(buckets.xxhash, "xxh3_64_intdigest", checked)
    tensors = {"a": torch.arange(5.0), "b": torch.arange(3)}
    (packed,) = pack_tensors([(n, on_device(t)) for n, t in tensors.items()], 1024)
    assert events == [("pinned", 128), "begun", "begun", "waited", "read"]
    check_bucket(packed, packed.buffer)
    for name, tensor in unpack_tensors(packed, packed.buffer):
        assert torch.equal(tensor, tensors[name])
