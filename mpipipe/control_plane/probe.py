"""How fast the control plane is on this machine: round trips, message rate, and the cost of idling.

Run by `mpipipe bench control` on all ranks at once. Measured beside plain MPI in the
same run, so that a slow machine and a slow control plane can be told apart.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpipipe.control_plane.messages import Echo
from mpipipe.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.mailbox import Mailbox
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.control_plane.messages import Message

__all__ = ["ControlProbe", "RawMessages", "RoundTrips", "format_probe", "probe_control_plane"]

_PAYLOAD_BYTES = (64, 1024)
_NUM_WARM_UP = 200
_NUM_MESSAGES = 20_000  # one way; round trips are a tenth as many
_BURST = 100  # messages sent between two turns of the event loop
_SETTLE_S = 2.0  # until the engine's pauses have reached their longest, 3 % of the time waited
_IDLE_S = 1.0
_DEADLINE_S = 60.0


class RawMessages(Protocol):
    """Plain MPI between ranks 0 and 1, blocking; only these two ranks call it."""

    def raw_round_trips_s(self, num_bytes: int, num_repetitions: int) -> list[float]:
        """Seconds of each round trip."""
        ...

    def raw_one_way_per_s(self, num_bytes: int, num_messages: int) -> float:
        """Messages per second from rank 0 to rank 1."""
        ...


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Times of one payload size between ranks 0 and 1; `raw_…` is plain MPI, None without it."""

    payload_bytes: int
    p50_us: float
    p95_us: float
    raw_p50_us: float | None
    raw_p95_us: float | None


@dataclass(frozen=True, slots=True)
class ControlProbe:
    """What `probe_control_plane` measured; idle shares are of one core, by rank."""

    round_trips: tuple[RoundTrips, ...]
    one_way_per_s: float  # 64-byte messages from rank 0 to rank 1, received and decoded
    raw_one_way_per_s: float | None  # the same in plain MPI, None without it
    idle_shares: tuple[float, ...]


