"""The watcher of a program's refused system calls: answers each with an error, and counts them.

The kernel holds the program in its call until the watcher has answered (seccomp_unotify(2)).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
from collections import Counter

from actors.sandbox import calls


class _Data(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_int),
        ("arch", ctypes.c_uint32),
        ("pointer", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


class _Notice(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("data", _Data),
    )


class _Answer(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint64),
        ("value", ctypes.c_int64),
        ("error", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    )


def _ioctl(number: int, size: int) -> int:
    """A request that is written and read, as SECCOMP_IOWR of linux/seccomp.h."""
    return 3 << 30 | size << 16 | ord("!") << 8 | number


_RECEIVE = _ioctl(0, ctypes.sizeof(_Notice))
_SEND = _ioctl(1, ctypes.sizeof(_Answer))
_PURPOSES: dict[int, str] = {}


def refuse_one(listener: int, touched: Counter[str]) -> None:
    """Answer the call that waits on `listener` with "permission denied", and count it by kind."""
    if not _PURPOSES:
        _PURPOSES.update(calls.purposes())
    notice = bytearray(ctypes.sizeof(_Notice))
    try:
        fcntl.ioctl(listener, _RECEIVE, notice)
    except OSError:
        return  # the program has ended in its call
    told = _Notice.from_buffer(notice)
    touched[_PURPOSES.get(told.data.number, calls.KERNEL)] += 1
    answer = bytearray(_Answer(told.id, 0, -errno.EACCES, 0))
    try:
        fcntl.ioctl(listener, _SEND, answer)
    except OSError:
        return
