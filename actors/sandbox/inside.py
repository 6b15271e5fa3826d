"""The first act of a process behind walls: it becomes nobody, and gives up what it will not need.

Run as `python -P -m actors.sandbox.inside ACCESS` it does that and ends: so walls are tried.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from actors.sandbox import kernel, landlock

_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_V3 = 0x20080522


@dataclass(frozen=True)
class Access:
    """What a process behind walls keeps."""

    readable: Sequence[str]
    writable: Sequence[str]
    """Folders of its own; the first is where it starts."""
    landlock: bool
    user: int | None
    """The user and group id that it takes; None keeps the caller's."""

    @classmethod
    def of(cls, landlock_abi: int, user: int | None) -> Self:
        return cls((), (), landlock_abi > 0, user)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def enter(access: Access) -> None:
    """Become the user, drop every capability, hide this process's memory, close the files.

    Raises:
        OSError: a wall that was promised does not hold.
    """
    if access.user is not None:
        os.setgroups([])
        os.setresgid(access.user, access.user, access.user)
        os.setresuid(access.user, access.user, access.user)
    if access.writable:
        os.chdir(access.writable[0])  # only its owner may
    if sys.platform == "linux":
        _drop_capabilities()
    if access.landlock:
        landlock.restrict(access.readable, access.writable)
    if sys.platform == "linux":
        kernel.gain_no_privileges()
        kernel.hide_memory()


def _drop_capabilities() -> None:
    """Root without its powers; does nothing for others."""
    number = _CAPSET.get(os.uname().machine)
    if number is None:
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    none = (ctypes.c_uint32 * 6)()
    kernel.syscall(number, ctypes.byref(header), ctypes.byref(none))


if __name__ == "__main__":
    enter(Access.from_json(sys.argv[1]))
    importlib.import_module("statistics")  # Python's own files are still in reach
