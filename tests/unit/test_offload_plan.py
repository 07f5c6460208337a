"""What is offloaded where, for ranks on CPUs: RAM, and a disk below it."""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.load import load_config
from mpipipe.config.schema import Config, MemoryConfig, ModelConfig, PipelineConfig
from mpipipe.errors import EnvironmentSetupError, PlanError
from mpipipe.planning.cost import Ceilings
from mpipipe.planning.links import LinkRates
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.placement import (
    ModelParts,
    StageRoom,
    StageShape,
    StageSpeed,
    StepWork,
    offload_of,
    part_bytes,
    place_stage,
)
from mpipipe.planning.plan import PipelinePlan, StageOffload
from mpipipe.planning.resolve import make_plan, make_plans
from mpipipe.planning.resources import RankResources
from mpipipe.planning.workload import Workload
from mpipipe.runtime.offload_folder import offload_need, prepare_offload_folder
from mpipipe.types import DtypeName, QuantizeName
from tests.unit.model_specs import OPENLLAMA_7B, SMOL
from tests.unit.planned_rank import GIB, make_rank

MIB = 2**20
DISK = "/scratch/offload"

UNTIED = replace(SMOL, tied_embeddings=False)
LARGE = replace(
    UNTIED, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=8, vocab_size=32000
)
OPENLLAMA_3B = replace(
    UNTIED,
    num_layers=26,
    hidden_size=3200,
    intermediate_size=8640,
    num_heads=32,
    num_kv_heads=32,
    head_dim=100,
    vocab_size=32000,
    max_context_tokens=2048,
    dtype="float32",
)
LAYER_BYTES = 3_538_944 * 4
MATRIX_BYTES = 49152 * 576 * 4


def ranks(*hosts: str, memory: int = 16 * GIB) -> list[RankResources]:
    return [
        make_rank(number, host, memory_available_bytes=memory, num_cores=2)
        for number, host in enumerate(hosts)
    ]


def plan(
    world: list[RankResources],
    memory: MemoryConfig,
    pipeline: PipelineConfig | None = None,
    *,
    spec: ModelSpec = SMOL,
    work: tuple[int, int, int] = (64, 40, 20),
    model: ModelConfig | None = None,
) -> PipelinePlan:
    """`work`: prompts × input × output."""
    prompts, tokens_in, tokens_out = work
    workload = Workload(
        num_requests=prompts,
        longest_request_tokens=tokens_in + tokens_out,
        num_prompt_tokens=prompts * tokens_in,
        num_output_tokens=prompts * tokens_out,
    )
    config = Config(
        memory=memory, pipeline=pipeline or PipelineConfig(), model=model or ModelConfig()
    )
    return make_plan(config, spec, world, "/models/smol", workload)


def offload(made: PipelinePlan, stage: int = 0) -> StageOffload:
    found = made.stages[stage].offload
    assert found is not None
    return found


def reason(made: PipelinePlan, setting: str) -> str:
    (found,) = [entry.reason for entry in made.resolved if entry.setting == setting]
    return found


# ---- when ----------------------------------------------------------------------------------------


def test_weights_that_fit_stay_whatever_might_be_offloaded() -> None:
    """The plan is the same as without the settings."""
    plain = plan(ranks("a", "b"), MemoryConfig())
    roomy = MemoryConfig(device_bytes=4 * GIB, offload_dir=DISK)
    assert plan(ranks("a", "b"), roomy) == plain
    assert plan(ranks("a", "b"), MemoryConfig(offload_dir=DISK)).to_json() == plain.to_json()
    assert plain.offload_dir == ""
    assert all(stage.offload is None for stage in plain.stages)


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    """Also where the cache could use more than there is: rather fewer pages than an offload."""
    long, roomy = (64, 8000, 100), MemoryConfig(device_bytes=GIB, offload_dir=DISK)
    assert plan(ranks("a", "b"), roomy, work=long) == plan(
        ranks("a", "b"), MemoryConfig(), work=long
    )
    world, memory = ranks("a", memory=14 * GIB), MemoryConfig(device_bytes=13 * GIB)
    made = plan(world, memory, spec=OPENLLAMA_3B)
    assert made == plan(world, MemoryConfig(), spec=OPENLLAMA_3B)
    assert made == plan(world, replace(memory, offload_dir=DISK), spec=OPENLLAMA_3B)


