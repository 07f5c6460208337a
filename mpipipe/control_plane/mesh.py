"""The ranks as one: handshake, agree, barrier, gather and broadcast, made of typed messages.

Rank 0 is the head. Collectives are ordinary messages through the head with a deadline, because an
MPI collective cannot be cancelled and a dead peer must become an error with a name, not a hang.
Every rank must call the same collectives in the same order; a deadline that passes ends the run.
The runtime ends the ranks after an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import (
    BarrierEntered,
    BarrierReleased,
    Broadcast,
    GatherPart,
    Hello,
    PhaseReport,
    PhaseVerdict,
)
from mpipipe.control_plane.messenger import Messenger
from mpipipe.errors import (
    DeadlineError,
    EnvironmentSetupError,
    MpipipeError,
    ProtocolMismatchError,
    RemoteError,
    StoppedByUserError,
    StoppedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.channel import Channel
    from mpipipe.control_plane.pending_collectives import CollectiveT
    from mpipipe.progress import ProgressEngine

__all__ = ["Mesh", "find_mismatch"]

_HEAD = 0
_NO_RANK = -2  # the rank of a verdict that no single rank has caused
_HANDSHAKE = "handshake"
# Once a rank has reported a failure, the others get this long to report theirs: the error of the
# lowest rank is shown, but a failed run need not wait for a rank that loads for minutes. The other
# ranks also wait this much longer than the head.
_GRACE_S = 5.0
# After a request to stop the head does not wait for the others' reports: they may be loading.
_STOP_GRACE_S = 0.2
_STOPS = {StoppedError.__name__, StoppedByUserError.__name__}


class Mesh(Messenger):
    """This rank's view of all ranks: messages and collectives.

    Args:
        channel: carries the bytes.
        engine: polls; its `run` must be under way while anything here is awaited.
        clock: that deadlines are measured on.
    """

    def __init__(self, channel: Channel, engine: ProgressEngine, clock: Clock) -> None:
        super().__init__(channel, engine, clock)
        self._hosts: dict[int, str] = {}

    @property
    def is_head(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == _HEAD

    async def handshake(self, hello: Hello, deadline_s: float) -> tuple[Hello, ...]:
        """Exchange the `Hello`s; returns all of them, in rank order, on every rank.

        Raises:
            ProtocolMismatchError: on every rank: versions, configurations or world sizes differ.
            DeadlineError: on every rank that can be told: a rank did not come within `deadline_s`.
        """
        self.send(_HEAD, hello)
        if self.is_head:
            hellos = await self._collect_hellos(deadline_s)
            for received in hellos:
                self._send_to_others(received)
            return hellos
        verdict = await self._from_head(PhaseVerdict, _HANDSHAKE, deadline_s)
        if verdict.error_kind == ProtocolMismatchError.__name__:
            raise ProtocolMismatchError(verdict.error_message)
        if verdict.error_kind is not None:
            raise DeadlineError(verdict.error_message)
        hellos = tuple(
            [await self._from_head(Hello, "", deadline_s) for _ in range(self.world_size)]
        )
        self._hosts = {hello.rank: hello.host for hello in hellos}
        return hellos

    async def _collect_hellos(self, deadline_s: float) -> tuple[Hello, ...]:
        collected = await self._pending.collect(Hello, "", range(self.world_size), deadline_s)
        hellos = tuple(collected.messages.values())
        self._hosts = {hello.rank: hello.host for hello in hellos}
        error: EnvironmentSetupError | None = None
        if (mismatch := find_mismatch(hellos)) is not None:
            error = ProtocolMismatchError(mismatch)
        elif collected.missing:
            error = self._deadline_error(collected.missing, "greet the head", deadline_s)
        self._send_to_others(_verdict(_HANDSHAKE, _HEAD, error))
        if error is not None:
            raise error
        return hellos

    async def agree(self, phase: str, error: MpipipeError | None, deadline_s: float) -> None:
        """Report this rank's outcome of `phase`; returns when all ranks did well.

        Raises:
            MpipipeError: this rank's own `error`.
            RemoteError: the error of the lowest failing rank, on ranks that did well.
            DeadlineError: ranks did not report within `deadline_s`, and none reported an error.
        """
        self.report(phase, error)
        try:
            await self.verdict(phase, deadline_s)
        except MpipipeError as agreed:
            raise error or agreed from None

    def report(self, phase: str, error: MpipipeError | None) -> None:
        """Tell the head this rank's outcome of `phase`, once; `verdict` waits for what follows."""
        self.send(_HEAD, _report(phase, self.rank, error))

    async def verdict(self, phase: str, deadline_s: float) -> None:
        """Return when all ranks did well in `phase`; may be awaited before this rank reports.

        Raises the error of another rank although this rank has not reported yet.

        Raises:
            RemoteError: the error of the lowest failing rank, which may be this one.
            DeadlineError: ranks did not report within `deadline_s`, and none reported an error.
        """
        if self.is_head:
            verdict = await self._judge(phase, deadline_s)
            self._send_to_others(verdict)
        else:
            verdict = await self._from_head(PhaseVerdict, phase, deadline_s)
        if verdict.error_kind is None:
            return
        if verdict.rank == _NO_RANK:
            raise DeadlineError(verdict.error_message)
        raise RemoteError(
            f"{self._label(verdict.rank)}: {verdict.error_message}",
            kind=verdict.error_kind,
            exit_code=verdict.exit_code,
            rank=verdict.rank,
        )

    async def _judge(self, phase: str, deadline_s: float) -> PhaseVerdict:
        """The lowest-ranked error of the phase; else which ranks are missing; else success."""
        collected = await self._pending.collect(
            PhaseReport, phase, range(self.world_size), deadline_s, hurry_s=_grace_s
        )
        for rank, report in collected.messages.items():
            if report.error_kind is not None:
                return PhaseVerdict(
                    phase, rank, report.error_kind, report.error_message, report.exit_code
                )
        if not collected.missing:
            return PhaseVerdict(phase)
        what = f"finish the phase {phase!r}"
        return _verdict(phase, _NO_RANK, self._deadline_error(collected.missing, what, deadline_s))

    async def barrier(self, name: str, deadline_s: float) -> None:
        """Return when every rank has called this with `name`.

        Raises:
            DeadlineError: a rank did not come within `deadline_s`.
        """
        self.send(_HEAD, BarrierEntered(name))
        if self.is_head:
            what = f"reach the barrier {name!r}"
            await self._from_all(BarrierEntered, name, deadline_s, what)
            self._send_to_others(BarrierReleased(name))
        else:
            await self._from_head(BarrierReleased, name, deadline_s)

    async def gather(self, name: str, payload: bytes, deadline_s: float) -> list[bytes] | None:
        """Every rank's payload in rank order on the head, None elsewhere (which does not wait).

        Raises:
            DeadlineError: on the head: a part did not come within `deadline_s`.
        """
        self.send(_HEAD, GatherPart(name, payload))
        if not self.is_head:
            return None
        what = f"send its part of {name!r}"
        parts = await self._from_all(GatherPart, name, deadline_s, what)
        return [part.payload for part in parts]

    async def broadcast(self, name: str, payload: bytes | None, deadline_s: float) -> bytes:
        """The head's payload on every rank; other ranks pass None. The head does not wait.

        Raises:
            DeadlineError: the head sent nothing within `deadline_s`.
        """
        if not self.is_head:
            return (await self._from_head(Broadcast, name, deadline_s)).payload
        assert payload is not None, f"the head broadcasts {name!r} without a payload"
        self._send_to_others(Broadcast(name, payload))
        return payload

    # ---- parts of the collectives ----------------------------------------------------------------

    async def _from_head(
        self, kind: type[CollectiveT], name: str, deadline_s: float
    ) -> CollectiveT:
        """The head's next `kind` under `name`.

        Waits longer than the head does itself, because the head can say which rank is missing.
        """
        limit_s = deadline_s + _GRACE_S
        collected = await self._pending.collect(kind, name, (_HEAD,), limit_s)
        if collected.missing:
            what = f"send {kind.__name__} {name!r}"
            raise self._deadline_error(collected.missing, what, limit_s)
        return collected.messages[_HEAD]

    async def _from_all(
        self, kind: type[CollectiveT], name: str, deadline_s: float, what: str
    ) -> list[CollectiveT]:
        """Every rank's next `kind` under `name`, in rank order."""
        ranks = range(self.world_size)
        collected = await self._pending.collect(kind, name, ranks, deadline_s)
        if collected.missing:
            raise self._deadline_error(collected.missing, what, deadline_s)
        return list(collected.messages.values())

    def _label(self, rank: int) -> str:
        host = self._hosts.get(rank)
        return f"rank {rank}" if host is None else f"rank {rank} on {host}"

    def _deadline_error(
        self, missing: tuple[int, ...], what: str, waited_s: float
    ) -> DeadlineError:
        return DeadlineError(
            f"{', '.join(map(self._label, missing))} did not {what} within {waited_s:g} s; "
            "most likely it died, hangs or is still busy (its log says what it did last), or not "
            "all ranks were started; mend that, or allow more time"
        )


