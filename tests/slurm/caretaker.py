"""What an administrator does when a node does not come free after its job: look, and restart it.

Slurm 22.05 has left a node behind for good after `scontrol requeue`, once in some hundred jobs, and
all jobs after it waiting. That says nothing of mpipipe, so the node is restarted, and reported.
Not here: nodes that a test has cut off. Invariant: a node that runs a job is left alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

__all__ = ["Caretaker"]

# Of Slurm's states; a star after one means that the node does not answer.
_STUCK = {"completing", "drained", "down", "idle*", "completing*", "drained*", "down*"}
# A job's processes have 5 s between TERM and KILL, and a step 7 s more.
_PATIENCE_S = 25.0
_INTERVAL_S = 2.0


class Caretaker:
    """Looks after `nodes` whenever a test waits for a job.

    Args:
        nodes: the names of those to look after.
        states: tells the state of each node, as sinfo's `%N %T` does, a line each.
        restart: restarts one.
        report: takes the node, and its state before that.
    """

    def __init__(
        self,
        nodes: Collection[str],
        states: Callable[[], str],
        restart: Callable[[str], None],
        report: Callable[[str, str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = nodes
        self._states = states
        self._restart = restart
        self._report = report
        self._now_s = now_s
        self._stuck_since_s: dict[str, float] = {}
        self._looked_s = float("-inf")
        self._lock = threading.Lock()  # several threads wait for jobs

    def look(self) -> None:
        """Restart what has been stuck for long; cheap when it was called a moment ago."""
        with self._lock:
            now_s = self._now_s()
            if now_s - self._looked_s < _INTERVAL_S:
                return
            self._looked_s = now_s
            for line in self._states().splitlines():
                node, state = line.split()
                if node not in self._nodes or state not in _STUCK:
                    self._stuck_since_s.pop(node, None)
                elif now_s - self._stuck_since_s.setdefault(node, now_s) > _PATIENCE_S:
                    del self._stuck_since_s[node]
                    self._report(node, state)
                    self._restart(node)
