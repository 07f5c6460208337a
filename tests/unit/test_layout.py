"""Which rank runs which stage, on which cores."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from mpipipe.config.schema import Config
from mpipipe.errors import MpipipeError
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.layout import (
    cores_of_ranks,
    note_cores,
    note_layout,
    stage_order,
    threads_per_rank,
)
from mpipipe.planning.plan import Decisions
from mpipipe.planning.resources import RankResources
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.host import Core
from tests.unit.planned_rank import make_rank
from tests.unit.test_resolve import GIB, LAYER_BYTES, MATRIX_BYTES, plan, ranks

SOCKET = 4  # cores


def core(number: int) -> Core:
    """Two hardware threads; the second ones are numbered after all first ones."""
    return (number, number + 2 * SOCKET)


def cores(*numbers: int) -> tuple[Core, ...]:
    return tuple(core(number) for number in numbers)


HOST = cores(*range(2 * SOCKET))
NEAR = [tuple(cpu for n in range(SOCKET) for cpu in core(s * SOCKET + n)) for s in (0, 1)]


def world(*sockets: int) -> list[RankResources]:
    """Unbound ranks of one host whose GPUs hang on these sockets."""
    return [
        make_rank(
            rank,
            num_cores=16,
            num_allowed_cpus=16,
            gpu=GpuFacts(index=0, name="GPU", capability=80),
            gpu_cpus=NEAR[s],
            cores=HOST,
        )
        for rank, s in enumerate(sockets)
    ]


# ---- stages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "order"),
    [
        ("a", (0,)),
        ("aabb", (0, 1, 2, 3)),
        ("abab", (0, 2, 1, 3)),
        ("abcabc", (0, 3, 1, 4, 2, 5)),
        ("baab", (0, 3, 1, 2)),
        ("abb", (0, 1, 2)),
    ],
)
def test_stages_of_a_host_follow_each_other(hosts: str, order: tuple[int, ...]) -> None:
    assert stage_order(ranks(*hosts)) == order


def test_no_layout_has_fewer_edges_between_hosts_and_the_head_stays_first() -> None:
    draw = random.Random(5)
    for _ in range(200):
        hosts = draw.choices("abcd", k=draw.randint(1, 9))
        places = ranks(*hosts)
        draw.shuffle(places)
        order = stage_order(places)
        assert sorted(order) == list(range(len(hosts)))
        assert order[0] == 0
        crossing = sum(hosts[a] != hosts[b] for a, b in itertools.pairwise(order))
        assert crossing == len(set(hosts)) - 1  # hosts cannot be joined by fewer edges


def test_the_plan_follows_the_layout() -> None:
    made = plan(ranks("a", "b", "a", "b"))
    assert [(s.stage, s.rank, s.host) for s in made.stages] == [
        (0, 0, "a"),
        (1, 2, "a"),
        (2, 1, "b"),
        (3, 3, "b"),
    ]
    assert [(s.has_embedding, s.has_head) for s in made.stages][::3] == [
        (True, False),
        (False, True),
    ]
    assert (made.head_rank, made.stages[-1].rank) == (0, 3)
    assert made.stage_of_rank(1).stage == 2
    assert [s.first_layer for s in made.stages] == sorted(s.first_layer for s in made.stages)


def test_memory_is_judged_on_the_host_that_a_stage_runs_on() -> None:
    """Rank 1 runs the last stage: six layers and the LM head, not the middle's twelve layers."""
    places = ranks("a", "b", "a")
    assert [(s.host, s.num_layers) for s in plan(places).stages] == [
        ("a", 12),
        ("a", 12),
        ("b", 6),
    ]
    places[1] = replace(places[1], memory_available_bytes=10 << 20)
    needed = (LAYER_BYTES * 6 + MATRIX_BYTES) / GIB
    with pytest.raises(MpipipeError, match=f"rank 1 on b would hold {needed:.2f} GiB of weights"):
        plan(places)


def test_the_layout_is_printed_where_there_are_several_hosts() -> None:
    (line,) = [s for s in plan_lines(plan(ranks("a", "b", "a", "b"))) if "pipeline.layout" in s]
    assert "a: ranks 0 2 | b: ranks 1 3" in line
    assert "1 of 3 edges between hosts, in the order of ranks it would be 3" in line
    assert "pipeline.layout" not in "".join(plan_lines(plan(ranks("a", "a"))))


def test_one_rank_a_host_has_no_better_order_to_boast_of() -> None:
    decisions = Decisions(Config())
    note_layout(ranks("a", "b"), decisions)
    assert decisions.notes[0].value == "a: rank 0 | b: rank 1"
    assert decisions.notes[0].reason == "1 of 1 edges between hosts"


# ---- cores ---------------------------------------------------------------------------------------


def test_a_rank_gets_the_cores_of_its_gpus_socket() -> None:
    assert cores_of_ranks("auto", world(1, 0)) == {0: HOST[SOCKET:], 1: HOST[:SOCKET]}