def test_weights_that_leave_no_room_for_the_libraries_of_a_rank_are_offloaded() -> None:
    """12.76 GiB of them fit 13 GiB, but leave too little for Python and torch."""
    made = plan(ranks("a", memory=13 * GIB), MemoryConfig(offload_dir=DISK), spec=OPENLLAMA_3B)
    assert offload(made).device_bytes < 12.5 * GIB
    without = plan(ranks("a", memory=13 * GIB), MemoryConfig(), spec=OPENLLAMA_3B)
    assert without.stages[0].offload is None, "there is no other place"


def test_what_the_ram_does_not_hold_goes_to_disk_and_comes_once_a_step() -> None:
    made = plan(ranks("a"), MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK))
    found = offload(made)
    assert made.offload_dir == DISK
    assert (found.host_layers, found.host_bytes, found.embedding) == ((), 0, "device")
    # The one matrix of embedding and head, resident layers and two buffers fill the budget.
    resident = 30 - len(found.disk_layers)
    assert found.device_bytes == MATRIX_BYTES + (resident + 2) * LAYER_BYTES
    assert 200 * MIB - LAYER_BYTES - MIB < found.device_bytes <= 200 * MIB
    assert found.disk_bytes == len(found.disk_layers) * LAYER_BYTES
    assert found.forecast.disk_bytes == found.disk_bytes
    assert found.forecast.bound_by == "disk"
    assert made.stages[0].device_weight_bytes == found.device_bytes < made.stages[0].weight_bytes
    assert PipelinePlan.from_json(made.to_json()) == made


def test_streamed_layers_are_spread_evenly_between_the_resident_ones() -> None:
    found = offload(plan(ranks("a"), MemoryConfig(device_bytes=350 * MIB, offload_dir=DISK)))
    streamed = found.disk_layers
    assert len(streamed) > found.num_buffers == 2
    gaps = [after - before for before, after in itertools.pairwise(streamed)]
    assert max(gaps) - min(gaps) <= 1
    assert streamed[-1] == 29


def test_without_a_limit_the_memory_of_the_host_decides() -> None:
    """Two ranks share what the host has left; a quarter of what weights leave is for the cache."""
    made = plan(ranks("a", "a", memory=6 * GIB), MemoryConfig(offload_dir=DISK), spec=LARGE)
    page_bytes = 16 * 2 * 8 * 64 * 4
    for number, stage in enumerate(made.stages):
        cache = made.num_kv_pages * page_bytes * stage.num_layers
        assert offload(made, number).device_bytes + 4 * cache < 3 * GIB
        assert offload(made, number).device_bytes > GIB
    with pytest.raises(
        PlanError,
        match=r"ranks 0, 1 together on a would hold 7\.\d+ GiB of weights, but only 6\.00 GiB of "
        r"memory is available there, 1\.\d+ GiB too little: set memory\.offload_dir to .* with "
        r"\d\.\d+ GiB free",
    ):
        plan(ranks("a", "a", memory=6 * GIB), MemoryConfig(), spec=LARGE)


# ---- which ---------------------------------------------------------------------------------------


def test_an_embedding_goes_before_layers_where_that_brings_less() -> None:
    """Its rows are looked up one by one on a disk: cheap for few rows, dear for many."""
    memory = MemoryConfig(device_bytes=300 * MIB, offload_dir=DISK)
    found = offload(plan(ranks("a"), memory, spec=UNTIED, work=(8, 40, 20)))
    assert found.embedding == "disk"
    assert found.device_bytes <= 300 * MIB
    assert found.disk_bytes == found.forecast.disk_bytes + MATRIX_BYTES
    model = ModelParts(UNTIED, "float32", part_bytes(UNTIED, "float32"))
    slow = StageSpeed(Ceilings(1e12, 1e15), LinkRates(8e9, 1e9, disk_reads_per_s=1e4))
    for rows, tier in ((100, "disk"), (2000, "device")):
        choice = place_stage(
            model, StageShape(30, True, True), StageRoom(300 * MIB, 0, True), StepWork(rows), slow
        )
        assert choice is not None
        assert choice.placed.embedding == tier


