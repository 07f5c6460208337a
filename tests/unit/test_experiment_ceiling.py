"""Ceilings by a run's own plan: tokens per second on a known GPU, ratios everywhere."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from mpipipe.checkpoint.spec import read_spec
from mpipipe.config.load import load_config
from mpipipe.experiments.ceiling import ceiling_of, ceiling_of_run, plan_of
from mpipipe.experiments.record import Ceiling
from mpipipe.plain_values import to_json
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources

SHAPE = Path(__file__).parents[2] / "configs/shapes/openllama_3b"
SPEC = read_spec(SHAPE)
LENGTHS = [(64, 64)] * 32


def plan(stages: int, batch: int) -> PipelinePlan:
    words = [
        f"pipeline.num_slots={stages}",
        f"pipeline.max_sequences_per_slot={batch // stages}",
        "model.dtype=bfloat16",
    ]
    ranks = [
        RankResources(rank, "a", rank, "none", num_cores=8, memory_available_bytes=1 << 38)
        for rank in range(stages)
    ]
    made = make_plan(load_config(SHAPE, words).config, SPEC, ranks, str(SHAPE))
    return dataclasses.replace(made, threads_per_rank=1)


def allowed(stages: int, batch: int) -> float:
    """Over one stage with a batch of 4."""
    base = ceiling_of(SPEC, plan(1, 4), LENGTHS).model_tokens_per_s
    return ceiling_of(SPEC, plan(stages, batch), LENGTHS).model_tokens_per_s / base


def test_batches_that_grow_with_the_stages_may_scale_and_a_fixed_total_may_not() -> None:
    """The issue's two arms: N-fold, and about once, less what the split cannot balance."""
    assert 1.7 < allowed(2, 8) <= 2.0
    assert 0.8 < allowed(2, 4) < 1.3  # prompts are arithmetic, and spread; decode steps are not


def test_a_known_gpu_has_a_ceiling_of_its_own() -> None:
    on_gpu = dataclasses.replace(plan(2, 32), device="cuda")
    known = ceiling_of(SPEC, on_gpu, LENGTHS, ["NVIDIA H200", "NVIDIA H200"])
    assert known.tokens_per_s == known.model_tokens_per_s
    slower = ceiling_of(SPEC, on_gpu, LENGTHS, ["NVIDIA H100 80GB HBM3"])
    assert slower.tokens_per_s is not None
    assert slower.tokens_per_s < (known.tokens_per_s or 0)
    published = ceiling_of(SPEC, on_gpu, LENGTHS, ["Tesla T4"])
    assert published.tokens_per_s == published.model_tokens_per_s
    assert "published, 78% of 320 GB/s" in published.reason
    unknown = ceiling_of(SPEC, on_gpu, LENGTHS, ["NVIDIA B300"])
    assert unknown.tokens_per_s is None
    assert unknown.model_tokens_per_s > 0
    assert "only ratios" in unknown.reason
    assert ceiling_of(SPEC, plan(2, 32), LENGTHS).tokens_per_s is None


def by_the_reason(ceiling: Ceiling) -> float:
    """What the formula of the reason comes to."""
    words = ceiling.reason.partition(": ")[2].partition(";")[0]
    tokens, prefill, *waves = re.findall(r"[\d.e+-]*\d", re.sub(r"with \d+ sequences", "", words))
    rounds, round_s = waves[::2], waves[1::2]
    decode_s = sum(float(a) * float(b) for a, b in zip(rounds, round_s, strict=True))
    return float(tokens) / (float(prefill) + decode_s)


@pytest.mark.parametrize("num_prompts", [8, 32, 36, 40])
def test_the_reason_is_the_formula_with_its_values(num_prompts: int) -> None:
    ceiling = ceiling_of(SPEC, plan(2, 32), [(64, 64)] * num_prompts)
    assert by_the_reason(ceiling) == pytest.approx(ceiling.model_tokens_per_s, rel=1e-3)
    assert ceiling.reason.count("sequences") == (2 if num_prompts > 32 else 1)


def test_a_last_wave_of_few_takes_as_many_rounds_as_a_full_one() -> None:
    """40 prompts at 32 rows: two waves, so that 64 would take hardly longer."""
    on_gpu = dataclasses.replace(plan(2, 32), device="cuda")
    rates = {
        number: ceiling_of(SPEC, on_gpu, [(1, 64)] * number).model_tokens_per_s
        for number in (32, 40, 64)
    }
    assert rates[64] == pytest.approx(rates[32], rel=0.02)
    assert rates[40] < 0.75 * rates[64]
    # Unequal outputs: what ends early leaves its row to the next, so there are no waves.
    mixed = ceiling_of(SPEC, on_gpu, [(1, 64)] * 39 + [(1, 63)])
    assert mixed.model_tokens_per_s > 1.2 * rates[40]


def test_the_plan_comes_from_the_manifest() -> None:
    written = {"plan": json.loads(to_json(plan(2, 8)))}
    assert plan_of(written) == plan(2, 8)
    assert plan_of({}) is None
    assert ceiling_of_run(None, LENGTHS, []) is None
    assert ceiling_of_run(plan(2, 8), [], []) is None
    assert ceiling_of_run(plan(2, 8), LENGTHS, []) == ceiling_of(SPEC, plan(2, 8), LENGTHS)
    gone = dataclasses.replace(plan(2, 8), model_path="/nowhere")
    assert ceiling_of_run(gone, LENGTHS, []) is None
