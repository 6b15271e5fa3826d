"""Weights from device to device, with vLLM's own packers and encoders and no device at all.

Tensors are on `meta`: they have shapes and no memory. What would ask CUDA is answered here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.distributed.weight_transfer.packed_tensor as packed
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm_interfaces import BASE, INTERFACES, SOURCES, lacking, read

import common.weights.device_to_device as device_to_device
from common.supervision.calls import Handle
from common.weights.registry import TRANSPORTS
from common.weights.transport import Receivers, SendingRank

BF16 = torch.bfloat16
QWEN_7B = {"embed": (152_064, 3584), "norm": (3584,), "head": (152_064, 3584)}
"""Its largest tensors take 1.02 GiB each."""


class Weights:
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, BF16, shape) for name, shape in self._shapes.items()]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in self.shapes():
            yield name, torch.empty(shape, dtype=dtype, device="meta")


class Generator:
    """A generator's actor that takes down what it is told, and answers at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.infos: list[dict[str, Any]] = []

    def init_weight_transfer(self, info: dict[str, Any]) -> None:
        self.calls.append("init")
        self.infos.append(info)

    def begin_update(self) -> None:
        self.calls.append("begin")

    def receive_weights(self, info: dict[str, Any]) -> None:
        self.calls.append("receive")
        self.infos.append(info)

    def end_update(self, version: int) -> float:
        self.calls.append(f"end {version}")
        return 0.25

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not callable(found):
            return found
        return SimpleNamespace(remote=found)


def sending(shapes: dict[str, tuple[int, ...]], rank: int = 0) -> SendingRank:
    weights: Any = Weights(shapes)
    return SendingRank(rank, weights, 2**20, lambda _: None, lambda: ("10.0.0.1", 7))  # type: ignore[arg-type,return-value]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA as far as it is asked; what it was told."""
    told: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: told.append("synchronize"))
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    facts = SimpleNamespace(uuid="GPU-0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(
        torch, "empty", lambda *size, **to: empty(*size, **(to | {"device": "meta"}))
    )
    monkeypatch.setattr(packed, "reduce_tensor", lambda _: (None, cuda_handle()))
    monkeypatch.setattr(device_to_device, "get_all", lambda refs, _: list(refs))
    return told


def cuda_handle() -> tuple[Any, ...]:
    """Arguments of torch's `rebuild_cuda_tensor`, as `reduce_tensor` gives them."""
    storage = (torch.UntypedStorage, torch.uint8, 0, b"handle", 1024, 0, b"count", 0, b"event")
    return (torch.Tensor, (1024,), (1,), 0, *storage, True)


def sent_by_ipc(shapes: dict[str, tuple[int, ...]]) -> Generator:
    generator = Generator()
    receivers = Receivers([Handle(generator)], 1, 1.0)
    assert TRANSPORTS["ipc"].open(sending(shapes), receivers).send(3).stall_s == 0.25
    assert generator.calls[:2] == ["init", "begin"]
    assert generator.calls[-1] == "end 3"
    return generator


@pytest.mark.parametrize(
    "shapes", [QWEN_7B, {"a": (300, 7), "b": (5,)}, {"layer": (2**15, 2**14), "more": (2**14, 8)}]
)
def test_a_tensor_of_any_size_fits_the_buffer_of_ipc(
    shapes: dict[str, tuple[int, ...]], events: list[str]
) -> None:
    generator = sent_by_ipc(shapes)
    chunks = generator.infos[1:]
    assert [name for chunk in chunks for name in chunk["names"]] == list(shapes)
    assert [tuple(s) for chunk in chunks for s in chunk["shapes"]] == list(shapes.values())


def test_nothing_is_sent_before_the_optimiser_is_done(events: list[str]) -> None:
    """vLLM's packers run on streams of their own."""
    generator = Generator()
    sender = TRANSPORTS["ipc"].open(sending(QWEN_7B), Receivers([Handle(generator)], 1, 1.0))
    begun: list[int] = []
    generator.begin_update = lambda: begun.append(len(events))  # type: ignore[method-assign]
    sender.send(3)
    assert events[:1] == ["synchronize"]
    assert begun == [1]


def test_an_update_by_ipc_reaches_vllms_engine_process(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`AsyncLLM` sends it on by msgpack, which refuses the types of torch in a CUDA handle."""
    update = sent_by_ipc(QWEN_7B).infos[1]
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    with pytest.raises(TypeError, match="is not serializable"):
        MsgpackEncoder().encode({"update_info": update})
    for name, value in TRANSPORTS["ipc"].generator_environment.items():
        monkeypatch.setenv(name, value)
    arrived = MsgpackDecoder().decode(MsgpackEncoder().encode({"update_info": update}))
    assert arrived["update_info"]["names"] == update["names"]
    expected = [list(each) if isinstance(each, tuple) else each for each in cuda_handle()]
    assert arrived["update_info"]["ipc_handles"]["GPU-0"] == expected


def nccl_settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the learner's end of nccl is made with."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        WeightTransferTrainerFactory, "trainer_init", lambda init, **_: made.append(init)
    )
    TRANSPORTS["nccl"].open(sending(QWEN_7B), Receivers([], 2, 1.0))
    return made[0]


def streams_of_loads(num_buffers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The stream on which vLLM's receiver loads each tensor of a model of three packs."""
    current, loaded = [-1], {}

    @contextmanager
    def stream(number: SimpleNamespace) -> Iterator[None]:
        current[0] = number.index
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(
        packed,
        "_get_streams",
        lambda _, count: [SimpleNamespace(index=i, synchronize=lambda: None) for i in range(count)],
    )

    def load(weights: list[tuple[str, torch.Tensor]]) -> None:
        loaded.update({name: current[0] for name, _ in weights})

    packed.packed_nccl_broadcast_consumer(
        iterator=iter([(name, ([64], torch.uint8)) for name in ("q", "k", "v")]),
        group=SimpleNamespace(broadcast=lambda tensor, src: None),
        src=0,
        post_unpack_func=load,
        buffer_size_bytes=60,
        num_buffers=num_buffers,
        device="cpu",
    )
    return loaded


def test_a_fused_layer_is_received_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v come in three packs. vLLM 0.32 would fuse them before all are there."""
    settings = nccl_settings(monkeypatch)
    assert streams_of_loads(settings.packed_num_buffers, monkeypatch) == {"q": 0, "k": 0, "v": 0}
    assert len(set(streams_of_loads(2, monkeypatch).values())) == 2  # its default


def test_where_the_receiver_waits_by_itself_it_keeps_its_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, BASE, INTERFACES["0.33"]())
    settings = nccl_settings(monkeypatch)
    assert settings.packed_num_buffers == packed.DEFAULT_PACKED_NUM_BUFFERS
    assert (settings.master_address, settings.world_size) == ("10.0.0.1", 1)


@pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_interface_of_vllm_gets_the_weights(
    interface: Callable[[], Any], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, BASE, interface())
    weights = sending(QWEN_7B, rank)
    source = device_to_device._source(weights)
    for _ in range(2):  # each update reads it anew
        facts, tensors = read(source, rank)
        assert [(f.name, f.dtype, f.shape) for f in facts] == weights.weights.shapes()
        assert [(n, t.dtype, tuple(t.shape)) for n, t in tensors] == weights.weights.shapes()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_all_that_we_use_of_vllm_is_there(source: Callable[[str], str]) -> None:
    assert lacking(source) == {}