def test_ranks_whose_gpus_share_a_socket_share_its_cores_out() -> None:
    assert cores_of_ranks("auto", world(0, 0, 1, 1)) == {
        0: cores(0, 1),
        1: cores(2, 3),
        2: cores(4, 5),
        3: cores(6, 7),
    }


def test_uneven_shares_leave_no_core_out_and_give_none_twice() -> None:
    shares = cores_of_ranks("auto", world(0, 0, 0))
    assert [c for rank in range(3) for c in shares[rank]] == list(HOST[:SOCKET])
    assert sorted(map(len, shares.values())) == [1, 1, 2]


def test_more_ranks_than_cores_of_a_socket_share_all_of_them() -> None:
    shares = cores_of_ranks("auto", world(*[0] * 5))
    assert set(shares.values()) == {HOST[:SOCKET]}


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([replace(r, gpu_cpus=()) for r in world(0, 1)], id="unknown where the GPU is"),
        pytest.param(
            [replace(r, gpu_cpus=tuple(range(16))) for r in world(0, 1)], id="a single socket"
        ),
        pytest.param(
            [replace(r, cores=HOST[:SOCKET]) for r in world(1, 1)], id="no core near the GPU"
        ),
        pytest.param([replace(world(0)[0], cores=HOST[1:5])], id="bound by its launcher"),
        pytest.param(
            [
                replace(r, cores=c, num_allowed_cpus=8)
                for r, c in zip(world(0, 1), (HOST[1:5], HOST[2:6]), strict=True)
            ],
            id="bound each in a cpuset of its own",
        ),
        pytest.param([*world(0), replace(world(0, 1)[1], gpu=GpuFacts())], id="computes on CPUs"),
    ],
)
def test_a_rank_stays_where_it_was_launched(places: list[RankResources]) -> None:
    assert cores_of_ranks("auto", places) == {rank.rank: rank.cores for rank in places}
    decisions = Decisions(Config())
    note_cores("auto", places, decisions)
    assert decisions.notes == []


def test_binding_can_be_switched_off() -> None:
    assert set(cores_of_ranks("none", world(0, 1)).values()) == {HOST}


def test_binding_stays_within_the_cores_of_the_job() -> None:
    job = [replace(r, cores=HOST[2:6], num_allowed_cpus=8) for r in world(0, 1)]
    assert cores_of_ranks("auto", job) == {0: HOST[2:4], 1: HOST[4:6]}


def test_the_plan_says_who_was_bound() -> None:
    decisions = Decisions(Config())
    note_cores("auto", world(0, 1), decisions)
    assert decisions.notes[0].value == "rank 0: 0-3,8-11 | rank 1: 4-7,12-15"


# ---- threads -------------------------------------------------------------------------------------


def unbound(num_ranks: int) -> list[RankResources]:
    return [replace(rank, gpu=GpuFacts(), gpu_cpus=()) for rank in world(*[0] * num_ranks)]


def bound(*shares: tuple[Core, ...]) -> list[RankResources]:
    return [
        replace(rank, cores=share, num_cores=sum(map(len, share)))
        for rank, share in zip(unbound(len(shares)), shares, strict=True)
    ]


@pytest.mark.parametrize(("num_ranks", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (20, 1)])
def test_a_thread_per_physical_core_is_shared_among_the_ranks_of_a_host(
    num_ranks: int, threads: int
) -> None:
    assert threads_per_rank("auto", unbound(num_ranks))[0] == threads


def test_a_rank_that_was_bound_need_not_share() -> None:
    value, reason = threads_per_rank("auto", bound(HOST[:SOCKET], HOST[SOCKET:]))
    assert value == SOCKET
    assert "4 physical cores with 8 CPUs" in reason
    assert "the launcher has bound rank 0" in reason
    assert "bind-to" not in reason  # all of the host is in use


def test_a_rank_bound_to_one_core_of_many_is_told_how_to_get_more() -> None:
    """What Open MPI does to one or two ranks unless asked not to."""
    value, reason = threads_per_rank("auto", bound(cores(0), cores(1)))
    assert value == 1
    assert "to 2 of 16 CPUs (mpirun --bind-to none, srun --cpus-per-task=N give more)" in reason


def test_the_rank_with_the_fewest_cores_decides() -> None:
    assert threads_per_rank("auto", bound(HOST[:1], HOST[1:]))[0] == 1


def test_a_cpu_quota_is_shared_whatever_the_masks() -> None:
    limited = [replace(rank, num_cores=6) for rank in unbound(2)]
    assert threads_per_rank("auto", limited)[0] == 3


def test_threads_follow_the_binding_near_the_gpus() -> None:
    assert threads_per_rank("auto", world(0, 0, 1))[0] == 2
    assert threads_per_rank("none", world(0, 0, 1))[0] == 2
    assert threads_per_rank("auto", world(0, 1))[0] == 4
