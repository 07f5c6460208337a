"""A cluster for trying things by hand."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

from tests.slurm.cluster import Cluster


def main() -> int:
    """Bring a cluster up and keep it until Ctrl-C; prints how to use it."""
    cluster = Cluster()
    begin = time.monotonic()
    try:
        cluster.open()
        took = time.monotonic() - begin
        example = f"{cluster.folder}/on head srun -N2 hostname"
        sys.stdout.write(f"up in {took:.1f} s, until Ctrl-C; for example: {example}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        cluster.close()
    return 0


sys.exit(main())
