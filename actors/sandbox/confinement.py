"""What a verifier's child process may not do: open network sockets, write large files, open many.

The network is closed by seccomp, which needs no privilege and cannot be undone: `socket` answers
"permission denied" for every family but AF_UNIX, and so does `io_uring_setup`, its other way in.
Programs that a model wrote are confined further (`compute_only`): they may compute, read files and
use the descriptors they were given. What else changes anything answers "permission denied".
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
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF, on 32 bits
_ARCH, _NUMBER, _FIRST_ARGUMENT = 4, 0, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_REFUSE = _ERROR | errno.EACCES

_CLONE_THREAD = 0x00010000
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Numbers of system calls by machine, from linux/arch/x86/entry/syscalls/syscall_64.tbl and
# linux/include/uapi/asm-generic/unistd.h. Those that both share are in `_REFUSED_EVERYWHERE`.
_REFUSED_EVERYWHERE = (424, 425, 434, 438, 452)
"""pidfd_send_signal, io_uring_setup, pidfd_open, pidfd_getfd, fchmodat2."""
_REFUSED = {
    "x86_64": (
        *(57, 58),  # fork, vfork
        *(62, 129, 200, 234, 297),  # kill, rt_sigqueueinfo, tkill, tgkill, rt_tgsigqueueinfo
        *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
        *(76, 82, 83, 84, 85, 86, 87, 88),  # truncate, rename, mkdir to symlink
        *(90, 91, 92, 93, 94, 132, 133, 235),  # chmod, chown and kin, utime, mknod, utimes
        *(258, 259, 260, 261, 263, 264, 265, 266, 268, 280, 316),  # the same by `...at`
        *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr and kin
        *(41,),  # socket
        *(29, 30, 31, 64, 68, 240),  # shared memory, semaphores and queues of System V and POSIX
    ),
    "aarch64": (
        *(129, 130, 131, 138, 240),  # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
        *(117, 270, 271),  # ptrace, process_vm_readv, process_vm_writev
        *(33, 34, 35, 36, 37, 38, 45, 52, 53, 54, 55, 88, 276),  # as above
        *(5, 6, 7, 14, 15, 16),  # setxattr, removexattr and kin
        *(198,),  # socket
        *(180, 186, 190, 194, 195, 196),  # queues, semaphores and shared memory
    ),
}
_OPENS = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}
"""System calls that open a file, and which argument holds the flags."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3, _OPENAT2 = 435, 437
"""Their flags are behind a pointer, which a filter cannot follow: answered as unknown (ENOSYS), so
that the C library takes the older call."""


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
        lower_limit(what, wanted)


def lower_limit(what: int, wanted: int) -> None:
    """Bound a resource for good by `wanted`, or by what it is bound to already."""
    hard = resource.getrlimit(what)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (limit, limit))


def close_network() -> None:
    """No new network socket in this process, its threads and children from now on.

    Raises:
        UserError: this system cannot do it.
    """
    _check_machine("if you trust them, set verifier.network=true")
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
    _install(rules, "if you trust them, set verifier.network=true")


def compute_only() -> None:
    """From now on this process starts no other, signals none, and changes no file.

    Threads may be started, files read, and descriptors that are open used. The limits on memory,
    processor time and open files are those of the caller.

    Raises:
        UserError: this system cannot do it.
    """
    remedy = "evaluate code on Linux (x86_64 or aarch64) with seccomp"
    _check_machine(remedy)
    machine = platform.machine()
    rules = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _MACHINES[machine][0]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number in (*_REFUSED[machine], *_REFUSED_EVERYWHERE):
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for number in (_CLONE3, _OPENAT2):
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for number, argument in _OPENS[machine].items():
        rules += _flags(number, argument, (_ANY_BIT, 0, 1, _FOR_WRITING))
    rules += _flags(_CLONE[machine], 0, (_ANY_BIT, 1, 0, _CLONE_THREAD))
    rules.append((_RETURN, 0, 0, _ALLOW))
    _install(rules, remedy)


_Rule = tuple[int, int, int, int]


def _flags(number: int, argument: int, refuse_next: _Rule) -> list[_Rule]:
    """Rules for a call that its flags decide: `refuse_next` goes on to the refusal, or over it."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * argument),
        refuse_next,
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _check_machine(remedy: str) -> None:
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise UserError(
            f"verifiers cannot be confined on {sys.platform} {platform.machine()}: {remedy}"
        )


def _install(rules: list[_Rule], remedy: str) -> None:
    """Hand a filter of system calls to the kernel; it stays for this process and its children."""
    program = (_Instruction * len(rules))(*[_Instruction(*rule) for rule in rules])
    library = ctypes.CDLL(None, use_errno=True)
    filtered = ctypes.byref(_Program(len(rules), program))
    if (
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        or library.prctl(_PR_SET_SECCOMP, _MODE_FILTER, filtered, 0, 0) != 0
    ):
        raise UserError(
            f"verifiers cannot be confined here (seccomp: {os.strerror(ctypes.get_errno())}): "
            f"{remedy}"
        )
