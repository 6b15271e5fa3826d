"""Rules that misbehave, chosen by the completion's text. Imported by the sandbox's child."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

NOT_CALLABLE = 3


def obedient(text: str, reference: dict[str, Any]) -> float:
    return float(text == reference["answer"])


def told(text: str, reference: dict[str, Any], finish_reason: str, prompt: str) -> float:
    return float(len(f"{finish_reason} {prompt}"))


def needs_scale(text: str, reference: dict[str, Any], scale: float) -> float:
    return scale


def hostile(text: str, reference: dict[str, Any]) -> Any:
    action, _, argument = text.partition(" ")
    return ACTIONS[action](argument)


def _loop(argument: str) -> float:
    while True:
        pass


def _loop_holding_the_interpreter(argument: str) -> float:
    return float(10 ** (10**9) % 7)


def _sleep(argument: str) -> float:
    time.sleep(float(argument))
    return 1.0


def _fork_and_return(argument: str) -> float:
    os.fork()
    return 1.0


def _fork_bomb(argument: str) -> float:
    while True:
        os.fork()


def _fork_and_allocate(argument: str) -> float:
    """Each process stays below its own limit."""
    for _ in range(4):
        if os.fork() == 0:
            kept = bytearray(os.urandom(2**10)) * (int(argument) // 2**10)
            time.sleep(60)
            os._exit(len(kept) % 2)
    time.sleep(60)
    return 1.0


def _fork_and_share(argument: str) -> float:
    """Together they have what the first has alone."""
    kept = bytearray(os.urandom(2**10)) * (int(argument) // 2**10)
    pids = []
    for _ in range(8):
        if (pid := os.fork()) == 0:
            time.sleep(0.3)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return float(len(kept) > 0)


def _leave_sleeper(argument: str) -> float:
    """A process in a session of its own."""
    subprocess.Popen(["sleep", argument], start_new_session=True)
    return 1.0


def _leave_sleeper_and_loop(argument: str) -> float:
    _leave_sleeper(argument)
    return _loop(argument)


def _flood(argument: str) -> float:
    for _ in range(2000):
        print("x" * 1000)
    os.write(1, b"\x00\x00\x00\x02{}" * 100)
    sys.stdout.flush()
    return 1.0


def _segfault(argument: str) -> float:
    ctypes.string_at(0)
    return 1.0


def _raise(argument: str) -> float:
    raise KeyError("no such key")


def _allocate(argument: str) -> float:
    return float(len(bytearray(10 * 2**30)))


def _alarm(argument: str) -> float:
    signal.alarm(1)
    return 1.0


def _main_thread(argument: str) -> float:
    return float(threading.current_thread() is threading.main_thread())


def _environment(argument: str) -> float:
    return float(argument in os.environ)


def _write_everywhere(argument: str) -> float:
    for descriptor in range(3, 50):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff" * 64)
    return 1.0


def _connect(argument: str) -> float:
    """1 when this process can open a socket of the family."""
    with socket.socket(getattr(socket, argument), socket.SOCK_STREAM):
        return 1.0


def _child_connects(argument: str) -> float:
    code = "import socket; socket.socket(socket.AF_INET)"
    return float(subprocess.run([sys.executable, "-c", code], check=False).returncode == 0)


def _write_file(argument: str) -> float:
    try:
        with open("big", "wb") as file:
            file.write(b"x" * int(argument))
    finally:
        os.unlink("big")
    return 1.0


def _open_files(argument: str) -> float:
    return float(len([os.open(os.devnull, os.O_RDONLY) for _ in range(int(argument))]))


def _list_folder(argument: str) -> float:
    return float(len(os.listdir()))


ACTIONS: dict[str, Any] = {
    "connect": _connect,
    "child_connects": _child_connects,
    "write_file": _write_file,
    "open_files": _open_files,
    "list_folder": _list_folder,
    "number": float,
    "loop": _loop,
    "hold": _loop_holding_the_interpreter,
    "sleep": _sleep,
    "fork": _fork_and_return,
    "fork_bomb": _fork_bomb,
    "fork_and_allocate": _fork_and_allocate,
    "fork_and_share": _fork_and_share,
    "leave": _leave_sleeper,
    "leave_and_loop": _leave_sleeper_and_loop,
    "exit": lambda argument: os._exit(int(argument)),
    "sys_exit": lambda argument: sys.exit(0),
    "raise": _raise,
    "nan": lambda argument: float("nan"),
    "inf": lambda argument: float("inf"),
    "string": lambda argument: "1.0",
    "none": lambda argument: None,
    "bool": lambda argument: True,
    "allocate": _allocate,
    "flood": _flood,
    "read": lambda argument: float(len(sys.stdin.read())),
    "segfault": _segfault,
    "alarm": _alarm,
    "main_thread": _main_thread,
    "environment": _environment,
    "write_everywhere": _write_everywhere,
}