def _grace_s(report: PhaseReport) -> float | None:
    """Seconds that the other ranks have to report once this one has; None: as long as they need."""
    if report.error_kind is None:
        return None
    return _STOP_GRACE_S if report.error_kind in _STOPS else _GRACE_S


def _report(phase: str, rank: int, error: MpipipeError | None) -> PhaseReport:
    if error is None:
        return PhaseReport(phase, rank)
    return PhaseReport(phase, rank, type(error).__name__, str(error), error.exit_code)


def _verdict(phase: str, rank: int, error: MpipipeError | None) -> PhaseVerdict:
    if error is None:
        return PhaseVerdict(phase)
    return PhaseVerdict(phase, rank, type(error).__name__, str(error), error.exit_code)


# ---- what must be alike on all ranks -------------------------------------------------------------

_SAME_INSTALLATION = (
    "different installations were started: install the same version of mpipipe on every host"
)
_SAME_CONFIGURATION = (
    "they read different configurations: give every rank the same file and the same overrides, and "
    "check that the file is the same on both hosts"
)


def find_mismatch(hellos: Sequence[Hello]) -> str | None:
    """The first difference to the first of `hellos` as a sentence; None when all fit."""
    for hello in hellos[1:]:
        for what, head_value, value, remedy in _compared(hellos[0], hello):
            if head_value != value:
                return (
                    f"rank {hellos[0].rank} on {hellos[0].host} has {what} {head_value}, but rank "
                    f"{hello.rank} on {hello.host} has {value}; {remedy}"
                )
    return None


def _compared(head: Hello, other: Hello) -> tuple[tuple[str, object, object, str], ...]:
    """(what it is, the head's value, the other's value, what to do) in order of explanation."""
    return (
        (
            "protocol version",
            head.protocol_version,
            other.protocol_version,
            _SAME_INSTALLATION,
        ),
        ("package version", head.package_version, other.package_version, _SAME_INSTALLATION),
        (
            "a world of size",
            head.world_size,
            other.world_size,
            "they belong to different launches: start all ranks with one mpirun or srun command",
        ),
        (
            "configuration hash",
            head.config_hash,
            other.config_hash,
            _SAME_CONFIGURATION,
        ),
    )