def test_a_table_of_learned_positions_stays_with_the_first_stage() -> None:
    opt, table = replace(SMOL, model_type="opt"), (8192 + 2) * 576 * 4
    memory = MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK)
    made, without = plan(ranks("a", "b"), memory, spec=opt), plan(ranks("a", "b"), memory)
    first, other = made.stages[0], without.stages[0]
    layers = (first.num_layers - other.num_layers) * LAYER_BYTES
    assert first.weight_bytes == other.weight_bytes + layers + table
    found = offload(made)
    resident = first.num_layers - len(found.disk_layers) + found.num_buffers
    embedding = MATRIX_BYTES * (found.embedding == "device")
    assert found.device_bytes == resident * LAYER_BYTES + embedding + table
    with pytest.raises(PlanError, match=r"stage 0 .* needs 32 MiB .* and the table of positions,"):
        plan(ranks("a", "b"), replace(memory, device_bytes=20 * MIB), spec=opt)


def test_the_head_goes_last() -> None:
    """With room for two buffers only, it passes through them as well."""
    room = 2 * LAYER_BYTES + MIB
    found = offload(
        plan(ranks("a"), MemoryConfig(device_bytes=room, offload_dir=DISK), spec=UNTIED)
    )
    assert (found.embedding, found.head, len(found.disk_layers)) == ("disk", "disk", 30)
    assert found.device_bytes == 2 * LAYER_BYTES
    room += MATRIX_BYTES
    found = offload(
        plan(ranks("a"), MemoryConfig(device_bytes=room, offload_dir=DISK), spec=UNTIED)
    )
    assert (found.head, len(found.disk_layers)) == ("device", 30)


def test_one_buffer_does_where_two_do_not_fit() -> None:
    room = LAYER_BYTES + MATRIX_BYTES + MIB
    found = offload(plan(ranks("a"), MemoryConfig(device_bytes=room, offload_dir=DISK)))
    assert (found.num_buffers, len(found.disk_layers)) == (1, 30)
    forecast = found.forecast
    assert forecast.step_s == pytest.approx(forecast.compute_s + forecast.disk_s)


def test_a_stage_that_streams_its_head_gets_the_layers_that_its_device_holds() -> None:
    """Its head takes 0.9 s a step to come, beside which they are computed."""
    spec = replace(SMOL, num_kv_heads=9, vocab_size=400_000)
    made = plan(
        ranks("a", "b"),
        MemoryConfig(device_bytes=8 * LAYER_BYTES, offload_dir=DISK),
        spec=spec,
        work=(4, 4, 16),
    )
    assert sum(stage.num_layers for stage in made.stages) == 30
    found = offload(made, stage=1)
    assert found.head == "disk"
    assert found.disk_layers == ()
    assert found.num_buffers == 2
    # A margin apart, what two buffers leave.
    assert made.stages[1].num_layers == 5
    assert found.forecast.step_s > offload(made, stage=0).forecast.step_s


