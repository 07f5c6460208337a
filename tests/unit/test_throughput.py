from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from mpipipe.bench.workloads import (
    BenchWork,
    bench_requests,
    least_warm_up_requests,
    warm_up_requests,
)
from mpipipe.checkpoint.spec import read_spec
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.errors import ConfigError
from mpipipe.metrics.accounting import StageTotals, TimeParts
from mpipipe.metrics.summary import RankReport
from mpipipe.metrics.throughput import FloorTimes, JobTiming, reports_since, throughput_record
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.plan import StageOffload
from mpipipe.types import Completion, FinishReason

SHAPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"
LLAMA3 = Vocabulary.of(SHAPES / "llama3_8b", read_spec(SHAPES / "llama3_8b"))


def completion(ttft_s: float, latency_s: float, tokens: int = 11) -> Completion:
    return Completion(
        request_id="0",
        index=0,
        text="",
        token_ids=(5,) * tokens,
        finish_reason=FinishReason.LENGTH,
        num_prompt_tokens=20,
        queue_s=0.0,
        ttft_s=ttft_s,
        latency_s=latency_s,
    )


def report(stage: int, steps: int, compute_s: float, idle_s: float) -> RankReport:
    parts = TimeParts(compute_s=compute_s, idle_s=idle_s)
    totals = StageTotals(
        stage=stage, num_steps=steps, overall=parts, num_steady_steps=steps, steady=parts
    )
    return RankReport(rank=stage, host="a", stage=totals, weight_bytes=7)


# ---- works ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("512x512x128", "512x1024+128x16", "1×20×3", "64xmixed", "200x9x2xtail", "64xmixedxeven"),
        *("1x512x128xrepeat", "64xmixedxevenxrepeat"),
    ],
)
def test_a_work_reads_back_as_it_is_named(text: str) -> None:
    work = BenchWork.parse(text)
    assert BenchWork.parse(work.name) == work
    assert work.name == text.replace("×", "x")


@pytest.mark.parametrize(
    "text",
    ["512x512", "axbxc", "0x5x5", "5x5x0", "", "0xmixed", "-1x2x3", "9xmixedxtail", "5xrepeat"],
)
def test_a_wrong_work_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="work"):
        BenchWork.parse(text)


def test_mixed_lengths_are_seeded_and_stay_in_their_ranges() -> None:
    work = BenchWork.parse("300xmixed")
    lengths = work.lengths(7)
    assert lengths == work.lengths(7) != work.lengths(8)
    assert all(64 <= tokens_in <= 1024 and 16 <= out <= 256 for tokens_in, out in lengths)
    assert max(sum(pair) for pair in lengths) <= work.longest_tokens
    assert len({tokens_in for tokens_in, _ in lengths}) > 200


def test_a_heavy_tail_has_few_outputs_that_are_much_longer() -> None:
    work = BenchWork.parse("2000x512x64xtail")
    lengths = work.lengths(0)
    assert {tokens_in for tokens_in, _ in lengths} == {512}
    assert sorted(out for _, out in lengths) == [64] * 1980 + [1280] * 20
    assert work.longest_tokens == 512 + 1280
    assert lengths != work.lengths(1)
    assert max(BenchWork.parse("3x512x64xtail").lengths(0)) == (512, 1280)


@pytest.mark.parametrize("text", ["512xmixed", "301x512x64xtail"])
def test_even_lengths_are_the_same_tokens(text: str) -> None:
    lengths, even = BenchWork.parse(text).lengths(3), BenchWork.parse(f"{text}xeven").lengths(3)
    for given, found in zip(zip(*lengths, strict=True), zip(*even, strict=True), strict=True):
        assert (len(given), sum(given)) == (len(found), sum(found))
        assert max(found) - min(found) <= 1


def test_requests_are_greedy_random_and_ordinary() -> None:
    requests = bench_requests(BenchWork(3, 500, 16), LLAMA3, seed=1)
    assert [len(request.prompt_ids) for request in requests] == [500] * 3
    assert all(request.sampling.ignore_eos for request in requests)
    assert all(request.sampling.max_new_tokens == 16 for request in requests)
    ids = {token_id for request in requests for token_id in request.prompt_ids}
    assert len(ids) > 1000
    assert max(ids) < 128_000  # Llama 3's special tokens start there
    assert bench_requests(BenchWork(3, 500, 16), LLAMA3, seed=1) == requests