async def probe_control_plane(
    mesh: Mesh,
    *,
    raw: RawMessages | None = None,
    idle_s: float = _IDLE_S,
    num_messages: int = _NUM_MESSAGES,
) -> ControlProbe | None:
    """Measure on all ranks at once; the result on the head, None elsewhere.

    Args:
        mesh: started, with nothing else going on.
        raw: plain MPI to compare with (`MpiChannel`).
        idle_s: how long to idle.
        num_messages: to send one way; round trips are a tenth as many.

    Raises:
        EnvironmentSetupError: there is only one rank.
        DeadlineError: a rank did not take part.
    """
    if mesh.world_size < 2:
        raise EnvironmentSetupError(
            "the control plane was to be measured on one rank, but messages travel between two; "
            "start it with mpirun -n 2 or srun -n 2"
        )
    echoes = mesh.mailbox(Echo)
    round_trips = []
    for payload_bytes in _PAYLOAD_BYTES:
        times_s = await _echo_phase(mesh, echoes, payload_bytes, num_messages // 10)
        raw_s: list[float] = []
        if raw is not None and mesh.rank < 2:
            raw_s = raw.raw_round_trips_s(payload_bytes, num_messages // 10)
        if mesh.is_head:
            round_trips.append(_summarised(payload_bytes, times_s, raw_s))
    one_way_per_s = await _one_way_phase(mesh, echoes, num_messages)
    raw_per_s: float | None = None
    if raw is not None and mesh.rank < 2:
        raw_per_s = raw.raw_one_way_per_s(_PAYLOAD_BYTES[0], num_messages)
    idle_shares = await _idle_phase(mesh, idle_s)
    if not mesh.is_head:
        return None
    return ControlProbe(tuple(round_trips), one_way_per_s, raw_per_s, idle_shares)


async def _echo_phase(
    mesh: Mesh, echoes: Mailbox[tuple[int, Message]], payload_bytes: int, num_round_trips: int
) -> list[float]:
    """Awaited round trips from rank 0 to rank 1 and back, in seconds; empty elsewhere."""
    await mesh.barrier(f"probe echo {payload_bytes}", _DEADLINE_S)
    times_s = []
    payload = bytes(payload_bytes)
    for number in range(_NUM_WARM_UP + num_round_trips):
        start_s = time.perf_counter()
        if mesh.rank == 0:
            mesh.send(1, Echo(number, payload, reply=False))
            await echoes.get()
            times_s.append(time.perf_counter() - start_s)
        elif mesh.rank == 1:
            _, message = await echoes.get()
            assert isinstance(message, Echo), "the mailbox is for Echo"
            mesh.send(0, Echo(number, message.payload, reply=True))
    await mesh.barrier(f"probe echoed {payload_bytes}", _DEADLINE_S)
    return times_s[_NUM_WARM_UP:]


async def _one_way_phase(
    mesh: Mesh, echoes: Mailbox[tuple[int, Message]], num_messages: int
) -> float:
    """Messages per second from rank 0 to rank 1, until rank 1 has read the last one."""
    await mesh.barrier("probe one way", _DEADLINE_S)
    rate = 0.0
    if mesh.rank == 0:
        message = Echo(0, bytes(_PAYLOAD_BYTES[0]), reply=False)
        start_s = time.perf_counter()
        for number in range(num_messages):
            mesh.send(1, message)
            if number % _BURST == 0:
                await asyncio.sleep(0)
        await echoes.get()
        rate = num_messages / (time.perf_counter() - start_s)
    elif mesh.rank == 1:
        for _ in range(num_messages):
            await echoes.get()
        mesh.send(0, Echo(num_messages, b"", reply=True))
    await mesh.barrier("probe one way done", _DEADLINE_S)
    return rate


async def _idle_phase(mesh: Mesh, idle_s: float) -> tuple[float, ...]:
    """The share of a core that each rank uses while nothing happens, on the head."""
    await mesh.barrier("probe idle", _DEADLINE_S)
    await asyncio.sleep(_SETTLE_S)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    await asyncio.sleep(idle_s)
    share = (time.process_time() - cpu_s) / (time.perf_counter() - wall_s)
    parts = await mesh.gather("probe idle share", json.dumps(share).encode(), _DEADLINE_S)
    return tuple(float(json.loads(part)) for part in parts or ())


def _summarised(payload_bytes: int, times_s: Sequence[float], raw_s: Sequence[float]) -> RoundTrips:
    return RoundTrips(
        payload_bytes,
        _percentile_us(times_s, 0.50),
        _percentile_us(times_s, 0.95),
        _percentile_us(raw_s, 0.50) if raw_s else None,
        _percentile_us(raw_s, 0.95) if raw_s else None,
    )


def _percentile_us(times_s: Sequence[float], share: float) -> float:
    """Nearest-rank percentile in microseconds."""
    ordered = sorted(times_s)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1e6


def format_probe(probe: ControlProbe) -> list[tuple[str, str, str]]:
    """Rows of (what, measured here, plain MPI in the same run) for a table."""
    rows = []
    for trip in probe.round_trips:
        raw = "-"
        if trip.raw_p50_us is not None and trip.raw_p95_us is not None:
            raw = f"{trip.raw_p50_us:.1f} / {trip.raw_p95_us:.1f} µs"
        rows.append(
            (
                f"round trip {trip.payload_bytes} B, p50 / p95",
                f"{trip.p50_us:.1f} / {trip.p95_us:.1f} µs",
                raw,
            )
        )
    raw_rate = probe.raw_one_way_per_s
    rows.append(
        (
            "one way, 64 B",
            f"{probe.one_way_per_s:,.0f} messages/s",
            "-" if raw_rate is None else f"{raw_rate:,.0f} messages/s",
        )
    )
    rows.extend(
        (f"idle rank {rank}", f"{share * 100:.2f} % of a core", "-")
        for rank, share in enumerate(probe.idle_shares)
    )
    return rows