def test_below_one_layer_nothing_runs() -> None:
    memory = MemoryConfig(device_bytes=LAYER_BYTES // 2, offload_dir=DISK)
    with pytest.raises(PlanError, match=r"raise memory\.device_bytes to at least 14 MiB"):
        plan(ranks("a"), memory, spec=UNTIED)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("hosts", ["a", "ab", "abcd"])
def test_the_device_bytes_that_an_error_advises_are_enough(
    hosts: str, quantize: QuantizeName
) -> None:
    """With the folder that it advises, where there is none; a MiB less is refused again."""
    world, model = ranks(*hosts), ModelConfig(quantize=quantize)
    for tied, layers, folder in itertools.product((True, False), (4, 5, 12), ("", DISK)):
        spec = replace(SMOL, tied_embeddings=tied, num_layers=layers)
        low = MemoryConfig(device_bytes=MIB, offload_dir=folder)
        with pytest.raises(PlanError, match=r"at least \d+ MiB") as caught:
            plan(world, low, spec=spec, model=model)
        least = int(str(caught.value).split("at least ")[1].split(" MiB")[0]) * MIB
        advised = DISK if "set memory.offload_dir" in str(caught.value) else folder
        enough = MemoryConfig(device_bytes=least, offload_dir=advised)
        assert plan(world, enough, spec=spec, model=model).stages
        less = replace(enough, device_bytes=least - MIB)
        with pytest.raises(PlanError, match=f"at least {least // MIB} MiB"):
            plan(world, less, spec=spec, model=model)


def test_a_last_stage_of_one_layer_streams_its_head() -> None:
    memory = MemoryConfig(device_bytes=15 * MIB, offload_dir=DISK)
    made = plan(ranks("a", "b"), memory, PipelineConfig(split=(29, 1)), spec=UNTIED)
    found = offload(made, stage=1)
    assert (found.head, found.disk_layers, found.num_buffers) == ("disk", (29,), 1)


def test_a_head_that_is_the_embedding_stays_and_the_error_names_it() -> None:
    memory = MemoryConfig(device_bytes=100 * MIB, offload_dir=DISK)
    with pytest.raises(
        PlanError,
        match=r"^stage 0 \(rank 0 on a\) with 30 of 30 layers needs 122 MiB on its device, for a "
        r"layer or staging buffer and the LM head, .* allows only 100\.0 MiB: raise memory",
    ):
        plan(ranks("a"), memory)
    enough = replace(memory, device_bytes=122 * MIB)
    assert offload(plan(ranks("a"), enough)).disk_layers


def streamed_of(
    num_layers: int, fitting: int, *, flops_per_s: float, head: bool = False
) -> StageOffload:
    """A stage of whose layers the device holds `fitting` beside two buffers."""
    parts = part_bytes(UNTIED, "float32")
    model, shape = ModelParts(UNTIED, "float32", parts), StageShape(num_layers, False, head)
    room = StageRoom((fitting + 2) * parts.layer, host_bytes=0, has_disk=True)
    speed = StageSpeed(Ceilings(1e12, flops_per_s), LinkRates(8e9, 1e9))
    choice = place_stage(model, shape, room, StepWork(8), speed)
    assert choice is not None
    found = offload_of(choice, 0)
    assert found is not None
    return found


def test_so_many_layers_are_streamed_that_no_buffer_is_used_more_often_where_that_is_free() -> None:
    slow = streamed_of(12, 7, flops_per_s=1e9)  # computes longer than the disk brings 6 layers
    assert (len(slow.disk_layers), slow.forecast.exposed_s) == (6, 0.0)
    fast = streamed_of(12, 7, flops_per_s=1.1e10)  # the disk is what it waits for
    assert len(fast.disk_layers) == 5
    layer_s = fast.forecast.compute_s / 12
    assert fast.forecast.exposed_s == pytest.approx(layer_s)
    assert fast.forecast.step_s == pytest.approx(fast.forecast.disk_s + layer_s)
    assert streamed_of(12, 8, flops_per_s=1.1e10).forecast.exposed_s == 0.0


def test_beside_a_streamed_head_no_layer_is_streamed_that_fits() -> None:
    found = streamed_of(4, 4, flops_per_s=1e12, head=True)
    assert (found.head, found.disk_layers) == ("disk", ())


def test_only_remedies_that_help_are_told() -> None:
    tried: tuple[tuple[DtypeName, int, bool], ...]
    tried = (("float32", 6, True), ("bfloat16", 3, False))
    for dtype, memory, narrower in tried:
        model, folder = ModelConfig(dtype=dtype), r"set memory\.offload_dir"
        with pytest.raises(PlanError, match=folder) as caught:
            plan(ranks("a", memory=memory * GIB), MemoryConfig(), spec=LARGE, model=model)
        assert 'set model.quantize = "int8"' in str(caught.value)
        assert ("model.dtype" in str(caught.value)) == narrower
        assert "device_bytes" not in str(caught.value), "it was not set"
        model = replace(model, quantize="int8")
        assert plan(ranks("a", memory=memory * GIB), MemoryConfig(), spec=LARGE, model=model)
    with pytest.raises(PlanError, match=r"set memory\.offload_dir") as caught:
        plan(ranks("a", memory=GIB), MemoryConfig(), spec=LARGE)
    assert "int8" not in str(caught.value), "it does not fit either"
    with pytest.raises(PlanError, match=r", raise memory\.device_bytes to at least 7490 MiB, or"):
        plan(ranks("a"), MemoryConfig(device_bytes=GIB), spec=LARGE)
    made = plan(ranks("a"), MemoryConfig(device_bytes=7490 * MIB), spec=LARGE)
    assert made.stages[0].offload is None


# ---- how much at once ----------------------------------------------------------------------------


def test_rows_are_raised_until_compute_hides_the_disk_or_the_run_has_no_more() -> None:
    memory = MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK)
    few = plan(ranks("a"), memory, work=(24, 40, 20))
    many = plan(ranks("a"), memory, work=(2000, 40, 20))
    assert few.max_sequences_per_slot == 32
    assert offload(few).forecast.rows == 24
    assert many.max_sequences_per_slot > 100
    assert "rows to make the most of" in reason(many, "pipeline.max_sequences_per_slot")
    asked = plan(ranks("a"), memory, PipelineConfig(max_sequences_per_slot=4), work=(2000, 40, 20))
    assert asked.max_sequences_per_slot == 4
    assert offload(asked).forecast.rows == 4


