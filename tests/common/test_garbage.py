"""When Python looks for garbage, and when it does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from common.supervision.garbage import nothing_collected, old_objects_settled


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def many() -> list[list[int]]:
    """More new objects than begin a collection."""
    return [[number] for number in range(5 * gc.get_threshold()[0])]


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Python's own threshold, which other tests may have set; what a test freezes is thawed."""
    threshold = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


def test_nothing_is_collected_inside_and_what_was_made_there_is_never_looked_at() -> None:
    before = collections()
    with nothing_collected():
        kept = many()
    assert collections() == before
    assert kept[0] not in gc.get_objects()  # frozen
    assert gc.isenabled()
    more = many()
    assert collections() > before
    assert more


def test_collection_goes_on_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), nothing_collected():
        raise ImportError
    assert gc.isenabled()


def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with nothing_collected(), nothing_collected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_old_objects_are_looked_at_again_behind_a_run() -> None:
    old, threshold = many(), gc.get_threshold()
    with old_objects_settled():
        assert old[0] not in gc.get_objects()
        assert gc.get_threshold()[0] > threshold[0]
    assert gc.get_threshold() == threshold
    assert any(each is old[0] for each in gc.get_objects())
