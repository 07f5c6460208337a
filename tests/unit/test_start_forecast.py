"""The parts of a start: which count where, and that those of a measured start add up to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpipipe.config.schema import Config, ModelConfig
from mpipipe.planning.known_times import known_times
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.profile import (
    Profile,
    ProfileKey,
    RowPoint,
    StepPart,
    TokenPoint,
    write_profile,
)
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.startup import Startup, startup_by_rates, startup_of_parts
from mpipipe.topology.gpu import GpuFacts
from tests.unit.model_specs import SMOL
from tests.unit.planned_rank import make_rank

GPU = GpuFacts(
    index=0,
    name="NVIDIA H200",
    uuid="aa",
    capability=90,
    memory_bytes=143 << 30,
    free_bytes=142 << 30,
    nccl_version="2.28.9",
)
RANKS = [make_rank(0, gpu=GPU, attention_backends=("triton",))]


def gpu_plan() -> PipelinePlan:
    model = ModelConfig(dtype="bfloat16", weights="random")
    plan = make_plan(Config(model=model), SMOL, RANKS, "/models/smol")
    assert (plan.device, plan.attention, plan.cuda_graphs) == ("cuda", "triton", True)
    return plan


def test_a_start_on_gpus_waits_for_kernels_that_are_not_compiled() -> None:
    cold = startup_by_rates(SMOL, gpu_plan())
    warm = startup_by_rates(SMOL, gpu_plan(), is_compiled=True)
    assert cold.start_s - warm.start_s == pytest.approx(cold.compile_s)
    assert cold.load_s - warm.load_s == pytest.approx(cold.compile_s)
    assert (cold.compile_s > 1, warm.compile_s) == (True, 0.0)
    assert 7 < warm.start_s < 9  # 7.5 s were measured on two H200, and 10.5 to 16.5 s of cold ones
    assert 10.5 < cold.start_s < 16.5


def test_kernels_of_other_attention_and_graphs_that_are_off_take_no_time() -> None:
    whole = startup_by_rates(SMOL, gpu_plan())
    others = startup_by_rates(SMOL, dataclasses.replace(gpu_plan(), attention="flashinfer"))
    assert others.compile_s == 0.0
    assert others.start_s == pytest.approx(whole.start_s - whole.compile_s)
    eager = startup_by_rates(SMOL, dataclasses.replace(gpu_plan(), cuda_graphs=False))
    assert 0.5 < whole.start_s - eager.start_s < 1.5


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_start_on_cpus_has_weights_and_no_kernels(is_compiled: bool) -> None:
    ranks = [make_rank(0)]
    plan = make_plan(Config(model=ModelConfig(dtype="float32")), SMOL, ranks, "/models/smol")
    start = startup_by_rates(SMOL, plan, is_compiled=is_compiled)
    assert start.start_s == pytest.approx(5.0 + start.load_s)
    assert start.load_s == pytest.approx(plan.stages[0].weight_bytes / 2 / 1e9)  # in bfloat16
    assert start.compile_s == 0.0
    assert startup_of_parts(plan, 3.0, 2.0, is_compiled=is_compiled) == Startup(5.0, 2.0)


def test_a_measured_start_on_gpus_has_what_a_new_process_takes_beside_weights(
    tmp_path: Path,
) -> None:
    plan = gpu_plan()
    rows = (RowPoint(1, 1e-3),)
    part = StepPart((TokenPoint(1, 16, 1e-3),), step=rows, head=rows, embedding=rows)
    profile = Profile(
        ProfileKey.of(plan, ProfileKey.shape_of(SMOL), RANKS, 0),
        "2026-11-28T08:00:00+00:00",
        part,
        part,
        load_bytes_per_s=1e9,
        load_fixed_s=0.1,
        start_s=4.5,
    )
    write_profile(profile, tmp_path)
    known = known_times(SMOL, plan, RANKS, folder=tmp_path)
    assert known.files
    weights_s = plan.stages[0].weight_bytes / 1e9
    beside = startup_of_parts(plan, 0.0, 0.0, is_compiled=True)
    warm = known.start(SMOL, plan, is_compiled=True)
    assert warm.start_s == pytest.approx(4.5 + weights_s + beside.load_s)
    assert warm.load_s == pytest.approx(weights_s + beside.load_s)
    cold = known.start(SMOL, plan)
    assert cold.start_s == pytest.approx(warm.start_s + cold.compile_s)
    assert cold.compile_s == startup_by_rates(SMOL, plan).compile_s