def test_pages_hold_the_rows_beside_the_weights() -> None:
    made = plan(ranks("a"), MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK))
    assert made.num_kv_pages >= offload(made).forecast.rows * 4
    asked = MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK, num_kv_pages=40)
    made = plan(ranks("a"), asked)
    assert made.num_kv_pages == 40
    assert offload(made).forecast.rows <= 10


def test_a_stage_with_room_takes_layers_from_one_that_streams() -> None:
    """Where nothing needs to stream then, nothing does, and no disk is needed."""
    memory = MemoryConfig(num_kv_pages=200)
    even = plan(ranks("a", "b"), memory, spec=LARGE)
    small = [*ranks("a", memory=8 * GIB), make_rank(1, "b", memory_available_bytes=3 * GIB)]
    made = plan(small, memory, spec=LARGE)
    assert [stage.offload for stage in made.stages] == [None, None]
    assert made.stages[1].num_layers < even.stages[1].num_layers
    assert sum(stage.num_layers for stage in made.stages) == 30
    assert made.stages[1].first_layer == made.stages[0].last_layer
    assert sum(stage.weight_bytes for stage in made.stages) == sum(
        stage.weight_bytes for stage in even.stages
    )


def test_the_split_that_was_asked_for_is_kept() -> None:
    memory = MemoryConfig(device_bytes=200 * MIB, offload_dir=DISK)
    made = plan(ranks("a", "b"), memory, PipelineConfig(split=(20, 10)))
    assert [stage.num_layers for stage in made.stages] == [20, 10]
    assert offload(made, 0).disk_layers
    assert "pipeline.split" not in {entry.setting for entry in made.resolved}
    assert all(layer < 20 for layer in offload(made, 0).disk_layers)


def test_an_offload_that_costs_nothing_gets_no_advice() -> None:
    """Only the embedding is on disk, and few of its rows are looked up."""
    memory = MemoryConfig(device_bytes=600 * MIB, offload_dir=DISK)
    made = plan(ranks("a"), memory, spec=UNTIED, work=(8, 40, 20))
    assert (offload(made).embedding, offload(made).disk_layers) == ("disk", ())
    (note,) = [entry for entry in made.resolved if entry.setting == "memory.offload"]
    assert note.value == "steps hardly longer"
    assert "reckoned with" in note.reason
    assert "to avoid it" not in note.reason


# ---- settings ------------------------------------------------------------------------------------


