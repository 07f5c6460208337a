"""Interpolation of profiles, and which times are known of a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpipipe.config.schema import Config, ModelConfig, PipelineConfig
from mpipipe.planning.forecast import forecast_job
from mpipipe.planning.known_times import known_times
from mpipipe.planning.plan import PipelinePlan, StageOffload, StepForecast
from mpipipe.planning.profile import (
    HopPoint,
    Profile,
    ProfileKey,
    RowPoint,
    StepPart,
    TokenPoint,
    write_profile,
)
from mpipipe.planning.profile_times import Curve, ProfileTimes, profile_times
from mpipipe.planning.rate_times import RateTimes, rate_times
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.roofline import JobShape
from mpipipe.planning.startup import startup_by_rates
from mpipipe.planning.workload import SamplingUse
from mpipipe.sampling_options import SamplingNeeds
from tests.unit.model_specs import SMOL
from tests.unit.planned_rank import make_rank

RANKS = [make_rank(0, processor="A"), make_rank(1, "node2", processor="B")]


def plan() -> PipelinePlan:
    config = Config(model=ModelConfig(dtype="float32"))
    return make_plan(config, SMOL, RANKS, "/models/smol")


def profile(rank: int, scale: float = 1.0, hops: tuple[HopPoint, ...] = ()) -> Profile:
    """A layer takes 1 ms a row and 1 µs a key of a row; the head 10 ms and 1 ms a row."""

    def layer(tokens: int, context: float) -> TokenPoint:
        return TokenPoint(tokens, context, scale * tokens * (1e-3 + context * 1e-6))

    def rows(fixed_s: float, row_s: float) -> tuple[RowPoint, ...]:
        return tuple(RowPoint(n, scale * (fixed_s + n * row_s)) for n in (1, 8, 64))

    part = StepPart(
        # 64 rows were timed with few keys only.
        (layer(1, 64), layer(1, 512), layer(8, 64), layer(8, 512), layer(64, 64)),
        step=rows(0.5e-3, 0.0),
        head=rows(10e-3, 1e-3),
        embedding=rows(0.0, 1e-5),
    )
    key = ProfileKey.of(plan(), ProfileKey.shape_of(SMOL), RANKS, rank)
    day = "2026-11-27T12:00:00+00:00"
    return Profile(
        key, day, part, part, hops, load_bytes_per_s=1e9, load_fixed_s=0.5, start_s=4.0 * scale
    )


def times(hops: tuple[HopPoint, ...] = ()) -> ProfileTimes:
    found = {0: profile(0, hops=hops), 1: profile(1, scale=2.0)}
    return profile_times(plan(), found, rate_times(SMOL, plan(), RANKS))


def test_a_curve_lies_on_its_points_goes_on_and_never_falls_beyond_them() -> None:
    curve = Curve.of([(8, 3.0), (1, 1.0), (4, 2.0)])
    assert [curve.at(size) for size in (1, 4, 8, 2.5, 6, 12)] == [1.0, 2.0, 3.0, 1.5, 2.5, 4.0]
    assert curve.at(0.5) == 1.0
    assert Curve.of([(4, 2.0), (8, 1.0)]).at(16) == 1.0
    assert Curve.of([(4, 2.0)]).at(400) == 2.0


@pytest.mark.parametrize("rows", [1, 3, 8, 20, 64, 100])
@pytest.mark.parametrize("context", [64, 100.5, 512, 2000])
def test_a_step_is_the_sum_of_its_parts(rows: float, context: float) -> None:
    first, last = plan().stages
    layers_s = rows * (1e-3 + context * 1e-6)
    assert times().decode_s(first, rows, context) == pytest.approx(
        first.num_layers * layers_s + 0.5e-3 + rows * 1e-5
    )
    assert times().decode_s(last, rows, context) == pytest.approx(
        2 * (last.num_layers * layers_s + 0.5e-3 + 10e-3 + rows * 1e-3)
    )


def test_a_step_of_prompts_passes_one_row_of_each_through_the_head() -> None:
    last = plan().stages[-1]
    without = dataclasses.replace(last, has_head=False)
    head_s = times().prefill_s(last, 64, 16) - times().prefill_s(without, 64, 16)
    assert head_s == pytest.approx(2 * (10e-3 + 2 * 1e-3)), "two prompts of 32 tokens"
    head_s = times().prefill_s(last, 64, 900) - times().prefill_s(without, 64, 900)
    assert head_s == pytest.approx(2 * 11e-3), "a part of one prompt"


def test_hops_are_measured_or_by_rates() -> None:
    row_bytes = SMOL.hidden_size * 4
    hops = (HopPoint(row_bytes, 1e-4, False), HopPoint(5 * row_bytes, 3e-4, False))
    measured, rates = times(hops), rate_times(SMOL, plan(), RANKS)
    assert measured.hop_s(3, crosses_hosts=False) == pytest.approx(2e-4)
    assert measured.hop_s(3, crosses_hosts=True) == rates.hop_s(3, True)
    assert times().hop_s(3, crosses_hosts=False) == rates.hop_s(3, False)


def test_what_is_offloaded_comes_beside_the_compute() -> None:
    stage = plan().stages[0]
    forecast = StepForecast(rows=8, host_bytes=1, link_s=77.0)
    offloaded = dataclasses.replace(stage, offload=StageOffload(forecast=forecast))
    assert times().decode_s(offloaded, 8, 64) == 77.0
    assert times().decode_s(stage, 8, 64) < 1.0


def test_measured_times_are_known_where_every_rank_was_measured(tmp_path: Path) -> None:
    def found() -> tuple[object, float]:
        known = known_times(SMOL, plan(), RANKS, folder=tmp_path)
        return known.steps, known.start(SMOL, plan()).start_s

    assert isinstance(found()[0], RateTimes)
    write_profile(profile(0), tmp_path)
    steps, startup_s = found()
    assert isinstance(steps, RateTimes), "of rank 1 nothing is known"
    assert startup_s == startup_by_rates(SMOL, plan()).start_s
    written = write_profile(profile(1, scale=2.0), tmp_path)
    steps, startup_s = found()
    assert isinstance(steps, ProfileTimes)
    assert steps.source == "measured 2026-11-27 on A, B"
    assert steps.decode_s(plan().stages[1], 8, 64) == times().decode_s(plan().stages[1], 8, 64)
    assert startup_s == pytest.approx(8.0 + 0.5 + plan().stages[1].weight_bytes / 1e9)
    assert str(written) in known_times(SMOL, plan(), RANKS, folder=tmp_path).files


def test_a_profile_of_one_lane_and_the_rates_of_sums_make_a_step_of_lanes(tmp_path: Path) -> None:
    world = [make_rank(rank, processor="A") for rank in range(3)]
    pipeline = PipelineConfig(tensor_parallel=3)
    config = Config(model=ModelConfig(dtype="float32"), pipeline=pipeline)
    lanes = make_plan(config, SMOL, world, "/models/smol")
    (stage,) = lanes.stages
    key = ProfileKey.of(lanes, ProfileKey.shape_of(SMOL), world, 0)
    whole = dataclasses.replace(profile(0), key=dataclasses.replace(key, num_lanes=1))
    write_profile(whole, tmp_path)
    steps = known_times(SMOL, lanes, world, folder=tmp_path).steps
    assert isinstance(steps, RateTimes), "whole layers say nothing of lanes"
    assert "that was with pipeline.tensor_parallel 1, here 3 (`mpipipe plan" in steps.source
    sums_s = steps.lanes_s(stage, 8, 8)
    assert sums_s > 2 * stage.num_layers * 0.17e-3
    own_s = profile_times(lanes, {0: whole}, dataclasses.replace(steps, num_lanes=1))
    write_profile(dataclasses.replace(whole, key=key), tmp_path)
    measured = known_times(SMOL, lanes, world, folder=tmp_path).steps
    assert isinstance(measured, ProfileTimes)
    logits_s = own_s.rates.lanes_s(stage, 8, 8)
    together_s, alone_s = (each.decode_s(stage, 8, 64) for each in (measured, own_s))
    assert together_s - alone_s == pytest.approx(sums_s - logits_s)
    steps_s = [each.prefill_s(stage, 64, 32) for each in (measured, own_s)]
    sums_s = 2 * stage.num_layers * (0.17e-3 + 2 * 64 * SMOL.hidden_size * 4 / 1.5e9)
    assert steps_s[0] - steps_s[1] == pytest.approx(sums_s)


def test_a_profile_that_is_not_used_is_named_with_what_is_unlike(tmp_path: Path) -> None:
    def source(made: PipelinePlan) -> str:
        return known_times(SMOL, made, RANKS, folder=tmp_path).steps.source

    assert "not as measured" not in source(plan())
    for rank in (0, 1):
        write_profile(profile(rank), tmp_path)
    (tmp_path / "profile-v2-0123456789abcdef.json").write_text("{")
    assert "not as measured" not in source(plan()), "both are used"
    drawn = SamplingUse(SamplingNeeds.DRAW)
    told = source(dataclasses.replace(plan(), sampling=drawn))
    assert told.endswith(
        "not as measured 2026-11-27: that was with sampling NOTHING, here DRAW "
        "(`mpipipe plan --measure`, the prompts' sampling set in [generation], measures this)"
    )


def test_a_job_is_forecast_with_them() -> None:
    forecast = forecast_job(SMOL, plan(), JobShape.of([(64, 32)] * 16), times())
    assert forecast.source == "measured 2026-11-27 on A, B"
    assert forecast.tokens_per_s > 0
