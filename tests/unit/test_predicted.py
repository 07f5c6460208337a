"""Predicted beside measured, in the figures of a run and in its closing text."""

from __future__ import annotations

import dataclasses

import pytest

from mpipipe.config.schema import Config, MemoryConfig, ModelConfig
from mpipipe.metrics.accounting import StageTotals, StepTotals
from mpipipe.metrics.predicted import Prediction, StagePrediction
from mpipipe.metrics.summary import PhaseTimes, RankReport, RequestTotals, RunSummary, stage_figures
from mpipipe.metrics.summary_text import summary_lines
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.known_times import KnownTimes
from mpipipe.planning.predict import predict
from mpipipe.planning.rate_times import rate_times
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.workload import Workload
from tests.unit.model_specs import SMOL
from tests.unit.planned_rank import make_rank

MIB = 2**20
PREDICTED = Prediction(
    num_prompt_tokens=100,
    num_output_tokens=200,
    tokens_per_s=50.0,
    generate_s=4.0,
    start_s=6.0,
    load_s=1.0,
    stages=(StagePrediction(0, 0, 0.5, 0.1, 600 * MIB), StagePrediction(0, 1, 0.5, 0.2, 700 * MIB)),
    source="rates",
)


def rank(number: int, decode_s: float, peak_mib: int) -> RankReport:
    stage = StageTotals(stage=number, decode=StepTotals(4, 4 * decode_s))
    return RankReport(
        number, "host", stage, load_s=1.0 + number, baseline_rss_bytes=400 * MIB,
        peak_rss_bytes=(400 + peak_mib) * MIB,
    )  # fmt: skip


def summary(predicted: Prediction | None = PREDICTED) -> RunSummary:
    requests = RequestTotals(4, 0, 100, 200, None, None, None, None)
    phases = PhaseTimes(boot_s=5.0, load_s=2.5, generate_s=5.0, shutdown_s=0.0)
    ranks = (rank(0, 0.11, 606), rank(1, 0.2, 630))
    planned = dataclasses.replace(PREDICTED, num_output_tokens=256)
    return RunSummary(phases, requests, 0, ranks, planned=planned, predicted=predicted)


def test_every_figure_that_both_are_known_of_has_its_error() -> None:
    told = summary().to_dict()
    compared = told["compared"]
    errors = {name: round(each["error"], 4) for name, each in compared.items()}
    assert errors == {
        "tokens_per_s": -0.2,
        "wall_s": 0.25,
        "generate_s": 0.25,
        "start_s": 0.25,
        "load_s": 1.0,
        "decode_step_s_0": 0.1,
        "decode_step_s_1": 0.0,  # no stage had a step of prompts alone
        "memory_bytes_0": 0.01,
        "memory_bytes_1": -0.1,
    }
    assert compared["tokens_per_s"] == {"predicted": 50.0, "measured": 40.0, "error": -0.2}
    assert told["planned"]["num_output_tokens"] == 256
    assert told["predicted"]["stages"][1]["decode_step_s"] == 0.2


def test_the_closing_text_has_both_and_by_how_much_the_worst_stage_differs() -> None:
    line, more = [line for line in summary_lines(summary()) if "measured" in line]
    assert line == (
        "predicted     50.0 tokens/s, measured 40.0 tokens/s (-20%) · wall clock 10.0 s, "
        "measured 12.5 s (+25%)"
    )
    assert more == (
        "              start 6.0 s, measured 7.5 s (+25%) · memory 700 MiB, measured 630 MiB "
        "(-10%) · 56 fewer tokens than allowed"
    )


def test_a_run_without_a_prediction_compares_nothing() -> None:
    told = summary(None)
    assert told.compared == ()
    assert told.to_dict()["compared"] == {}
    assert not [line for line in summary_lines(told) if "predicted" in line]


def test_a_prediction_is_the_jobs_forecast_with_the_memory_that_it_will_touch() -> None:
    lengths = ((40, 24),) * 8
    ranks = [make_rank(0), make_rank(1)]
    config = Config(model=ModelConfig(dtype="float32"))
    workload = Workload(
        num_requests=8, longest_request_tokens=64, num_prompt_tokens=320, num_output_tokens=192
    )
    plan = make_plan(config, SMOL, ranks, "/m", workload)
    known = KnownTimes(rate_times(SMOL, plan, ranks), start_s=7.0, load_s=2.0)
    found = predict(SMOL, [plan], [known], lengths)
    assert found is not None
    assert (found.num_prompt_tokens, found.num_output_tokens) == (320, 192)
    assert found.tokens_per_s == pytest.approx(192 / found.generate_s)
    assert (found.start_s, found.load_s, found.wall_s) == (7.0, 2.0, 7.0 + found.generate_s)
    # The first stage needs most while its weights are read: half of them is given back before the
    # first step. The last when its head is packed, which is there twice then: twelve layers of
    # 13.5 MiB in half, each with 3.9375 MiB of zeros in blocks of 512 inputs, and one and a half
    # times the head of 108 MiB, with 42 MiB of zeros.
    assert found.stages[0].memory_bytes == plan.stages[0].weight_bytes + 16 * MIB
    assert plan.stages[1].num_layers == 12
    expected_mib = 12 * (13.5 / 2 + 3.9375) + 1.5 * 108 + 42
    assert found.stages[1].memory_bytes == pytest.approx(expected_mib * MIB, rel=1e-3)
    assert predict(SMOL, [plan], [known], ()) is None


