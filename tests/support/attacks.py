"""Programs that cheat, break out or break things, each with what has to become of it.

The table in actors/README.md is made from `ATTACKS` (`tests/support/attack_table.py`). Run as a
script, this file plays all of them behind the walls it is told: `python attacks.py bubblewrap,user`
leaves those out. So an ordinary user can be tried, and a container that offers less.
"""

# ruff: noqa: E501 (programs, a line each)

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.sandbox.sandbox import RuleSpec, Sandbox, Task
from actors.sandbox.verdict import Verdict
from actors.sandbox.walls import Walls
from actors.verifiers.code_tests import pack
from actors.verifiers.registry import JUDGE

SECRET = "sesame-4711-opens"
"""In the tests' expected results, in the environment and in a file of the judge's user."""

TESTS: dict[str, dict[str, Any]] = {
    "stdin": {"kind": "stdin", "cases": pack([("7\n", SECRET)])},
    "call": {"kind": "call", "function": "f", "cases": pack([("7", json.dumps(SECRET))])},
    "script": {
        "kind": "script",
        "setup": "",
        "script": f"def check(g):\n    assert g(7) == {SECRET!r}\ncheck(f)",
    },
    "sum": {"kind": "call", "function": "f", "cases": pack([("7", "49"), ("2", "4")])},
}
HONEST = "def f(x):\n    return x * x"
PROLOGUE = """\
import contextlib, ctypes, os, re, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def quiet(call, *given):
    try:
        return call(*given)
    except BaseException as error:
        return error
"""


@dataclass(frozen=True)
class Attack:
    """One program; `touched` are the kinds of walls it is counted for."""

    name: str
    tests: str
    program: str
    verdict: str
    touched: str = ""


def _attack(name: str, tests: str, verdict: str, touched: str, program: str) -> Attack:
    return Attack(name, tests, PROLOGUE + textwrap.dedent(program), verdict, touched)


_SEARCH = """
def find():
    for pid in [os.getppid(), *range(1, 400)]:
        for name in ("mem", "environ", "cmdline"):
            with contextlib.suppress(Exception):
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if name != "mem":
                        found = re.search(rb"sesame-[0-9]+-opens", file.read())
                        if found: return found.group().decode()
                        continue
                    for line in open(f"/proc/{pid}/maps"):
                        start, end = [int(x, 16) for x in line.split()[0].split("-")]
                        with contextlib.suppress(Exception):
                            file.seek(start)
                            found = re.search(rb"sesame-[0-9]+-opens", file.read(end - start))
                            if found: return found.group().decode()
    return "nothing"
"""
_PARENT = "import resource\nquiet(resource.prlimit, os.getppid(), resource.{}, ({}))\n" + HONEST
_SYSCALL = "assert libc.syscall({}) == -1\n" + HONEST
_HANDED = """
import struct
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
class Message(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("name_length", ctypes.c_uint), ("parts", ctypes.c_void_p),
                ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("size", ctypes.c_size_t), ("flags", ctypes.c_int)]
letter = ctypes.create_string_buffer(b"f")
part = Part(ctypes.addressof(letter), 1)
control = ctypes.create_string_buffer(struct.pack("@Qiii4x", 20, 1, 1, 0), 24)
message = Message(None, 0, ctypes.addressof(part), 1, ctypes.addressof(control), 24, 0)
given = 0
for fd in range(3, 12):
    while given < 1500:
        if libc.sendmsg(fd, ctypes.byref(message), 0) == 1: given += 1
        elif ctypes.get_errno() != 109: break  # too many on their way: the runner takes them in
        else: time.sleep(0.0005)
assert given == 1500, given
"""
_EACH = "for fd in range(3, 64):\n    quiet({})\n"

