"""What a process may ask of the kernel: filters of system calls (seccomp), and limits.

Filters need no privilege, stay for good, and hold for everything the process starts.

    close_network    for rules: no network socket, no connection, no io_uring
    only_internet    for commands in a network of their own: no socket of another family, for those
                     reach what is outside of it
    compute_only     for programs that a model wrote: the calls of `actors.sandbox.calls` and no
                     other, where a call that can name a process names only its caller

A call that `compute_only` refuses answers "permission denied". Where the kernel can (Linux 5.0),
each is also told to a watcher, who counts them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys

from actors.sandbox import calls
from actors.sandbox.kernel import gain_no_privileges, syscall
from common.errors import UserError

MAX_FILE_BYTES = 64 * 2**20
MAX_OPEN_FILES = 1024

_SET_FILTER, _NEW_LISTENER = 1, 8
_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, (0, 0x800, 0x80000, 0x80800)
_INTERNET = (2, 10, 16)
"""AF_INET, AF_INET6, and AF_NETLINK, which asks the kernel what addresses there are."""
_AUDIT_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF, on 32 bits
_ARCH, _NUMBER, _FIRST_ARGUMENT = 4, 0, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_ALLOW, _WATCHED, _ERROR = 0x7FFF0000, 0x7FC00000, 0x00050000
_REFUSE, _UNKNOWN = _ERROR | errno.EACCES, _ERROR | errno.ENOSYS

_CLONE_THREAD = 0x00010000
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FCNTL = (0, 1, 2, 3, 4, 1030)
"""Copies of a descriptor and its flags. Not its locks, and not whom it signals (F_SETOWN)."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Whether it is a terminal, bytes to read, blocking, closing at exec."""
_PRCTL = (15, 16, 0x53564D41)
"""The name of a thread, and of memory."""


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jump_true", ctypes.c_ubyte),
        ("jump_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_ushort),
        ("instructions", ctypes.POINTER(_Instruction)),
    )


_Rule = tuple[int, int, int, int]


def limit_files() -> None:
    """Bound the size of a file and the number of open ones."""
    lower_limit(resource.RLIMIT_FSIZE, MAX_FILE_BYTES)
    lower_limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)


def lower_limit(what: int, wanted: int) -> None:
    """Bound a resource for good by `wanted`, or by what it is bound to already."""
    hard = resource.getrlimit(what)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (limit, limit))


def can_filter() -> bool:
    """Whether this kernel filters system calls of this machine's kind."""
    if sys.platform != "linux" or platform.machine() not in _AUDIT_ARCHES:
        return False
    return os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def close_network(remedy: str = "if you trust them, set verifier.network=true") -> None:
    """From now on this process and what it starts open no network socket and connect to none.

    Pairs of sockets still work, and so do sockets of the file system that nobody connects to.

    Args:
        remedy: what the error tells a person to do.

    Raises:
        UserError: this system cannot do it.
    """
    _check_machine(remedy)
    special = calls.numbers(calls.REFUSED[calls.NETWORK])
    rules = _head()
    for name in ("io_uring_setup", "connect"):
        rules += [(_EQUAL, 0, 1, special[name]), (_RETURN, 0, 0, _REFUSE)]
    rules += _by_arguments(special["socket"], {0: (_AF_UNIX,)}, _REFUSE)
    rules.append((_RETURN, 0, 0, _ALLOW))
    _install(rules, remedy, 0)


def only_internet() -> None:
    """From now on this process and what it starts open sockets of the internet alone.

    In a network of its own (`actors.sandbox.network`) that is all it takes: sockets of the file
    system, of a virtual machine's host and the like do not belong to a network. Pairs of sockets
    still work.

    Raises:
        UserError: this system cannot do it.
    """
    remedy = "if you trust it, set environment.network=true"
    _check_machine(remedy)
    special = calls.numbers(calls.REFUSED[calls.NETWORK])
    rules = _head()
    rules += [(_EQUAL, 0, 1, special["io_uring_setup"]), (_RETURN, 0, 0, _REFUSE)]
    rules += _by_arguments(special["socket"], {0: _INTERNET}, _REFUSE)
    rules.append((_RETURN, 0, 0, _ALLOW))
    _install(rules, remedy, 0)


