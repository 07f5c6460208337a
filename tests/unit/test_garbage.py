"""No collection while many objects are made, and none because of them right after."""

from __future__ import annotations

import gc

import pytest

from mpipipe.garbage import no_garbage_collection


def num_collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_what_was_made_is_not_looked_at_when_it_is_over() -> None:
    gc.unfreeze()  # what another test of this process has frozen
    gc.collect()
    before = num_collections()
    with no_garbage_collection():
        made = [[number] for number in range(20 * gc.get_threshold()[0])]
        assert not gc.isenabled()
    assert gc.isenabled()
    made.append([])
    assert num_collections() == before
    assert gc.get_freeze_count() == 0


def test_what_is_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        num_frozen = gc.get_freeze_count()
        with no_garbage_collection():
            made = [[number] for number in range(100)]
        assert gc.get_freeze_count() == pytest.approx(num_frozen, abs=50)
        del made
    finally:
        gc.unfreeze()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
