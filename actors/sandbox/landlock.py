"""Landlock: which files a process may open, without privilege (Linux 5.13; docs.kernel.org,
userspace-api/landlock).

A process in a domain also reaches no process outside it by ptrace or /proc, and from ABI 6
(Linux 6.12) neither by signals nor by abstract sockets.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Sequence

from actors.sandbox.kernel import gain_no_privileges, syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on all machines
_ASK_VERSION, _PATH_BENEATH = 1, 1
_READ = 1 << 0 | 1 << 2 | 1 << 3
"""Execute, read files, list folders."""
_WRITE = 1 << 1
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_SCOPES = 1 << 0 | 1 << 1
"""Abstract sockets, signals."""
_SCOPES_SINCE = 6


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scopes", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """The kernel's version of Landlock; 0 without one, or where it is switched off."""
    if sys.platform != "linux":
        return 0
    try:
        return syscall(_CREATE, None, 0, _ASK_VERSION)
    except OSError:
        return 0


def restrict(readable: Sequence[str], writable: Sequence[str]) -> None:
    """From now on this thread, and what it starts, opens files below these paths only.

    Devices among the readable ones may be written too, as /dev/null is. Paths that are not there
    are left out.

    Raises:
        OSError: the kernel has no Landlock or refuses it.
    """
    version = abi()
    every = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    scopes = _SCOPES if version >= _SCOPES_SINCE else 0
    sizes = 24 if version >= _SCOPES_SINCE else 16 if version >= 4 else 8
    ruleset = syscall(_CREATE, ctypes.byref(_Ruleset(every, 0, scopes)), sizes, 0)
    try:
        for paths, allowed in ((readable, _READ), (writable, every)):
            for path in paths:
                _allow(ruleset, path, allowed, every)
        gain_no_privileges()
        syscall(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, allowed: int, every: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        mode = os.fstat(parent).st_mode
        if stat.S_ISCHR(mode):
            allowed |= _WRITE
        if not stat.S_ISDIR(mode):
            allowed &= _OF_FILES
        beneath = _Beneath(allowed & every, parent)
        syscall(_ADD, ruleset, _PATH_BENEATH, ctypes.byref(beneath), 0)
    finally:
        os.close(parent)
