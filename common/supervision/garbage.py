"""When Python looks for garbage: not where there is none, for it takes long in a large process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG = 20_000
"""Objects made since the last collection that begin another; Python's own is 700. A coordinator's
are freed by their counts, all but a few."""


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No garbage collection begins inside, and none will look at what was made there.

    It is for imports: they leave no garbage, and a fifth of their time was spent looking for it.
    Where the caller had collection off, it stays off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@contextmanager
def old_objects_settled() -> Iterator[None]:
    """What is in memory now is looked at by no garbage collection inside.

    Modules and what a start has made are nearly all objects of this process, and live as long.
    """
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()
