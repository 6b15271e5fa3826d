"""A network of one process's own: nothing is in it but what the process itself listens on.

A socket stays in the network that it was made in, whoever holds it. So a process behind this wall
can listen, hand its listener to somebody outside, and be served at a loopback address that nobody
else can reach, while it reaches nothing else.
"""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import struct
from pathlib import Path

from actors.sandbox.kernel import syscall

_UNSHARE = {"x86_64": 272, "aarch64": 97}
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_SET_FLAGS, _UP = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP


def leave_network() -> None:
    """From now on this process, and what it starts, has a network with loopback alone.

    It needs the rights of root, or a kernel that gives users namespaces of their own.

    Raises:
        OSError: this host does not allow it.
    """
    number = _UNSHARE.get(platform.machine())
    if number is None:
        raise OSError(f"no namespaces on {platform.machine()}")
    user, group = os.getuid(), os.getgid()
    try:
        syscall(number, _NEW_NETWORK)
    except PermissionError:
        syscall(number, _NEW_USER | _NEW_NETWORK)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh", b"lo", _UP))