def test_prompts_that_repeat_say_one_passage_again_and_again() -> None:
    work = BenchWork.parse("2x100x16xrepeat")
    for request in bench_requests(work, LLAMA3, seed=1) + warm_up_requests(
        work, LLAMA3, 1, num_running=2
    ):
        ids = request.prompt_ids
        assert len(ids) == 100
        assert ids[32:] == ids[:-32]
        assert len(set(ids[:32])) > 16


def test_prompts_of_a_work_with_a_common_beginning_share_it_and_no_more() -> None:
    work = BenchWork.parse("3x64+16x4")
    first, *others = bench_requests(work, LLAMA3, seed=1)
    for other in others:
        assert len(other.prompt_ids) == 80
        assert other.prompt_ids[:64] == first.prompt_ids[:64]
        assert other.prompt_ids[64:] != first.prompt_ids[64:]
    assert work.shared_ratio == pytest.approx(2 * 64 / (3 * 80))


def test_special_ids_are_not_drawn_from_a_small_vocabulary() -> None:
    vocabulary = Vocabulary(0, 3, frozenset({1, 2}))
    assert set(vocabulary.draw(random.Random(0), 50)) == {0, 3}


def test_a_warm_up_has_the_rows_of_its_work_and_costs_little() -> None:
    work = BenchWork(512, 512, 128)
    requests = warm_up_requests(work, LLAMA3, 0, num_running=300)
    assert len(requests) == 300
    assert len(requests[0].prompt_ids) == 512
    assert sum(len(request.prompt_ids) for request in requests) <= 65_536 + 512
    assert max(request.sampling.max_new_tokens for request in requests) == 8


def test_a_warm_up_whose_weights_come_from_a_disk_is_two_steps() -> None:
    work = BenchWork(512, 512, 128)
    (request,) = least_warm_up_requests(work, LLAMA3, 0)
    assert (len(request.prompt_ids), request.sampling.max_new_tokens) == (64, 2)
    (short,) = least_warm_up_requests(BenchWork(3, 5, 1), LLAMA3, 0)
    assert (len(short.prompt_ids), short.sampling.max_new_tokens) == (5, 1)
    assert StageOffload(disk_layers=(3,)).reads_disk
    assert StageOffload(head="disk").reads_disk
    assert not StageOffload(host_layers=(3,), embedding="disk").reads_disk


# ---- the record ----------------------------------------------------------------------------------

FLOOR = FloorTimes(
    tokens_per_s=44.0, prefill_s=0.1, decode_round_s=0.02, decode_tokens_per_s=50.0, source="test"
)


def test_the_record_says_what_was_measured() -> None:
    timing = JobTiming(2.0, (completion(0.5, 1.5), completion(1.0, 2.0)), at_once=True)
    record = throughput_record(timing, [report(0, 10, 0.9, 0.1), report(1, 10, 0.6, 0.4)], FLOOR)
    assert record["tokens_per_s"] == 11.0
    assert record["total_tokens_per_s"] == (40 + 22) / 2
    assert (record["prefill_s"], record["decode_s"]) == (1.0, 1.0)
    assert record["ms_per_round"] == pytest.approx(100.0)
    assert record["ms_per_token_p50"] == pytest.approx(100.0)
    assert record["share_of_floor"] == 0.25
    assert record["share_of_decode_floor"] == pytest.approx(0.2)
    assert record["ms_per_steady_step"] == pytest.approx(100.0)
    assert [stage["bubble"] for stage in record["stages"]] == pytest.approx([0.1, 0.4])


def test_what_would_say_nothing_is_null() -> None:
    timing = JobTiming(2.0, (completion(0.5, 1.5, tokens=1),), at_once=False)
    idle = RankReport(rank=0, host="a", stage=StageTotals(0))
    record = throughput_record(timing, [idle], None)
    for name in (
        "ms_per_round",
        "ms_per_token_p50",
        "floor",
        "share_of_floor",
        "ms_per_steady_step",
    ):
        assert record[name] is None
    assert record["stages"][0]["steady_bubble"] is None


def test_reports_hold_only_what_came_after() -> None:
    before, after = report(0, 10, 1.0, 0.5), report(0, 25, 3.0, 0.75)
    (since,) = reports_since([before], [after])
    assert since.stage.num_steps == 15
    assert since.stage.overall == TimeParts(compute_s=2.0, idle_s=0.25)
    assert since.weight_bytes == 7
    assert before.stage.merged(since.stage) == after.stage


def test_new_fields_of_a_report_survive_the_journey() -> None:
    sent = dataclasses.replace(report(0, 1, 1.0, 0.0), cpu_us_per_step=90.5, gpu_peak_bytes=3)
    assert from_json(RankReport, to_json(sent)) == sent