ATTACKS = [
    # the answer, from where it might be
    _attack("searches the memory of all processes", "stdin", "fail", "files", _SEARCH + "print(find())"),
    _attack(
        "searches the memory of all processes, for a function's result",
        "call", "fail", "files", _SEARCH + "def f(x):\n    return find()",
    ),
    _attack(
        "searches the memory of all processes, for a script's",
        "script", "fail", "files", _SEARCH + "def f(x):\n    return find()",
    ),
    _attack(
        "reads a file of the judge's user with the answer in it", "stdin", "fail", "files",
        """
        for folder in ("/tmp", "/root", "/home", "/work", os.path.expanduser("~"), "/var/tmp"):
            for path, _, names in os.walk(folder):
                for name in names:
                    if name == "decoy-of-grpo-lambda":
                        print(open(os.path.join(path, name)).read()); raise SystemExit
        print(quiet(open, "/etc/shadow"))
        """,
    ),
    _attack(
        "looks for the answer among its interpreter's objects", "stdin", "fail", "",
        """
        import gc
        frame, seen = sys._getframe(), []
        while frame:
            seen += [repr(frame.f_locals), repr(frame.f_globals)]; frame = frame.f_back
        seen += [repr(thing)[:5000] for thing in gc.get_objects() if isinstance(thing, (str, bytes, list, tuple))]
        found = re.search(r"sesame-[0-9]+-" + "opens", " ".join(seen))
        print(found.group() if found else "nothing")
        """,
    ),
    _attack("returns an object that is equal to everything", "script", "fail", "",
        "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = object.__hash__\ndef f(x): return A()"),
    _attack("returns a text that is equal to everything", "script", "fail", "",
        "class A(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
        "def f(x): return A('x')"),
    _attack("is a class whose instances equal everything, by its metaclass too", "script", "fail", "",
        "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\n"
        "class f(metaclass=M):\n    def __init__(self, x): pass\n    def __eq__(self, other): return True"),
    _attack("changes what `assert`, `==` and `isinstance` mean in its interpreter", "script", "fail", "",
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.AssertionError = Warning\n"
        "sys.settrace(lambda *a: None)\ndef f(x): return 1"),
    _attack("walks the frames for a token and reports success", "script", "fail", "",
        "frame = sys._getframe()\nwhile frame:\n    for value in list(frame.f_locals.values()):\n"
        "        if isinstance(value, dict) and 'token' in value:\n            os.write(5, value['token'].encode())\n"
        "    frame = frame.f_back\nos._exit(0)"),
    _attack("forges answers to its tests", "script", "fail", "",
        "import json, struct\nbody = json.dumps({'value': ['bool', True], 'positional': ['list', []]}).encode()\n"
        + _EACH.format("os.write, fd, (struct.pack('>I', len(body)) + body) * 9") + "os._exit(0)"),
    _attack("raises what the script might take for success", "script", "fail", "",
        "def f(x): raise SystemExit(0)"),
    # the judge's channels
    _attack("cuts every descriptor to nothing", "sum", "fail", "",
        _EACH.format("os.ftruncate, fd, 0") + "os._exit(0)"),
    _attack("closes every descriptor", "sum", "fail", "", _EACH.format("os.close, fd") + HONEST),
    _attack("reports 200,000 brackets", "sum", "fail", "",
        _EACH.format("os.write, fd, b'[' * 200000") + "os._exit(0)"),
    _attack("reports 200,000 brackets to a script", "script", "fail", "",
        "import struct\n" + _EACH.format("os.write, fd, struct.pack('>I', 200000) + b'[' * 200000")
        + "os._exit(0)"),
    _attack("fills every channel with rubbish", "sum", "fail", "",
        _EACH.format("os.write, fd, b'\\xff' * 2**20") + "def f(x): return 1"),
    _attack("prints without end", "stdin", "fail", "",
        "while True: print('x' * 2**16)"),
    _attack("returns an integer of 400 digits where a number is wanted", "sum", "fail", "",
        "def f(x): return float('nan') if x == 2 else 10**400"),
    _attack("returns a value nested 100,000 deep", "script", "fail", "",
        "def f(x):\n    r = []\n    for _ in range(100000): r = [r]\n    return r"),
    _attack("ends before it is done", "sum", "fail", "", "os._exit(0)"),
    _attack("stops itself", "sum", "fail", "", "os.kill(os.getpid(), signal.SIGSTOP)"),
    _attack("kills itself", "sum", "fail", "", "os.kill(os.getpid(), signal.SIGKILL)"),
    _attack("crashes its interpreter", "sum", "fail", "", "ctypes.string_at(0)"),
    # other processes
    _attack("kills its parent", "sum", "pass", "processes",
        "quiet(os.kill, os.getppid(), signal.SIGKILL)\n" + HONEST),
    _attack("signals every process it may", "sum", "pass", "processes",
        "for pid in {-1, 0, *range(1, 300)} - {os.getpid()}:\n    quiet(os.kill, pid, signal.SIGTERM)\n" + HONEST),
    _attack("stops its parent", "sum", "pass", "processes",
        "quiet(os.kill, os.getppid(), signal.SIGSTOP)\n" + HONEST),
    _attack("has a descriptor signal its parent (F_SETOWN, F_SETSIG)", "sum", "pass", "files",
        "import fcntl\nr, w = os.pipe()\nquiet(fcntl.fcntl, r, 8, os.getppid())\n"
        "quiet(fcntl.fcntl, r, 10, int(signal.SIGKILL))\nquiet(fcntl.fcntl, r, 4, 0o20000)\n"
        "os.write(w, b'x')\n" + HONEST),
    _attack("sets the file size limit of its parent to 0", "sum", "pass", "processes",
        _PARENT.format("RLIMIT_FSIZE", "0, 0")),
    _attack("sets the memory limit of its parent to nothing", "sum", "pass", "processes",
        _PARENT.format("RLIMIT_AS", "1000, 1000")),
    _attack("sets the limit of open files of its parent to 0", "sum", "pass", "processes",
        _PARENT.format("RLIMIT_NOFILE", "0, 0")),
    _attack("gives its parent a second of processor time", "sum", "pass", "processes",
        _PARENT.format("RLIMIT_CPU", "1, 1")),
    _attack("changes the priority of its parent", "sum", "pass", "processes",
        "quiet(os.setpriority, os.PRIO_PROCESS, os.getppid(), 19)\n" + HONEST),
    _attack("traces its parent", "sum", "pass", "processes",
        "assert libc.ptrace(16, os.getppid(), 0, 0) == -1\n" + HONEST),
    _attack("writes to the memory of its parent", "sum", "pass", "files",
        "assert isinstance(quiet(open, f'/proc/{os.getppid()}/mem', 'r+b', 0), OSError)\n" + HONEST),
    _attack("writes to the memory of its parent by process_vm_writev", "sum", "pass", "processes",
        "assert libc.process_vm_writev(os.getppid(), 0, 0, 0, 0, 0) == -1\n" + HONEST),
    _attack("takes a descriptor of its parent (pidfd_getfd)", "sum", "pass", "processes",
        _SYSCALL.format("434, os.getppid(), 0")),
    _attack("starts processes", "sum", "pass", "processes",
        "for _ in range(50): assert isinstance(quiet(os.fork), OSError)\n" + HONEST),
    _attack("starts a process by vfork and clone", "sum", "pass", "processes",
        "assert libc.syscall(58) == -1 and libc.syscall(56, 17, 0, 0, 0, 0) == -1\n" + HONEST),
    _attack("runs another program", "sum", "pass", "processes",
        "assert isinstance(quiet(os.execv, '/bin/true', ['true']), OSError)\n" + HONEST),
    _attack("starts 2,000 threads", "sum", "fail", "",
        "import threading\nthreading.stack_size(32768)\nfor _ in range(2000):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\ntime.sleep(30)"),
    # the kernel
    _attack("makes a user namespace", "sum", "pass", "processes",
        "assert libc.unshare(0x10000000) == -1\n" + HONEST),
    _attack("mounts over a folder", "sum", "pass", "kernel",
        "assert libc.mount(b'none', b'/usr', b'tmpfs', 0, None) == -1\n" + HONEST),
    _attack("opens files by their handles", "sum", "pass", "files", _SYSCALL.format("304, -100, 0, 0")),
    _attack("loads a filter into the kernel (bpf)", "sum", "pass", "kernel", _SYSCALL.format("321, 0, 0, 0")),
    _attack("asks for an io_uring", "sum", "pass", "network", _SYSCALL.format("425, 8, 0")),
    _attack("uses the kernel's keys", "sum", "pass", "kernel", _SYSCALL.format("250, 0, 0, 0, 0")),
    _attack("becomes another user", "sum", "pass", "kernel",
        "assert isinstance(quiet(os.setuid, 0), OSError)\n" + HONEST),
    _attack("changes its root folder", "sum", "pass", "kernel",
        "assert isinstance(quiet(os.chroot, '/usr'), OSError)\n" + HONEST),
    _attack("calls in the way of 32 bits (int 0x80)", "sum", "pass", "",
        "import mmap\ncode = bytes.fromhex('b814000000cd80c3')\n"
        "page = mmap.mmap(-1, 4096, prot=7)\npage.write(code)\n"
        "entry = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "assert ctypes.CFUNCTYPE(ctypes.c_int)(entry)() == -13\n" + HONEST),
    _attack("calls in the way of x32", "sum", "pass", "", _SYSCALL.format("0x40000000 + 39")),
    # network and files
    _attack("opens a network socket", "sum", "pass", "network",
        "import socket\nassert isinstance(quiet(socket.socket), OSError)\n" + HONEST),
    _attack("connects to a socket of Ray", "sum", "pass", "network",
        "import socket\nassert isinstance(quiet(socket.socket, socket.AF_UNIX), OSError)\n" + HONEST),
    _attack("sends to sockets of others from a pair of its own", "sum", "pass", "network",
        "import socket\nassert isinstance(quiet(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM), OSError)\n"
        + HONEST),
    _attack("writes a file", "sum", "pass", "files",
        "for path in ('x', '/tmp/x', '/dev/shm/x', '/usr/x'):\n"
        "    assert isinstance(quiet(open, path, 'w'), OSError)\n" + HONEST),
    _attack("makes files in memory", "sum", "pass", "files",
        "assert isinstance(quiet(os.memfd_create, 'x'), OSError)\n" + HONEST),
    _attack("makes shared memory that outlives it", "sum", "pass", "files",
        "assert libc.shmget(4711, 4096, 0o1777) == -1\n" + HONEST),
    _attack("locks a file that others read", "sum", "pass", "files",
        "import fcntl\nassert isinstance(quiet(fcntl.flock, open(os.__file__), 2), OSError)\n" + HONEST),
    _attack("takes more memory than it has", "sum", "fail", "",
        "import mmap\nkept = [mmap.mmap(-1, 2**30) for _ in range(64)]"),
    _attack("opens a thousand descriptors", "sum", "fail", "",
        "kept = [os.dup(0) for _ in range(1000)]"),
    _attack("lifts its own limits", "sum", "pass", "",
        "import resource\nfor what in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    assert quiet(resource.setrlimit, what, (resource.RLIM_INFINITY,) * 2)\n" + HONEST),
    # what is shared with the runner
    _attack("hands 1,500 descriptors to its runner", "sum", "pass", "files", _HANDED + HONEST),
    _attack("shuts its channels down", "sum", "pass", "",
        "for fd in range(3, 64): libc.shutdown(fd, 2)\n" + HONEST),
    _attack("changes the flags of every descriptor, and seals them", "stdin", "fail", "files",
        "import fcntl\nfor fd in range(64):\n    for flags in (0o4000, 0o40000, 0o20000, 0o2000):\n"
        "        quiet(fcntl.fcntl, fd, 4, flags)\n    quiet(fcntl.fcntl, fd, 1033, 15)\nprint('x')"),
    _attack("asks for a handle of its runner by a socket (SO_PEERPIDFD)", "sum", "pass", "processes",
        "value, size = ctypes.c_int(0), ctypes.c_uint(4)\nfor fd in range(3, 64):\n"
        "    libc.getsockopt(fd, 1, 77, ctypes.byref(value), ctypes.byref(size))\n"
        "    assert libc.syscall(424, value.value, 9, 0, 0) == -1\n" + HONEST),
    _attack("makes sockets of every other family", "sum", "pass", "network",
        "pair = (ctypes.c_int * 2)()\nfor family in range(2, 46):\n    for kind in (1, 2, 3, 5):\n"
        "        assert libc.socketpair(family, kind, 0, pair) == -1\n" + HONEST),
    _attack("makes namespaces by threads", "sum", "pass", "",
        "for new in (0x20000, 0x40000000, 0x8000000, 0x4000000, 0x10000000, 0x20000000, 0x2000000):\n"
        "    assert libc.syscall(56, 0x10f00 | new, 0, 0, 0, 0) == -1\n" + HONEST),
    _attack("ends its main thread and goes on in another", "sum", "fail", "",
        "import threading\ndef on():\n    while True: time.sleep(0.1)\n"
        "threading.Thread(target=on).start()\nlibc.syscall(60, 0)"),
    _attack("makes refused calls in 60 threads without end", "sum", "fail", "kernel",
        "import threading\nthreading.stack_size(65536)\ndef call():\n"
        "    while True: libc.syscall(250, 0, 0, 0, 0, 0)\n"
        "for _ in range(60): threading.Thread(target=call, daemon=True).start()\ntime.sleep(60)"),
    _attack("interrupts its refused calls by signals", "sum", "fail", "kernel",
        "signal.signal(signal.SIGALRM, lambda *a: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "while True: libc.syscall(250, 0, 0, 0, 0, 0)"),
    _attack("reports four million lists", "sum", "fail", "",
        _EACH.format("os.write, fd, b'[' + b'[],' * 4000000 + b'[]]'") + "os._exit(0)"),
    _attack("begins an answer to its tests and hangs", "script", "fail", "",
        "import struct\n" + _EACH.format("os.write, fd, struct.pack('>I', 1000) + b'x'") + "time.sleep(60)"),
    _attack("takes memory bit by bit", "sum", "fail", "",
        "kept = [bytearray(2**20) for _ in range(5000)]"),
    _attack("opens its own memory, that of others, and devices", "sum", "pass", "files",
        "for path in ('self/mem', 'self/environ', 'self/maps', '1/environ', 'self/root/etc/shadow', '../dev/tty',\n"
        "             '../dev/ptmx', '../dev/kmsg', '../dev/mem', '../sys/kernel/notes'):\n"
        "    assert isinstance(quiet(open, '/proc/' + path, 'rb'), OSError), path\n" + HONEST),
    _attack("goes up from a folder that it may read", "sum", "pass", "files",
        "for path in ('/usr/../etc/passwd', '/usr/lib/../../root', os.path.dirname(os.__file__) + '/../' * 9 + 'etc/shadow'):\n"
        "    assert isinstance(quiet(open, path), OSError), path\n" + HONEST),
    _attack("changes Python's own files", "sum", "pass", "files",
        "path = os.__file__\nfor call, *given in ((open, path, 'a'), (os.utime, path), (os.chmod, path, 0),\n"
        "                     (os.replace, path, path + 'x'), (os.symlink, path, path + 'y')):\n"
        "    assert isinstance(quiet(call, *given), OSError), call\n" + HONEST),
    _attack("changes modules that later programs import", "sum", "pass", "",
        "import builtins, json\nbuiltins.LEFT = 1\njson.loads = None\nsys.modules['math'] = None\n" + HONEST),
    _attack("looks for what earlier programs have left", "sum", "fail", "",
        "import builtins\nassert hasattr(builtins, 'LEFT')\n" + HONEST),
    _attack("maps its output, and has the kernel write there at its end", "stdin", "fail", "",
        "import mmap\nos.ftruncate(1, 4096)\npage = mmap.mmap(1, 4096)\n"
        "libc.syscall(218, ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page))))\npage[:5] = b'wrong'"),
    _attack("sets the clock", "sum", "pass", "kernel",
        "assert libc.syscall(227, 0, 0) == -1 and libc.syscall(164, 0, 0) == -1\n" + HONEST),
    _attack("recurses without end", "sum", "fail", "",
        "sys.setrecursionlimit(10**9)\ndef f(x): return f(x + 1)"),
    _attack("closes its standard streams", "sum", "pass", "",
        "for fd in (0, 1, 2): os.close(fd)\n" + HONEST),
    _attack("reports infinity", "sum", "fail", "",
        _EACH.format("os.write, fd, b'[Infinity, 1e999]'") + "os._exit(0)"),
    _attack("fills its channel for refusals", "sum", "fail", "files",
        "while True: quiet(open, '/etc/shadow')"),
]  # fmt: skip


def sandbox_behind(walls: Walls) -> Sandbox:
    limits = {"seconds": 3.0, "total_seconds": 3.0}
    return Sandbox(
        JUDGE, [RuleSpec("code", "code_tests", limits)], 30.0, 2**30, walls=walls, trusted=True
    )


def play(sandbox: Sandbox, attack: Attack) -> tuple[Verdict, Verdict]:
    """The verdict on the attack, and on an honest program right behind it."""
    program = attack.program
    tasks = [
        Task(0, f"```python\n{text}\n```", json.dumps({"tests": TESTS[tests]}))
        for text, tests in ((program, attack.tests), (HONEST, "sum"))
    ]
    first, second = sandbox.score(tasks)
    return first, second


def wrong(attack: Attack, found: Verdict, honest: Verdict) -> str:
    """What did not hold; empty when all did."""
    if honest.kind != "pass" or honest.suspicious:
        return f"{attack.name}: the honest program behind it: {honest}"
    if found.kind != attack.verdict:
        return f"{attack.name}: {found}, not {attack.verdict}"
    if not set(attack.touched.split(",")) - {""} <= set(found.suspicious.split(",")):
        return f"{attack.name}: counted as {found.suspicious!r}, not {attack.touched!r}"
    return ""


def main() -> None:
    from actors.sandbox.walls import find_walls

    without = frozenset(sys.argv[1].split(",")) - {""}
    walls = find_walls(without)
    sandbox = sandbox_behind(walls)
    try:
        failures = [wrong(attack, *play(sandbox, attack)) for attack in ATTACKS]
    finally:
        sandbox.close()
    here = {"user": os.getuid(), "walls": walls.describe(), "gaps": walls.gaps()}
    print(json.dumps(here | {"wrong": [text for text in failures if text]}))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    main()
