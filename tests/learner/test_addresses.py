"""Addresses under which other hosts reach a rank, and the interface that collectives take."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from learner_models import save_tiny_model
from learner_ranks import worker

import learner.training.addresses as addresses
import learner.training.rank as rank
from common.errors import UserError
from common.weights.transport import Receivers, SendingRank
from learner.training.addresses import (
    address_of,
    have_gloo_meet_at,
    host_address,
    routable_address,
)


@pytest.fixture(autouse=True)
def _no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(addresses, "_ours", None)


class Probe:
    """A datagram socket on a host whose default route goes out of 10.1.2.3."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None: ...

    def bind(self, address: Any) -> None: ...

    def connect(self, address: Any) -> None: ...

    def getsockname(self) -> tuple[str, int]:
        return ("10.1.2.3", 4242)


def test_a_rank_alone_tells_generators_an_address_that_other_nodes_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be elsewhere, although no other rank is: nccl meets at the learner's rank 0."""
    told: list[tuple[str, int]] = []

    class Transport:
        def open(self, sending: SendingRank, receivers: Receivers) -> None:
            told.append(sending.agree_on_address())

    monkeypatch.setitem(rank.TRANSPORTS, "object_store", Transport())  # type: ignore[arg-type]
    with worker(save_tiny_model(tmp_path / "model")) as made:
        played = SimpleNamespace(socket=Probe, AF_INET=0, SOCK_DGRAM=0)
        monkeypatch.setattr(addresses, "socket", played)
        made.open_transport(Receivers([], 1, 1.0))
    assert told == [("10.1.2.3", 4242)]


def test_a_rank_alone_listens_for_itself_only() -> None:
    assert host_address(1) == "127.0.0.1"


def test_the_named_interface_is_the_one_that_others_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert routable_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(UserError, match=r"network interface ib7 \(ray\.interface .*: name one of"):
        routable_address()


def test_gloo_takes_the_interface_of_the_address_and_not_of_the_hosts_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {name: address_of(name) for _, name in socket.if_nameindex()}
    for name, address in names.items():
        if address is None:
            continue
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        have_gloo_meet_at(address)
        assert names[os.environ["GLOO_SOCKET_IFNAME"]] == address, name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    have_gloo_meet_at("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