def test_host_bytes_mean_nothing_on_a_cpu_and_are_refused() -> None:
    with pytest.raises(PlanError, match=r"memory\.host_bytes = .* is for ranks on GPUs"):
        plan(ranks("a"), MemoryConfig(host_bytes=GIB))
    plan(ranks("a"), MemoryConfig(host_bytes=0))


def test_the_folder_may_be_given_by_home_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    for given, found in (("~/o", "/home/me/o"), ("$SCRATCH/o", "/fast/o")):
        assert load_config(None, [f"memory.offload_dir={given}"]).config.memory.offload_dir == found


def test_the_folder_is_made_and_must_have_room(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    prepare_offload_folder(folder, 0, who="rank 0 on a")
    assert not folder.exists()
    prepare_offload_folder(folder, 4096, who="rank 0 on a")
    assert list(folder.iterdir()) == []
    with pytest.raises(
        EnvironmentSetupError, match=r"free, but \d+\.00 GiB of weights .* by rank 3 on n:"
    ):
        prepare_offload_folder(folder, 2**60, who="rank 3 on n")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentSetupError, match=r"cannot be used by rank 3 on n"):
        prepare_offload_folder(tmp_path / "file", 4096, who="rank 3 on n")


def test_the_ranks_of_a_host_need_room_for_all_that_they_keep_there() -> None:
    memory = MemoryConfig(device_bytes=80 * MIB, offload_dir=DISK)
    made = plan(ranks("a", "a", "b"), memory)
    kept = [offload(made, stage).disk_bytes for stage in range(3)]
    assert all(kept)
    together = (kept[0] + kept[1], "ranks 0, 1 together on a")
    assert [offload_need(made.stages, stage) for stage in made.stages] == [
        together,
        together,
        (kept[2], "rank 2 on b"),
    ]
    resident = replace(made.stages[0], offload=None)
    made = replace(made, stages=(resident, *made.stages[1:]))
    assert offload_need(made.stages, resident)[0] == 0
    assert offload_need(made.stages, made.stages[1]) == (kept[1], "rank 1 on a")


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its mode: root may write anywhere."""

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(EnvironmentSetupError, match="Read-only file system"):
        prepare_offload_folder(tmp_path, 4096, who="rank 0 on a")


def test_a_relative_folder_is_that_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks may be started elsewhere, and read it in the plan."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, '
        '"num_hidden_layers": 2, "intermediate_size": 8, "max_position_embeddings": 16}'
    )
    monkeypatch.chdir(tmp_path)
    words = ["model.path=.", "model.weights=random", "memory.offload_dir=o"]
    model = read_model(load_config(None, words))
    assert model.loaded.config.memory.offload_dir == str(tmp_path / "o")


def test_the_measured_rate_of_a_disk_is_shared_by_the_ranks_of_its_host() -> None:
    memory = MemoryConfig(device_bytes=100 * MIB, offload_dir=DISK)
    fast = [replace(rank, disk_bytes_per_s=4_000_000_000) for rank in ranks("a", "a", "b")]
    made = plan(fast, memory)
    rates = [offload(made, stage).forecast.disk_bytes_per_s for stage in range(3)]
    assert rates == [2e9, 2e9, 4e9]
    (note,) = [entry for entry in made.resolved if entry.setting == "memory.offload"]
    assert "disk 4 GB/s (measured)" in note.reason
    assert "assumed" not in note.reason


@pytest.mark.parametrize(("replicas", "lanes"), [(4, 1), (1, 4), (1, 1), (2, 2)])
def test_the_ranks_of_a_host_share_its_disk_however_they_are_cut(replicas: int, lanes: int) -> None:
    world = [
        make_rank(rank, memory_available_bytes=200 * GIB, disk_bytes_per_s=10**9)
        for rank in range(4)
    ]
    config = Config(
        memory=MemoryConfig(device_bytes=2 * GIB, offload_dir="/tmp"),
        pipeline=PipelineConfig(device="cpu", replicas=replicas, tensor_parallel=lanes),
    )
    for made in make_plans(config, OPENLLAMA_7B, world, "/models/m"):
        for stage in made.stages:
            assert stage.offload is not None
            assert stage.offload.forecast.disk_bytes_per_s == pytest.approx(10**9 / 4)
