"""Where a rank is reached: by its own host, by other hosts, and through which network interface.

The address is that under which Ray knows the node, and the loopback's where the cluster is this
machine. GLOO_SOCKET_IFNAME names another interface (`ray.interface` sets it). gloo by itself would
take the address of the host's name, which Debian and Ubuntu set to 127.0.1.1: ranks on other nodes
would wait for it until their deadline.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from common.errors import UserError
from common.supervision.calls import node_address

LOOPBACK = "127.0.0.1"
_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15
_ours: str | None = None
"""The interface that this process has chosen by itself."""


def host_address(ranks: int) -> str:
    """An address of this host that the other ranks can reach; alone, nobody else can."""
    return LOOPBACK if ranks == 1 else routable_address()


def routable_address() -> str:
    """An address of this host that other hosts can reach, if it has a network.

    Raises:
        UserError: the interface that was named has no address.
    """
    named = os.environ.get(_INTERFACE, "").split(",")[0]
    if named and named != _ours:
        address = address_of(named)
        if address is None:
            raise UserError(
                f"the network interface {named} (ray.interface or {_INTERFACE}) has no IPv4 "
                f"address on {socket.gethostname()}: name one of "
                f"{', '.join(name for _, name in socket.if_nameindex())}"
            )
        return address
    node = node_address()
    if node is not None:
        return node
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
        except OSError:  # no route at all: a host without a network
            return LOOPBACK
        return str(probe.getsockname()[0])


def free_address() -> tuple[str, int]:
    """This host as others reach it, and a port nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return routable_address(), probe.getsockname()[1]


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None where it has none, or is not there."""
    request = struct.pack("256s", interface.encode()[:_NAME_BYTES])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def have_gloo_meet_at(address: str) -> None:
    """Have this process's gloo groups use the interface of `address`, unless one is named."""
    global _ours  # noqa: PLW0603  # of the process, as the variable is
    if os.environ.get(_INTERFACE, _ours) != _ours:
        return
    for _, name in socket.if_nameindex():
        if address_of(name) == address:
            os.environ[_INTERFACE] = _ours = name
            return
