"""Processes that end when the actor above them is gone, whoever stands between. On Linux."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

ACTOR_PID = "GRPO_LAMBDA_ACTOR_PID"
"""Environment variable that tells the processes below an actor its id."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End this process when its parent is gone.

    vLLM has an engine between an actor and the workers of several devices, and our code runs in the
    workers alone. So a worker also watches the actor that `ACTOR_PID` names, and ends the engine,
    its parent, when that is gone: it would keep the devices for ever.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    actor, parent = os.environ.get(ACTOR_PID), os.getppid()
    if actor is not None and int(actor) != parent:
        threading.Thread(target=_outlive_not, args=(int(actor), parent), daemon=True).start()


def _outlive_not(actor: int, engine: int) -> None:
    try:
        watched = os.pidfd_open(actor)
    except ProcessLookupError:
        pass
    else:
        ended = select.poll()
        ended.register(watched, select.POLLIN)
        ended.poll()
    if os.getppid() == engine:
        os.kill(engine, signal.SIGKILL)
