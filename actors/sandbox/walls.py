"""Which walls this host offers, and the command that starts a process behind them.

    calls        system calls are filtered (seccomp); programs keep about a hundred
    files        an empty root with what Python needs, read-only (bubblewrap), and Landlock
    processes    a process namespace (bubblewrap), a user id that owns nothing else (as root), or
                 the filter of calls together with Landlock

`find_walls` tries them, best first, by starting a process behind each: what a container allows is
seen by trying alone. `Walls.gaps` says where a program could still reach its judge.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import actors
import common
from actors.sandbox import confinement, landlock
from actors.sandbox.inside import Access

_TRY_S = 20.0
_UIDS = 2_000_000_000
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
)
_OF_RULES = (
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/hosts"),
    *("/etc/ssl", "/etc/ca-certificates", "/etc/mime.types", "/sys/devices/system/cpu"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


@dataclass(frozen=True)
class Walls:
    """What stands between a program and the rest of this host."""

    calls: bool
    landlock: int
    """ABI; 0: none."""
    bubblewrap: str | None = None
    """Path of the tool; None where it is not installed or cannot make namespaces."""
    own_user: bool = False
    """Each process behind the walls has a user id of its own."""
    user_namespace: bool = False
    """Whether bubblewrap needs a user namespace: it was not started with the rights of root."""

    @property
    def processes_between(self) -> int:
        """Processes that the walls themselves add below the one that is started."""
        return 2 if self.bubblewrap else 0

    def open_to_others(self, paths: Sequence[str]) -> bool:
        """Whether a user id that owns nothing could read `paths` behind these walls."""
        for path in paths:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode) and mode & 0o005 != 0o005:
                return False
            above = () if self.bubblewrap else Path(path).parents  # bubblewrap makes them anew
            if any(not os.stat(parent).st_mode & 0o001 for parent in above):
                return False
        return True

    def gaps(self) -> list[str]:
        """How a program could reach its judge, or the answers in files; empty where it cannot."""
        found = []
        if not self.calls:
            found.append("system calls are not filtered (this needs Linux with seccomp)")
        if not self.bubblewrap and not self.landlock:
            found.append(
                "files of the user can be read (install bubblewrap, or use a kernel with Landlock)"
            )
        return found

    def describe(self) -> list[str]:
        """A line for each wall, for people."""
        namespaces = "processes, mounts, IPC and network of its own" if self.bubblewrap else ""
        users = "a user id of its own" if self.own_user else ""
        identity = " and ".join(part for part in (namespaces, users) if part)
        files = "an empty root (bubblewrap)" if self.bubblewrap else ""
        kernel = f"Landlock (ABI {self.landlock})" if self.landlock else ""
        return [
            f"identity: {identity or 'the same user; calls that name a process are refused'}",
            f"files: {' and '.join(part for part in (files, kernel) if part) or 'open to reading'}",
            f"calls: {'an allow-list (seccomp)' if self.calls else 'not filtered'}",
        ]


@lru_cache
def find_walls(without: frozenset[str] = frozenset()) -> Walls:
    """The best walls that hold here.

    Args:
        without: names of walls to leave out, as if the host did not offer them: `calls`,
            `landlock`, `bubblewrap`, `user`.
    """
    bare = Walls(
        calls="calls" not in without and confinement.can_filter(),
        landlock=0 if "landlock" in without else landlock.abi(),
    )
    return next(walls for walls in _candidates(bare, without) if _holds(walls))


def _candidates(bare: Walls, without: frozenset[str]) -> Iterator[Walls]:
    root = sys.platform == "linux" and os.geteuid() == 0
    tool = None if "bubblewrap" in without else shutil.which("bwrap")
    apart = replace(bare, bubblewrap=tool)
    if root and "user" not in without:
        if tool:
            yield replace(apart, own_user=True)
        yield replace(bare, own_user=True)
    if tool:
        yield replace(apart, user_namespace=True)
    yield bare
    yield replace(bare, landlock=0)


def _holds(walls: Walls) -> bool:
    if walls == Walls(walls.calls, 0):
        return True  # nothing left to try
    if walls.own_user and not walls.open_to_others(program_paths()):
        return False  # Python in root's home, say
    access = Access.of(walls.landlock, user=free_user() if walls.own_user else None)
    access = replace(access, readable=program_paths())
    argv = command(walls, access, "actors.sandbox.inside", network=False)
    try:
        done = subprocess.run(
            argv, env=environment(), cwd="/", timeout=_TRY_S, check=False, capture_output=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def command(walls: Walls, access: Access, module: str, *arguments: str, network: bool) -> list[str]:
    """The command line of `python -m module ACCESS arguments...` behind `walls`.

    The module's first act has to be `actors.sandbox.inside.enter(access)`.
    """
    python = [sys.executable, "-P", "-m", module, access.to_json(), *arguments]
    if walls.bubblewrap is None:
        return python
    namespaces = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if not network:
        namespaces.append("--unshare-net")
    if walls.user_namespace:
        namespaces.append("--unshare-user")
    else:
        namespaces += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    read = [path for path in access.readable if not path.startswith(("/proc", "/dev"))]
    # Without this, folders above a closed one are closed like it, to the process's own user too.
    paths = [*read, *access.writable]
    above = {parent for path in paths for parent in Path(path).parents if parent.name}
    mounts = ["--proc", "/proc", "--dev", "/dev"]
    for parent in sorted(above):
        mounts += ["--perms", "0755", "--dir", str(parent)]
    for path in read:
        mounts += ["--ro-bind-try", path, path]
    for path in access.writable:
        mounts += ["--bind", path, path]
    return [walls.bubblewrap, *namespaces, *mounts, "--chdir", "/", "--", *python]


def free_user() -> int:
    """A user id that nobody has: from far above those of people, where this namespace has such."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        ranges = []
    first, count = max(((int(a), int(n)) for a, _, n in ranges), key=lambda r: r[1], default=(0, 0))
    if first + count > 2 * _UIDS:
        return _UIDS + secrets.randbelow(_UIDS)
    return first + count - 1 - secrets.randbelow(max(1, count // 4))


def python_paths() -> list[str]:
    """What an interpreter like this one reads: its own files and the system's libraries."""
    prefixes = [sys.base_prefix, sys.prefix, sys.exec_prefix, str(Path(sys.prefix).resolve())]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return outermost([*_SYSTEM, *prefixes, *links(sys.executable), *libraries])


def package_paths() -> list[str]:
    """The folders of our own code that a process behind the walls imports."""
    return outermost(
        [str(Path(found).resolve()) for part in (actors, common) for found in part.__path__]
    )


def rule_paths(extra: Sequence[str] = ()) -> list[str]:
    """What rules read: Python, whatever can be imported here, and `extra`."""
    imports = [str(Path(entry).resolve()) for entry in sys.path]
    wished = [str(Path(path).expanduser().resolve()) for path in extra]
    places = outermost([*python_paths(), *package_paths(), *_OF_RULES, *imports, *wished])
    return [*places, "/proc", *_DEVICES]


def command_paths(extra: Sequence[str]) -> list[str]:
    """What a command reads: the system, and `extra`. Nothing of what can be imported here."""
    return [
        *outermost([*python_paths(), *package_paths(), *_OF_RULES, *extra]),
        "/proc",
        *_DEVICES,
    ]


def program_paths() -> list[str]:
    """What the runner of programs reads; the programs themselves do without /proc."""
    return [*python_paths(), *package_paths(), "/proc", *_DEVICES]


def links(path: str) -> list[str]:
    """The places a chain of symbolic links goes through."""
    found = [path]
    while os.path.islink(found[-1]) and len(found) < 16:
        target = os.readlink(found[-1])
        found.append(os.path.normpath(os.path.join(os.path.dirname(found[-1]), target)))
    return found


def outermost(paths: Sequence[str]) -> list[str]:
    """The paths that are there, without those that lie below another one of them."""
    there = sorted({path for path in paths if path and os.path.exists(path)}, key=len)
    kept: list[str] = []
    for path in there:
        if not any(path == other or path.startswith(f"{other.rstrip('/')}/") for other in kept):
            kept.append(path)
    return kept


def environment(extra: Sequence[str] = (), folder: str | None = None) -> dict[str, str]:
    """No credentials, one thread, and the parent's import path (the shipped working directory)."""
    names = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", *extra)
    kept = {name: os.environ[name] for name in names if name in os.environ}
    paths = [str(Path(entry).resolve()) if entry else os.getcwd() for entry in sys.path]
    places = {} if folder is None else {"TMPDIR": folder}
    return (
        kept
        | places
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "ignore",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
    )
