"""Calls of the Linux kernel that Python has no function for, and what the walls ask of prctl."""

from __future__ import annotations

import ctypes
import os
import signal

_PARENT_DEATH_SIGNAL, _DUMPABLE, _CHILD_SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38


def syscall(number: int, *arguments: object) -> int:
    """A system call by its number. Raises: `OSError` when the kernel refuses."""
    return _checked(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))


def gain_no_privileges() -> None:
    """No program that is run from here on has rights that this process lacks (sudo, ping).

    Filters of system calls and Landlock ask for it. Raises: as `syscall`.
    """
    _prctl(_NO_NEW_PRIVILEGES, 1)


def hide_memory() -> None:
    """Another process of this user reads neither our memory nor our environment."""
    _prctl(_DUMPABLE, 0)


def die_with_parent() -> None:
    """Be killed when the thread that forked us ends."""
    _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Processes below us whose own parent ends become our children."""
    _prctl(_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    _checked(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0))


def _checked(done: int) -> int:
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(done)
