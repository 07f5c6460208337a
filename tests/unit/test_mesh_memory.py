"""Several virtual ranks in one loop: messages, collectives, and what happens when a rank is off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from mpipipe.clock import Clock, MonotonicClock, ScriptedClock
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import (
    Echo,
    Heartbeat,
    Hello,
    RequestClosed,
    RequestOpened,
    SessionEnded,
    StepSampled,
)
from mpipipe.errors import (
    ChannelClosedError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    MpipipeError,
    ProtocolMismatchError,
    RemoteError,
)
from mpipipe.metrics.lines import MessageRecord
from mpipipe.planning.resources import RankResources
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.types import SamplingParams

LIMIT_S = 20
LONG_S = 1000.0  # on the clock: never reached unless the test advances it
Body = Callable[[Mesh], Awaitable[None]]


def run_world(
    world_size: int, body: Body, clock: Clock | None = None
) -> list[BaseException | None]:
    """Run `body` on every virtual rank; the outcome of each."""

    async def main() -> list[BaseException | None]:
        engine = ProgressEngine()
        meshes = [
            Mesh(channel, engine, clock or MonotonicClock())
            for channel in open_memory_channels(world_size, engine)
        ]
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(engine.run())
            for mesh in meshes:
                mesh.start()
            outcomes = await asyncio.gather(*map(body, meshes), return_exceptions=True)
            for mesh in meshes:
                await mesh.aclose()
            running.cancel()
        return outcomes

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def run_all_well(world_size: int, body: Body, clock: Clock | None = None) -> None:
    for outcome in run_world(world_size, body, clock):
        if outcome is not None:
            raise outcome


def hello(rank: int, world_size: int) -> Hello:
    resources = RankResources(rank, f"node{rank}", 100, "mpich", 2, 1 << 30)
    return Hello(rank, world_size, 1, "0.1.0", "config-a", resources)


@pytest.fixture(params=[1, 2, 4])
def world_size(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


# ---- messages ------------------------------------------------------------------------------------


def test_messages_reach_every_rank_the_own_one_included_in_order(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        mailbox = mesh.mailbox(StepSampled)
        for step in range(20):
            for to in range(mesh.world_size):
                mesh.send(to, StepSampled(step, (mesh.rank, to)))
        steps: dict[int, list[int]] = {rank: [] for rank in range(mesh.world_size)}
        for _ in range(20 * mesh.world_size):
            source, message = await mailbox.get()
            assert isinstance(message, StepSampled)
            assert message.token_ids == (source, mesh.rank)
            steps[source].append(message.step)
        assert all(found == list(range(20)) for found in steps.values())
        assert mailbox.get_nowait() is None

    run_all_well(world_size, body)


def test_a_group_hears_itself_and_no_other_rank_and_keeps_the_numbers_of_the_world() -> None:
    async def body(mesh: Mesh) -> None:
        ranks = (0, 2) if mesh.rank % 2 == 0 else (1, 3)
        group = RankGroup(mesh, ranks)
        inbox = group.mailbox(RequestClosed)
        assert group.rank == mesh.rank
        if mesh.rank == ranks[0]:
            group.broadcast_message(RequestClosed((mesh.rank,)))
        assert await inbox.get() == (ranks[0], RequestClosed((ranks[0],)))
        if mesh.rank == ranks[-1]:
            group.send(ranks[0], RequestClosed((7,)))
        if mesh.rank == ranks[0]:
            assert await inbox.get() == (ranks[-1], RequestClosed((7,)))
        await mesh.barrier("all", LONG_S)
        assert inbox.num_waiting == 0

    run_all_well(4, body)


def test_messages_wait_for_their_mailbox_and_keep_their_order_across_types() -> None:
    opened = RequestOpened(1, (5, 6), SamplingParams())

    async def body(mesh: Mesh) -> None:
        if mesh.rank == 0:
            mesh.send(1, opened)
            mesh.send(1, Echo(1, b"", reply=False))
            mesh.send(1, RequestClosed((1,)))
            await mesh.barrier("sent", LONG_S)
            return
        await mesh.barrier("sent", LONG_S)  # now all three are here
        requests = mesh.mailbox(RequestOpened, RequestClosed)
        assert [await requests.get(), await requests.get()] == [
            (0, opened),
            (0, RequestClosed((1,))),
        ]
        assert requests.get_nowait() is None
        assert await mesh.mailbox(Echo).get() == (0, Echo(1, b"", reply=False))

    run_all_well(2, body)


def test_broadcast_message_goes_to_all_ranks(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        mailbox = mesh.mailbox(SessionEnded)
        if mesh.is_head:
            mesh.broadcast_message(SessionEnded())
        assert await mailbox.get() == (0, SessionEnded())

    run_all_well(world_size, body)


def test_a_message_to_the_own_rank_is_not_encoded() -> None:
    async def body(mesh: Mesh) -> None:
        mailbox = mesh.mailbox(StepSampled)
        message = StepSampled(1, (2,))
        mesh.send(mesh.rank, message)
        _, received = await mailbox.get()
        assert received is message

    run_all_well(1, body)


def test_a_cancelled_reader_loses_no_message() -> None:
    async def body(mesh: Mesh) -> None:
        mailbox = mesh.mailbox(StepSampled)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await mailbox.get()
        mesh.send(0, StepSampled(1, ()))
        assert await mailbox.get() == (0, StepSampled(1, ()))

    run_all_well(1, body)


def test_closing_wakes_readers_and_refuses_what_is_sent_later() -> None:
    async def body(mesh: Mesh) -> None:
        if mesh.rank == 1:
            return
        mailbox = mesh.mailbox(StepSampled)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(closed(mailbox.get()))
            await asyncio.sleep(0)
            await mesh.aclose()
            await mesh.aclose()
            await reading
        with pytest.raises(ChannelClosedError):
            mesh.send(1, SessionEnded())

    run_all_well(2, body)


async def closed(reading: Awaitable[object]) -> None:
    with pytest.raises(ChannelClosedError):
        await reading


def test_garbage_on_the_wire_ends_the_engine_with_a_protocol_mismatch() -> None:
    async def main() -> None:
        engine = ProgressEngine()
        channels = open_memory_channels(2, engine)
        mesh = Mesh(channels[1], engine, MonotonicClock())
        mesh.start()
        channels[0].send_nowait(1, b"\xc1")
        async with asyncio.timeout(LIMIT_S):
            await engine.run()

    with (
        pytest.raises(ProtocolMismatchError, match="could not be read"),
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        runner.run(main())


# ---- handshake -----------------------------------------------------------------------------------


def test_after_the_handshake_every_rank_knows_every_rank(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        hellos = await mesh.handshake(hello(mesh.rank, mesh.world_size), LONG_S)
        assert hellos == tuple(hello(rank, mesh.world_size) for rank in range(mesh.world_size))

    run_all_well(world_size, body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"package_version": "0.2.0"}, ["package version 0.1.0", "has 0.2.0", "install the same"]),
        ({"protocol_version": 9}, ["protocol version 1", "has 9"]),
        ({"config_hash": "config-b"}, ["configuration hash config-a", "has config-b"]),
        ({"world_size": 1}, ["a world of size 3", "has 1", "one mpirun or srun"]),
    ],
)
def test_a_mismatch_names_both_ranks_hosts_and_values_on_all_ranks(
    change: dict[str, object], said: list[str]
) -> None:
    async def body(mesh: Mesh) -> None:
        mine = hello(mesh.rank, 3)
        if mesh.rank == 2:
            mine = replace(mine, **change)  # type: ignore[arg-type]
        await mesh.handshake(mine, LONG_S)

    for outcome in run_world(3, body):
        assert isinstance(outcome, ProtocolMismatchError)
        for part in [*said, "rank 0 on node0", "rank 2 on node2"]:
            assert part in str(outcome)


def test_a_rank_that_does_not_greet_is_named_to_all_who_did() -> None:
    clock = ScriptedClock()

    async def body(mesh: Mesh) -> None:
        if mesh.rank == 2:
            clock.advance(31)
            return
        await mesh.handshake(hello(mesh.rank, 3), 30)

    *greeted, silent = run_world(3, body, clock)
    assert silent is None
    for outcome in greeted:
        assert isinstance(outcome, DeadlineError)
        assert "rank 2 did not greet the head within 30 s" in str(outcome)


# ---- agree ---------------------------------------------------------------------------------------


def test_agree_returns_when_all_ranks_did_well(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        for phase in ("load", "load", "warm-up"):
            await mesh.agree(phase, None, LONG_S)

    run_all_well(world_size, body)


def test_the_failing_rank_raises_its_own_error_and_the_others_hear_of_it() -> None:
    error = CheckpointError("shard 2 is truncated")

    async def body(mesh: Mesh) -> None:
        await mesh.handshake(hello(mesh.rank, 3), LONG_S)
        await mesh.agree("load", error if mesh.rank == 1 else None, LONG_S)

    outcomes = run_world(3, body, ScriptedClock())
    assert outcomes[1] is error
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, RemoteError)
        assert str(outcome) == "rank 1 on node1: shard 2 is truncated"
        assert (outcome.kind, outcome.exit_code, outcome.rank) == ("CheckpointError", 3, 1)


def test_of_several_errors_the_head_raises_that_of_the_lowest_rank() -> None:
    errors: dict[int, MpipipeError] = {1: ConfigError("one"), 3: CheckpointError("three")}

    async def body(mesh: Mesh) -> None:
        if mesh.rank == 1:  # last to report, lowest all the same
            for _ in range(20):
                await asyncio.sleep(0)
        await mesh.agree("load", errors.get(mesh.rank), LONG_S)

    outcomes = run_world(4, body, ScriptedClock())
    assert isinstance(outcomes[0], RemoteError)
    assert (outcomes[0].rank, str(outcomes[0])) == (1, "rank 1: one")
    assert outcomes[1] is errors[1]
    assert isinstance(outcomes[2], RemoteError)
    assert outcomes[3] is errors[3]


def test_a_failure_is_not_hidden_by_a_rank_that_never_reports() -> None:
    clock = ScriptedClock()

    async def body(mesh: Mesh) -> None:
        if mesh.rank == 2:
            for _ in range(20):
                await asyncio.sleep(0)
            clock.advance(6)  # more than the time the others get after a failure, far from 600 s
            return
        await mesh.agree("load", ConfigError("no") if mesh.rank == 1 else None, 600)

    outcomes = run_world(3, body, clock)
    assert isinstance(outcomes[0], RemoteError)
    assert outcomes[0].rank == 1
    assert isinstance(outcomes[1], ConfigError)


def test_ranks_that_do_not_report_in_time_are_named_with_their_hosts_everywhere() -> None:
    clock = ScriptedClock()

    async def body(mesh: Mesh) -> None:
        await mesh.handshake(hello(mesh.rank, 4), LONG_S)
        if mesh.rank in {1, 3}:
            for _ in range(20):
                await asyncio.sleep(0)
            clock.advance(31)
            return
        await mesh.agree("load", None, 60)

    outcomes = run_world(4, body, clock)
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, DeadlineError)
        assert "rank 1 on node1, rank 3 on node3 did not finish the phase 'load'" in str(outcome)
        assert "within 60 s" in str(outcome)


# ---- barrier, gather, broadcast ------------------------------------------------------------------


def test_no_rank_leaves_a_barrier_before_all_are_there(world_size: int) -> None:
    there = 0

    async def body(mesh: Mesh) -> None:
        nonlocal there
        for number in range(1, 4):
            for _ in range(mesh.rank * 3):
                await asyncio.sleep(0)
            there += 1
            await mesh.barrier("round", LONG_S)
            assert there >= number * mesh.world_size

    run_all_well(world_size, body)


def test_a_barrier_names_who_is_missing_how_long_was_waited_and_what_to_do() -> None:
    clock = ScriptedClock()

    async def body(mesh: Mesh) -> None:
        if mesh.rank == 1:
            for _ in range(20):
                await asyncio.sleep(0)
            clock.advance(2.5)
            return
        await mesh.barrier("warm-up", 2.5 if mesh.is_head else LONG_S)

    head, _ = run_world(2, body, clock)
    assert isinstance(head, DeadlineError)
    assert "rank 1 did not reach the barrier 'warm-up' within 2.5 s" in str(head)
    assert "log" in str(head)


def test_a_rank_whose_head_is_silent_names_the_head() -> None:
    clock = ScriptedClock()

    async def body(mesh: Mesh) -> None:
        if mesh.is_head:
            for _ in range(20):
                await asyncio.sleep(0)
            clock.advance(100)
            return
        await mesh.broadcast("plan", None, 30)

    _, outcome = run_world(2, body, clock)
    assert isinstance(outcome, DeadlineError)
    assert "rank 0 did not send" in str(outcome)


def test_gather_is_in_rank_order_on_the_head_and_none_elsewhere(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        for number in range(3):
            for _ in range(mesh.world_size - mesh.rank):
                await asyncio.sleep(0)
            parts = await mesh.gather("metrics", b"%d of %d" % (mesh.rank, number), LONG_S)
            if mesh.is_head:
                assert parts == [b"%d of %d" % (rank, number) for rank in range(mesh.world_size)]
            else:
                assert parts is None

    run_all_well(world_size, body)


def test_broadcast_gives_every_rank_the_heads_payload(world_size: int) -> None:
    async def body(mesh: Mesh) -> None:
        for number in range(3):
            payload = b"plan %d" % number if mesh.is_head else None
            assert await mesh.broadcast("plan", payload, LONG_S) == b"plan %d" % number

    run_all_well(world_size, body)


def test_a_rank_that_is_ahead_does_not_disturb_collectives_of_other_names() -> None:
    async def body(mesh: Mesh) -> None:
        if not mesh.is_head:
            await mesh.gather("late", b"late", LONG_S)
            await mesh.gather("early", b"early", LONG_S)
            return
        assert await mesh.gather("early", b"", LONG_S) == [b"", b"early"]
        assert await mesh.gather("late", b"", LONG_S) == [b"", b"late"]

    run_all_well(2, body)


def test_a_message_has_the_same_number_at_both_of_its_ends() -> None:
    """Also where the ranks begin to record at different times; those to oneself travel nowhere."""
    told: dict[int, list[MessageRecord]] = {0: [], 1: []}

    async def body(mesh: Mesh) -> None:
        async def meet(name: str) -> None:
            await mesh.barrier(name, LONG_S)

        if mesh.rank == 0:
            mesh.on_message = told[0].append
        await meet("first")
        mesh.on_message = told[mesh.rank].append
        await meet("second")
        mesh.send_quietly([1 - mesh.rank], Heartbeat())
        mesh.send(mesh.rank, StepSampled(1, (2,)))
        await meet("third")
        mesh.on_message = None
        await meet("fourth")

    run_all_well(2, body, ScriptedClock(5.0))
    for sender, receiver in ((0, 1), (1, 0)):
        sent = {r.number: (r.kind, r.num_bytes) for r in told[sender] if r.way == "sent"}
        got = {r.number: (r.kind, r.num_bytes) for r in told[receiver] if r.way == "received"}
        assert len(sent) >= 3
        both = sent.keys() & got.keys()
        assert len(both) >= 3
        assert {number: sent[number] for number in both} == {n: got[n] for n in both}
        assert any(kind == "Heartbeat" for kind, _ in got.values())
        assert all(num_bytes > 0 for _, num_bytes in sent.values())
    records = [*told[0], *told[1]]
    assert {record.at_s for record in records} == {5.0}
    assert not [record for record in records if record.kind == "StepSampled"]