def compute_only(watched: bool = False) -> int | None:
    """From now on this thread, and what it starts, computes and does nothing else.

    It may read files, use the descriptors it has, and start threads. It starts no process, names
    none, and changes no file. Limits on memory, time and open files are the caller's.

    Args:
        watched: refused calls go to a watcher, who has to answer each (`actors.sandbox.watch`).

    Returns:
        The descriptor that the watcher listens on; None where this kernel has no watchers.

    Raises:
        UserError: this system cannot do it.
    """
    remedy = "evaluate code on Linux (x86_64 or aarch64) with seccomp"
    _check_machine(remedy)
    if watched:
        try:
            return _install(_compute_rules(_WATCHED), remedy, _NEW_LISTENER)
        except UserError:
            pass  # a kernel before 5.0, or a container that listens itself: refused all the same
    _install(_compute_rules(_REFUSE), remedy, 0)
    return None


def _compute_rules(refuse: int) -> list[_Rule]:
    special, own = calls.numbers(calls.BY_ARGUMENT), os.getpid()
    rules = _head()
    for number in calls.numbers(calls.ALLOWED).values():
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number in calls.numbers(calls.QUIET).values():
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    for name in ("clone3", "openat2"):
        rules += [(_EQUAL, 0, 1, special[name]), (_RETURN, 0, 0, _UNKNOWN)]
    for name, argument in (("open", 1), ("openat", 2)):
        if name in special:
            rules += _by_bit(special[name], argument, _FOR_WRITING, refuse, _ALLOW)
    rules += _by_bit(special["clone"], 0, _CLONE_THREAD, _ALLOW, refuse)
    streams = tuple(_SOCK_STREAM | flags for flags in _SOCK_FLAGS)
    allowed: tuple[tuple[str, dict[int, tuple[int, ...]], int], ...] = (
        ("kill", {0: (own,)}, refuse),
        ("tgkill", {0: (own,)}, refuse),
        ("prlimit64", {0: (0, own)}, refuse),
        ("fcntl", {1: _FCNTL}, refuse),
        ("socketpair", {0: (_AF_UNIX,), 1: streams}, refuse),
        ("ioctl", {1: _IOCTL}, _ERROR | errno.ENOTTY),
        ("prctl", {0: _PRCTL}, _ERROR | errno.EPERM),
    )
    for name, arguments, otherwise in allowed:
        rules += _by_arguments(special[name], arguments, otherwise)
    rules.append((_RETURN, 0, 0, refuse))
    return rules


def _head() -> list[_Rule]:
    """Load the call's number; refuse the calls of other architectures on the same machine."""
    return [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCHES[platform.machine()]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]


def _by_arguments(
    number: int, arguments: dict[int, tuple[int, ...]], otherwise: int
) -> list[_Rule]:
    """Allow the call `number` when each of its `arguments` is one of these values."""
    body: list[_Rule] = []
    for argument, values in arguments.items():
        body.append((_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument))
        body += [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
        body.append((_RETURN, 0, 0, otherwise))
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(body), number), *body]


def _by_bit(number: int, argument: int, bits: int, if_any: int, if_none: int) -> list[_Rule]:
    """Decide the call `number` by whether its argument has any of `bits`."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument),
        (_ANY_BIT, 0, 1, bits),
        (_RETURN, 0, 0, if_any),
        (_RETURN, 0, 0, if_none),
    ]


def _check_machine(remedy: str) -> None:
    if sys.platform != "linux" or platform.machine() not in _AUDIT_ARCHES:
        raise UserError(f"code cannot be confined on {sys.platform} {platform.machine()}: {remedy}")


def _install(rules: list[_Rule], remedy: str, flags: int) -> int:
    """Hand a filter to the kernel; returns 0, or the listener's descriptor."""
    program = (_Instruction * len(rules))(*[_Instruction(*rule) for rule in rules])
    filtered = ctypes.byref(_Program(len(rules), program))
    seccomp = calls.numbers(calls.BY_ARGUMENT)["seccomp"]
    try:
        gain_no_privileges()
        return syscall(seccomp, _SET_FILTER, flags, filtered)
    except OSError as error:
        raise UserError(
            f"code cannot be confined here (seccomp: {error.strerror}): {remedy}"
        ) from error
