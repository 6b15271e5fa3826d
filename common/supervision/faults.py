"""Named points of the loop where tests break a process; they do nothing in production.

A test sets GRPO_LAMBDA_FAULTS to a list ACTION@POINT#COUNT,..., and GRPO_LAMBDA_FAULTS_MARK to a
path. The COUNT-th time (from 1) that a process reaches POINT, ACTION happens. It happens once for
all processes that share the mark, so that what is started again does not break again.

    kill      this process ends as by kill -9
    stop      it stops answering (SIGSTOP)
    spoil     `reached` is True, and the caller damages what it holds
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE, MARK = "GRPO_LAMBDA_FAULTS", "GRPO_LAMBDA_FAULTS_MARK"

POINTS = {
    "group dispatched": "the ledger knows of a group, no generator does",
    "group followed up": "the ledger knows that more of a group was asked for, no generator does",
    "group in the log": "a verified group is in the trajectory log, the ledger does not know",
    "group verified": "the ledger knows that a group is verified",
    "step begins": "the learner is about to be given a batch",
    "step trained": "the learner has stepped, the ledger does not know",
    "step in the ledger": "the ledger knows of the step, the generators do not",
    "weights exported": "the new weights are in the object store",
    "weights delivered": "the generators hold them, nobody has proved it",
    "weights proved": "the canary has passed, the step is not on record",
    "step on record": "metrics are written",
    "ledger cut": "the ledger is cut, the checkpoint not begun",
    "checkpoint taken": "the learner's memory holds a checkpoint, the disk nothing of it",
    "checkpoint written": "all files of a checkpoint are there under a temporary name",
    "checkpoint in place": "it has its name, older ones are still there",
    "completion sampled": "a generator has a batch of completions",
    "turn sampled": "a turn of an episode is sampled, the environment does not know",
    "observation received": "the environment has answered, the policy has not read it",
    "episode closed": "an episode has ended, its group has not",
    "weights received": "a generator has the buckets of an update, none is loaded",
    "weights half loaded": "vLLM has loaded a bucket, others are to come",
    "verdict given": "a verifier has judged a batch",
    "log appended": "the log has been written, nobody was told",
    "gradient step done": "the optimiser has stepped, nobody was told",
}
"""Every point, and what is true there."""

_reached: Counter[str] = Counter()


def reached(point: str) -> bool:
    """Tell that this process is at `point`.

    Returns:
        True when the caller is to damage what it holds there.
    """
    faults = os.environ.get(VARIABLE)
    if faults is None:
        return False
    _reached[point] += 1
    for fault in faults.split(","):
        action, _, place = fault.partition("@")
        name, _, count = place.partition("#")
        if point not in POINTS or name not in POINTS:
            raise ValueError(
                f"{point!r} and {name!r} must be among the points of common.supervision.faults"
            )
        if name == point and _reached[point] >= int(count or 1) and _first(fault):
            return _break(action)
    return False


def _break(action: str) -> bool:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    return action == "spoil"


def _first(fault: str) -> bool:
    """Whether no process has broken by this fault yet."""
    try:
        os.close(os.open(f"{os.environ[MARK]}.{fault}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
