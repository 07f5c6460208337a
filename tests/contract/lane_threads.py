"""The lanes of a stage as threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mpipipe.data_plane.lanes import ThreadLanes, open_thread_lanes
from mpipipe.errors import ChannelClosedError

T = TypeVar("T")


def on_lanes(num_lanes: int, body: Callable[[ThreadLanes], T]) -> list[T]:
    """What `body` returns on each lane; the first error of any ends them all."""

    def guarded(lanes: ThreadLanes) -> T:
        try:
            return body(lanes)
        except BaseException:
            lanes.close()
            raise

    with ThreadPoolExecutor(num_lanes) as pool:
        running = [pool.submit(guarded, lanes) for lanes in open_thread_lanes(num_lanes)]
    failures = [error for work in running if (error := work.exception()) is not None]
    if failures:
        raise next((e for e in failures if not isinstance(e, ChannelClosedError)), failures[0])
    return [work.result() for work in running]