def test_stages_of_several_replicas_have_both_numbers() -> None:
    stages = tuple(dataclasses.replace(PREDICTED.stages[0], replica=number) for number in (0, 1))
    predicted = dataclasses.replace(PREDICTED, stages=stages)
    ranks = tuple(
        dataclasses.replace(rank(0, 0.1 + number, 600), rank=number, replica=number)
        for number in (0, 1)
    )
    found = {name: measured for name, _, measured in stage_figures(predicted, ranks)}
    assert found["decode_step_s_0.0"] == pytest.approx(0.1)
    assert found["decode_step_s_1.0"] == pytest.approx(1.1)


def test_the_cache_is_resident_in_huge_pages_and_no_further_than_it_goes() -> None:
    def cache_bytes(num_kv_pages: int) -> int:
        """Of a cache of so many pages, of which a job uses about 16."""
        memory = MemoryConfig(num_kv_pages=num_kv_pages)
        config = Config(model=ModelConfig(dtype="float32"), memory=memory)
        plan = make_plan(config, wide, [make_rank(0)], "/m")
        known = KnownTimes(rate_times(wide, plan, [make_rank(0)]))
        one_page = dataclasses.replace(plan, num_kv_pages=1)
        memories = []
        for each, lengths in ((plan, ((40, 24),) * 4), (one_page, ((1, 2),))):
            found = predict(wide, [each], [known], lengths)
            assert found is not None
            memories.append(found.stages[0].memory_bytes)
        return memories[0] - memories[1] + page_bytes

    wide = dataclasses.replace(SMOL, dtype="float32")  # steps need more than loading does
    page_bytes = kv_page_bytes(wide, "float32", num_layers=30, page_size_tokens=16)
    used, huge = 16 * page_bytes, 2 * MIB
    assert used + 60 * huge <= cache_bytes(2_000) <= used + 60 * huge + 2 * page_bytes
    assert cache_bytes(20) == 20 * page_bytes


def test_a_cpu_holds_a_head_twice_unless_packing_frees_more() -> None:
    workload = Workload(
        num_requests=1, longest_request_tokens=8, num_prompt_tokens=4, num_output_tokens=4
    )
    config, ranks = Config(model=ModelConfig(dtype="float32")), [make_rank(0), make_rank(1)]
    head_bytes = SMOL.vocab_size * SMOL.hidden_size * 4
    wide = dataclasses.replace(SMOL, dtype="float32")  # packed as it is: 12 layers free nothing
    for spec in (SMOL, wide, dataclasses.replace(wide, tied_embeddings=False)):
        plan = make_plan(config, spec, ranks, "/m", workload)
        found = predict(spec, [plan], [KnownTimes(rate_times(spec, plan, ranks))], ((4, 4),))
        assert found is not None
        beside = [
            predicted.memory_bytes - stage.weight_bytes
            for stage, predicted in zip(plan.stages, found.stages, strict=True)
        ]
        assert beside[0] < 64 * MIB
        twice = (spec is not SMOL) * head_bytes
        assert twice <= beside[1] < twice + 64 * MIB


def test_random_weights_are_packed_as_they_are() -> None:
    """float16 holds none of them exactly, whatever the checkpoint's type is."""
    workload = Workload(
        num_requests=1, longest_request_tokens=8, num_prompt_tokens=4, num_output_tokens=4
    )
    memories, decode_s = {}, {}
    for weights in ("checkpoint", "random"):
        config = Config(model=ModelConfig(dtype="float32", weights=weights))
        plan = make_plan(config, SMOL, [make_rank(0)], "/m", workload)
        times = rate_times(SMOL, plan, [make_rank(0)])
        found = predict(SMOL, [plan], [KnownTimes(times)], ((4, 4),))
        assert found is not None
        memories[weights] = found.stages[0].memory_bytes - plan.stages[0].weight_bytes
        decode_s[weights] = times.decode_s(plan.stages[0], 1, 4)
    head_bytes = SMOL.vocab_size * SMOL.hidden_size * 4
    # Half of the layers and of the head, with what blocks of 512 inputs add, is 43 MiB more.
    assert 42 * MIB < memories["checkpoint"] < 44 * MIB
    assert head_bytes < memories["random"] < head_bytes + 64 * MIB  # beside the embedding
    assert decode_s["random"] > 1.4 * decode_s["checkpoint"]
