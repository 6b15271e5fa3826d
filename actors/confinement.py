"""What a verifier's child process may not do: open network sockets, write large files, open many.

The network is closed by seccomp, which needs no privilege and cannot be undone: `socket` answers
"permission denied" for every family but AF_UNIX, and so does `io_uring_setup`, its other way in.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys

from common.errors import UserError

MAX_FILE_BYTES = 64 * 2**20
MAX_OPEN_FILES = 1024

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_AF_UNIX = 1
_IO_URING_SETUP = 425
# machine: (AUDIT_ARCH of linux/audit.h, number of the system call `socket`)
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of BPF, on 32-bit words
_ARCH, _NUMBER, _FIRST_ARGUMENT = 4, 0, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES


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


def limit_files() -> None:
    """Bound the size of a file and the number of open ones."""
    for what, wanted in (
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        hard = resource.getrlimit(what)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (limit, limit))


def close_network() -> None:
    """No new network socket in this process, its threads and children from now on.

    Raises:
        UserError: this system cannot do it.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise UserError(
            f"verifiers cannot be kept off the network on {sys.platform} {platform.machine()}: "
            "if you trust them, set verifier.network=true"
        )
    audit_arch, socket_call = _MACHINES[platform.machine()]
    rules = [  # the two jumps count the instructions to skip
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 7, audit_arch),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 5, 0, _X32),
        (_EQUAL, 4, 0, _IO_URING_SETUP),
        (_EQUAL, 0, 2, socket_call),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 0, 1, _AF_UNIX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    program = (_Instruction * len(rules))(*[_Instruction(*rule) for rule in rules])
    library = ctypes.CDLL(None, use_errno=True)
    filtered = ctypes.byref(_Program(len(rules), program))
    if (
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or library.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filtered, 0, 0) != 0
    ):
        raise UserError(
            f"verifiers cannot be kept off the network here (seccomp: "
            f"{os.strerror(ctypes.get_errno())}): if you trust them, set verifier.network=true"
        )
