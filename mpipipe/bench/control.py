"""`mpipipe bench control`: the control plane's microbenchmark on the ranks of this launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.control_plane.probe import ControlProbe, probe_control_plane
from mpipipe.errors import EnvironmentSetupError
from mpipipe.runtime.handshake import exchange_resources
from mpipipe.runtime.ranks import AgreedError, open_ranks

if TYPE_CHECKING:
    from mpipipe.clock import Clock

__all__ = ["measure_control_plane"]

_MEET_S = 60.0


async def measure_control_plane(clock: Clock, *, debug: bool = False) -> ControlProbe | None:
    """Measure; the result on the head, None elsewhere.

    Raises:
        EnvironmentSetupError: fewer than two ranks were started.
        ProtocolMismatchError: the ranks are of different versions.
        DeadlineError: a rank did not come.
    """
    async with open_ranks(clock, debug=debug) as ranks:
        if ranks.mesh.world_size < 2:
            raise AgreedError(
                EnvironmentSetupError(
                    "messages need two ranks, one was started: `mpirun -n 2 mpipipe bench control`"
                )
            )
        await exchange_resources(ranks, "cpu", deadline_s=_MEET_S)
        return await probe_control_plane(ranks.mesh, raw=ranks.raw)
