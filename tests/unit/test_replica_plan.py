"""How the ranks are cut into replicas, and what each of them is planned with."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from mpipipe.config.load import load_config
from mpipipe.config.schema import Config, MemoryConfig, PipelineConfig
from mpipipe.errors import ConfigError, EnvironmentSetupError
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.layout import Layout, Place, lay_out, sharing
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.replica_rates import predicted_rate
from mpipipe.planning.resolve import choose_layout, make_plans
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload
from mpipipe.topology.gpu import GpuFacts
from tests.unit.model_specs import OPENLLAMA_3B, SMOL
from tests.unit.planned_rank import make_rank
from tests.unit.test_resolve import GIB, LAYER_BYTES, MATRIX_BYTES, ranks

AUTO = "auto"


def cut(hosts: str, replicas: int | str, num_stages: int | str = AUTO, **settings: int) -> str:
    """The replicas as text: ranks joined, replicas apart."""
    pipeline = PipelineConfig(replicas=replicas, num_stages=num_stages)
    layout = lay_out(ranks(*hosts), pipeline, **settings)
    return " ".join("".join(map(str, members)) for members in layout.replicas)


@pytest.mark.parametrize(
    ("hosts", "replicas", "num_stages", "expected"),
    [
        ("aaaa", 1, AUTO, "0123"),
        ("aaaa", 1, 4, "0123"),
        ("aaaa", 2, AUTO, "01 23"),
        ("aaaa", 2, 2, "01 23"),
        ("aaaa", 4, 1, "0 1 2 3"),
        ("aaaa", AUTO, 2, "01 23"),
        ("abab", 2, 2, "02 13"),  # neighbours on one node
        ("abb", 2, AUTO, "01 2"),
        ("aaaaa", 2, AUTO, "012 34"),  # a rank that is left over makes one longer
    ],
)
def test_neighbours_make_a_replica(
    hosts: str, replicas: int | str, num_stages: int | str, expected: str
) -> None:
    assert cut(hosts, replicas, num_stages) == expected


@pytest.mark.parametrize(
    ("hosts", "least_stages", "expected"),
    [
        ("aaaa", 1, "0 1 2 3"),
        ("aaaaa", 2, "012 34"),
        ("aaabbb", 2, "012 345"),  # three of two would make one cross the hosts
        ("aabbb", 2, "01 234"),
        ("abcd", 2, "01 23"),  # no host holds one
        ("aaab", 2, "01 23"),
        ("aaa", 2, "012"),
    ],
)
def test_auto_makes_as_many_as_the_ranks_hold(hosts: str, least_stages: int, expected: str) -> None:
    assert cut(hosts, AUTO, least_stages=least_stages) == expected


def test_every_rank_is_in_one_replica_and_rank_0_is_the_first_head() -> None:
    random = Random(3)
    for _ in range(200):
        world = ranks(*random.choices("abcd", k=random.randint(1, 12)))
        least = random.randint(1, 4)
        layout = lay_out(world, PipelineConfig(replicas=AUTO), least_stages=least)
        assert sorted(rank for members in layout.replicas for rank in members) == list(
            range(len(world))
        )
        assert layout.replicas[0][0] == 0
        assert len(layout.replicas) == 1 or layout.least_stages >= least


@pytest.mark.parametrize(
    ("num_ranks", "replicas", "num_stages", "told"),
    [
        (2, 1, 3, "pipeline.num_stages = 3, but there are 2 ranks, and every stage is one rank"),
        (4, 1, 2, 'or set pipeline.num_stages = 4, or pipeline.replicas = "auto"'),
        (3, 2, 2, "take 4 ranks, but there are 3 ranks: start `mpirun -n 4 mpipipe run …`"),
        (2, 3, AUTO, "pipeline.replicas = 3, but there are 2 ranks, and every replica takes"),
        (5, AUTO, 2, "pipeline.num_stages = 2: rank 4 would be left over; start `mpirun -n 4"),
        (1, AUTO, 2, "rank 0 would be left over; start `mpirun -n 2"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(
    num_ranks: int, replicas: int | str, num_stages: int | str, told: str
) -> None:
    with pytest.raises(EnvironmentSetupError) as raised:
        cut("a" * num_ranks, replicas, num_stages)
    assert told in str(raised.value)


def test_a_number_of_replicas_is_a_count_or_auto() -> None:
    with pytest.raises(ConfigError, match=r'pipeline.replicas = 0 is out of range: .* or "auto"'):
        load_config(Path("demo:smollm2"), ["pipeline.replicas=0"])


def test_a_layout_knows_the_place_of_each_rank() -> None:
    layout = Layout(((0, 2, 4), (1, 3)))
    assert [layout.place_of(rank) for rank in range(5)] == [
        Place(0, 0),
        Place(1, 0),
        Place(0, 1),
        Place(1, 1),
        Place(0, 2),
    ]
    assert (layout.least_stages, layout.most_stages) == (2, 3)


def plans(
    world: list[RankResources],
    workload: Workload = Workload(),  # noqa: B008 - frozen
    *,
    replicas: int = 1,
) -> tuple[PipelinePlan, ...]:
    config = Config(pipeline=PipelineConfig(replicas=replicas))
    return make_plans(config, SMOL, world, "/models/smol", workload)


def test_each_replica_has_all_layers_on_its_own_ranks() -> None:
    made = plans(ranks(*"abab"), replicas=2)
    assert [plan.ranks for plan in made] == [(0, 2), (1, 3)]
    assert [plan.head_rank for plan in made] == [0, 1]
    assert [(plan.replica, plan.num_replicas) for plan in made] == [(0, 2), (1, 2)]
    for plan in made:
        assert sum(stage.num_layers for stage in plan.stages) == SMOL.num_layers
        assert plan.transport == "mpi"
    assert [[stage.host for stage in plan.stages] for plan in made] == [["a", "a"], ["b", "b"]]


def test_the_plan_says_which_ranks_make_which_replica() -> None:
    def told(hosts: str, replicas: int) -> tuple[str, str]:
        plan = plans(ranks(*hosts), replicas=replicas)[-1]
        (note,) = [entry for entry in plan.resolved if entry.setting == "pipeline.replica_ranks"]
        assert any(note.value in line for line in plan_lines(plan))
        return note.value, note.reason

    assert told("abab", 2) == (
        "replica 0: ranks 0 2 on a | replica 1: ranks 1 3 on b",
        "neighbours; none is between hosts",
    )
    assert told("aab", 2) == (
        "replica 0: ranks 0 1 on a | replica 1: rank 2 on b",
        "neighbours; none is between hosts",
    )
    assert told("abb", 2) == (
        "replica 0: ranks 0 1 on a b | replica 1: rank 2 on b",
        "1 of 2 between hosts",
    )
    many, _ = told("a" * 10, 10)
    assert many.endswith("replica 7: rank 7 on a | and 2 more")
    alone = plans(ranks("a", "b"), replicas=1)[0]
    assert not any(entry.setting == "pipeline.replica_ranks" for entry in alone.resolved)


def test_replicas_of_one_stage_send_no_tensors_and_a_longer_one_makes_all_open_the_transport() -> (
    None
):
    assert {plan.transport for plan in plans(ranks("a", "a"), replicas=2)} == {"loopback"}
    longer = plans(ranks(*"aaa"), replicas=2)
    assert [(plan.num_stages, plan.transport) for plan in longer] == [(2, "mpi"), (1, "mpi")]


def test_a_replica_gets_its_share_of_requests_memory_and_cores() -> None:
    alone = plans(ranks("a", memory=8 * GIB), Workload(100, 64, 3200, 3200))[0]
    world = ranks("a", "a", memory=16 * GIB)
    made = plans(world, Workload(200, 64, 6400, 6400), replicas=2)
    assert [plan.num_kv_pages for plan in made] == [alone.num_kv_pages] * 2
    assert [plan.threads_per_rank for plan in made] == [4, 4]
    assert alone.threads_per_rank == 8


def test_what_others_of_a_host_and_of_a_gpu_share_is_divided() -> None:
    gpu = GpuFacts(index=0, name="GPU", uuid="GPU-1", capability=80, free_bytes=8 * GIB)
    own = replace(gpu, uuid="GPU-2")
    world = [make_rank(0, gpu=gpu), make_rank(1, gpu=gpu), make_rank(2, gpu=own)]
    world.append(make_rank(3, "node2", gpu=own))
    first, second = sharing(world, (0, 2))
    assert first.memory_available_bytes == second.memory_available_bytes
    assert first.memory_available_bytes == world[0].memory_available_bytes * 2 // 3
    assert (first.gpu.free_bytes, second.gpu.free_bytes) == (4 * GIB, 8 * GIB)
    assert sharing(world, (3,)) == [world[3]]


def layout_of(
    world: list[RankResources],
    workload: Workload = Workload(),  # noqa: B008 - frozen
    memory: MemoryConfig | None = None,
) -> Layout:
    config = Config(pipeline=PipelineConfig(replicas=AUTO), memory=memory or MemoryConfig())
    return choose_layout(config, SMOL, world, workload)


def test_auto_takes_one_rank_for_a_replica_where_the_model_fits_one() -> None:
    layout = layout_of(ranks("a", "a"), Workload(8, 64, 256, 256))
    assert layout.replicas == ((0,), (1,))
    assert re.fullmatch(
        r"a rank holds the model; predicted to be \d\.\d\d times as fast as the next best number",
        layout.reason,
    )
    (first, _) = make_plans(
        Config(pipeline=PipelineConfig(replicas=AUTO)), SMOL, ranks("a", "a"), "/models/smol"
    )
    (note,) = [entry for entry in first.resolved if entry.setting == "pipeline.replicas"]
    assert (note.value, note.reason) == ("2", "a rank holds the model")


def test_auto_takes_more_ranks_where_one_does_not_hold_the_model() -> None:
    """Half of the layers with a matrix fit what a rank may hold, all of them do not."""
    memory = MemoryConfig(device_bytes=16 * LAYER_BYTES + MATRIX_BYTES)
    layout = layout_of(ranks(*"abcd"), Workload(400, 64, 12800, 12800), memory)
    assert layout.replicas == ((0, 1), (2, 3))
    assert layout.reason.startswith("2 ranks hold it; ")


def test_auto_stays_with_one_pipeline_where_no_smaller_one_holds_the_weights() -> None:
    memory = MemoryConfig(device_bytes=16 * LAYER_BYTES + MATRIX_BYTES)
    layout = layout_of(ranks(*"ab"), Workload(400, 64, 12800, 12800), memory)
    assert (layout.replicas, layout.reason) == (((0, 1),), "no smaller pipeline holds the model")


@pytest.mark.parametrize(
    ("num_requests", "prompt", "output", "expected"),
    [
        (16, 512, 128, ((0,), (1,))),  # weights are read once for few rows in either way
        (512, 512, 128, ((0, 1),)),  # a T4 holds the pages of few of them beside all weights
    ],
)
def test_auto_takes_what_is_predicted_to_be_faster_on_two_t4(
    num_requests: int, prompt: int, output: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    world = described_ranks(DescribedMachine(parse_gpus("2 x t4", known_gpus())))
    workload = Workload(num_requests, prompt + output, num_requests * prompt, num_requests * output)
    rates = {}
    for replicas in (1, 2):
        config = Config(pipeline=PipelineConfig(replicas=replicas))
        made = make_plans(config, OPENLLAMA_3B, world, "/m", workload)
        rates[tuple(plan.ranks for plan in made)] = predicted_rate(
            OPENLLAMA_3B, made, world, workload
        )
    config = Config(pipeline=PipelineConfig(replicas=AUTO))
    layout = choose_layout(config, OPENLLAMA_3B, world, workload)
    assert layout.replicas == expected == max(rates, key=lambda made: rates[made] or 0.0)


def test_without_a_known_workload_auto_wants_room_for_a_batch_of_usual_requests() -> None:
    assert len(layout_of(ranks("a", "a", memory=40 * GIB)).replicas) == 2
    layout = layout_of(ranks("a", "b", memory=2 * GIB))
    assert layout.replicas == ((0, 1),)
    assert layout.reason == "no smaller pipeline holds the model and a full batch"


def test_replicas_that_get_no_request_add_nothing_to_the_predicted_rate() -> None:
    world = ranks(*"abcd")
    config = Config(pipeline=PipelineConfig(replicas=4))
    workload = Workload(2, 64, 64, 64)
    made = make_plans(config, SMOL, world, "/m", workload)
    four, two = (predicted_rate(SMOL, made[:count], world, workload) for count in (4, 2))
    assert four == two
    assert predicted_rate(SMOL, made, world, Workload(2)) is None


def test_the_default_is_one_pipeline_over_all_ranks() -> None:
    config = Config()
    assert config.pipeline.replicas == 1
    assert choose_layout(config, SMOL, ranks("a", "a", "b")).replicas == ((0, 1, 2),)


def test_a_share_of_a_workload_is_rounded_up_and_what_is_unknown_stays_so() -> None:
    share = Workload(5, 100, 11, None).share_of(2)
    assert share == Workload(3, 100, 6, None)
