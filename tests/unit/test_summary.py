"""The run summary: figures, metrics.json and the closing text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from mpipipe.logs.pages import FILES_PAGE, page
from mpipipe.metrics.accounting import StageTotals, TimeParts
from mpipipe.metrics.attempts import AttemptTotals
from mpipipe.metrics.boot import BootPart
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.identity import RunIdentity
from mpipipe.metrics.offload import OffloadUse, PageMoveUse
from mpipipe.metrics.replicas import ReplicaTotals
from mpipipe.metrics.summary import (
    PhaseTimes,
    RankReport,
    RequestTally,
    RunSummary,
    percentile,
)
from mpipipe.metrics.summary_text import summary_lines
from mpipipe.plain_values import from_json, to_json
from mpipipe.types import Completion, FinishReason

MIB = 1024**2


def completion(index: int, *, ttft_s: float, latency_s: float, tokens: int = 5) -> Completion:
    return Completion(
        request_id=str(index),
        index=index,
        text="",
        token_ids=tuple(range(tokens)),
        finish_reason=FinishReason.LENGTH,
        num_prompt_tokens=7,
        queue_s=0.0,
        ttft_s=ttft_s,
        latency_s=latency_s,
    )


def failed(index: int) -> Completion:
    return Completion(
        request_id=str(index),
        index=index,
        text="",
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        num_prompt_tokens=9000,
        queue_s=0.0,
        ttft_s=0.0,
        latency_s=0.0,
        error_kind="too_long",
        error_message="",
    )


def rank_report(stage: int, *, compute_s: float, wait_s: float) -> RankReport:
    overall = TimeParts(compute_s=compute_s, wait_s=wait_s, idle_s=1.0, overhead_s=1.0, send_s=1.0)
    steady = TimeParts(compute_s=4.0, wait_s=1.0)
    return RankReport(
        rank=stage,
        host=f"node{stage}",
        stage=StageTotals(
            stage=stage, num_steps=3, num_tokens=30, overall=overall, steady=steady, bytes_out=4096
        ),
        load_s=0.5,
        boot=(
            BootPart("process", 0.0, 0.25),
            BootPart("read prompts", 0.25, 0.25 if stage == 0 else 0.0),
            BootPart("tokenizer", 0.5, 1.0 if stage == 0 else 0.0),
            BootPart("tokenise", 1.5, 0.5 if stage == 0 else 0.0),
            BootPart("wait", 2.0, 50.0, phase="tokenizer"),
            BootPart("read weights", 52.0, 2.0 + 4.0 * stage, num_bytes=250 * MIB),
            BootPart("convert weights", 58.0, 1.0),
        ),
        loaded_bytes=250 * MIB,
        weight_bytes=200 * MIB,
        kv_bytes=100 * MIB,
        baseline_rss_bytes=400 * MIB,
        peak_rss_bytes=730 * MIB,
    )


@pytest.fixture
def summary() -> RunSummary:
    tally = RequestTally()
    for index in range(20):
        tally.add(completion(index, ttft_s=0.1 * (index + 1), latency_s=float(index + 1)))
    tally.add(failed(20))
    return RunSummary(
        phases=PhaseTimes(boot_s=1.0, load_s=2.0, generate_s=10.0, shutdown_s=0.5),
        requests=tally.totals(),
        num_preemptions=2,
        ranks=(
            rank_report(0, compute_s=6.0, wait_s=1.0),
            rank_report(1, compute_s=5.0, wait_s=2.0),
        ),
        itl_p50_s=0.25,
    )


def test_tokens_of_unfinished_prompts_are_not_known_so_no_tokens_a_step_are(
    summary: RunSummary,
) -> None:
    drafted = replace(summary, drafts=DraftUse(50, 40, 30), num_shared_tokens=4096)
    assert drafted.spared.tokens_per_step is not None
    assert "4,096 of them in shared prefixes" in "\n".join(summary_lines(drafted))
    stopped = replace(drafted, requests=replace(summary.requests, num_unfinished=3))
    assert stopped.spared.tokens_per_step is None
    assert stopped.spared.drafts == drafted.drafts
    told = "4,096 in shared prefixes (unfinished prompts included)"
    assert told in "\n".join(summary_lines(stopped))


def test_percentiles_are_nearest_rank() -> None:
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    assert [percentile(values, p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert percentile([3.0], 95) == 3.0
    assert percentile([], 50) is None


def test_failed_prompts_count_but_touch_no_figure(summary: RunSummary) -> None:
    requests = summary.requests
    assert (requests.num_completed, requests.num_failed) == (20, 1)
    assert (requests.num_prompt_tokens, requests.num_output_tokens) == (140, 100)
    assert requests.ttft_p50_s == pytest.approx(1.0)
    assert requests.ttft_p95_s == pytest.approx(1.9)
    assert (requests.latency_p50_s, requests.latency_p95_s) == (10.0, 19.0)


def test_throughput_is_over_the_generate_phase(summary: RunSummary) -> None:
    assert summary.output_tokens_per_s == pytest.approx(10.0)
    assert summary.total_tokens_per_s == pytest.approx(24.0)


def test_bubble_ratio_weighs_stages_by_their_time(summary: RunSummary) -> None:
    assert summary.bubble_ratio == pytest.approx(9 / 20)
    assert summary.steady_bubble_ratio == pytest.approx(0.2)


def test_the_page_of_files_names_every_part_of_metrics_json(summary: RunSummary) -> None:
    named = set(re.findall(r"`([^`\n]+)`", page(FILES_PAGE)))
    told = summary.to_dict()
    assert [name for name in (*told, *told["drafts"]) if name not in named] == []


def test_metrics_json_holds_every_figure(summary: RunSummary) -> None:
    metrics = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert metrics["phases"]["wall_s"] == pytest.approx(13.5)
    assert metrics["requests"]["num_failed"] == 1
    assert metrics["num_preemptions"] == 2
    assert metrics["output_tokens_per_s"] == pytest.approx(10.0)
    assert (metrics["itl_p50_s"], metrics["energy_j"]) == (0.25, None)
    assert metrics["bytes_moved"] == 2 * 4096
    rank = metrics["ranks"][1]
    assert rank["host"] == "node1"
    assert rank["loaded_bytes"] == 250 * MIB
    assert rank["peak_over_need"] == pytest.approx(1.1)
    overall = rank["stage"]["overall"]
    parts = ("compute_s", "wait_s", "transfer_s", "send_s", "idle_s", "overhead_s")
    assert sum(overall[part] for part in parts) == pytest.approx(overall["wall_s"])
    assert overall["bubble_ratio"] == pytest.approx(0.5)
    assert overall["communication_s"] == pytest.approx(1.0)
    assert rank["stage"]["steady"]["bubble_ratio"] == pytest.approx(0.2)


def test_saved_sequences_count_once_however_many_ranks_share_a_stage(summary: RunSummary) -> None:
    """Every lane of every stage moves the pages of the same sequences."""

    def moved(replica: int, rank: RankReport, num_saved: int) -> RankReport:
        return replace(rank, replica=replica, page_moves=PageMoveUse(num_saved=num_saved))

    ranks = tuple(
        moved(replica, rank, num_saved)
        for replica, num_saved in enumerate((3, 4))
        for rank in summary.ranks
        for _lane in range(2)
    )
    assert replace(summary, ranks=ranks).num_saved == 7


def test_energy_is_the_sum_of_all_ranks_if_all_tell(summary: RunSummary) -> None:
    first, second = (replace(rank, energy_j=20.0) for rank in summary.ranks)
    assert replace(summary, ranks=(first, second)).energy_j == 40.0
    assert replace(summary, ranks=(first, replace(second, energy_j=None))).energy_j is None


def test_reading_and_preprocessing_are_told_apart(summary: RunSummary) -> None:
    """The head's prompts, and of weights, which are read side by side, the slowest rank's."""
    times = replace(summary, io_write_s=0.75).to_dict()["time"]
    assert times == {
        "preprocessing_s": 1.5, "io_read_s": 6.25, "io_write_s": 0.75, "communication_s": 1.0,
    }  # fmt: skip


def test_writing_is_that_of_the_rank_that_wrote_longest(summary: RunSummary) -> None:
    """The head has two threads that write."""

    def write_s(head_files_s: float, *lines_s: float) -> float:
        ranks = tuple(
            replace(rank, io_write_s=seconds)
            for rank, seconds in zip(summary.ranks, lines_s, strict=True)
        )
        told = replace(summary, io_write_s=head_files_s, ranks=ranks).to_dict()
        assert [rank["io_write_s"] for rank in told["ranks"]] == list(lines_s)
        return float(told["time"]["io_write_s"])

    assert write_s(0.5, 0.25, 0.625) == 0.75
    assert write_s(0.5, 0.25, 0.875) == 0.875


def test_the_seconds_until_the_first_token_add_up(summary: RunSummary) -> None:
    parts = summary.start_parts
    assert parts["wait"] == 50.0
    assert parts["first step"] == pytest.approx(0.1)  # the earliest of 20
    assert parts["run files"] == 0.0  # the boot alone is longer than the phases of this fixture
    assert sum(parts.values()) == pytest.approx(sum(p.seconds for p in summary.ranks[0].boot) + 0.1)
    assert summary.to_dict()["start"] == parts
    (line,) = (line for line in summary_lines(summary) if line.startswith("start "))
    assert line.split(" · ") == [
        "start         first token after 55.1 s",
        "wait 50.0 s",
        "read weights 2.0 s",
        "rest 3.1 s",
    ]


def test_what_follows_the_boot_belongs_to_the_start(summary: RunSummary) -> None:
    phases = PhaseTimes(boot_s=50.0, load_s=8.0, generate_s=10.0, shutdown_s=0.5)
    parts = replace(summary, phases=phases).start_parts
    assert sum(parts.values()) == pytest.approx(58.1)


def test_a_run_without_tokens_has_no_start(summary: RunSummary) -> None:
    empty = replace(summary, requests=RequestTally().totals())
    assert empty.start_parts == {}
    assert not [line for line in summary_lines(empty) if line.startswith("start ")]


def test_the_slowest_boot_is_named_with_its_reason(summary: RunSummary) -> None:
    (line,) = (line for line in summary_lines(summary) if line.startswith("slowest boot"))
    assert line.endswith("rank 1 on node1 took 7.2 s, 6.0 s of it: read weights, 250 MiB")
    boot = summary.to_dict()["ranks"][0]["boot"]
    assert boot[4] == {"name": "wait", "start_s": 2.0, "seconds": 50.0, "phase": "tokenizer"}
    assert boot[5]["bytes"] == 250 * MIB


def test_the_figures_are_the_runs_over_all_its_attempts(summary: RunSummary) -> None:
    identity = RunIdentity("0123456789ab", 2, None, replica=0, rank=0, stage=0)
    before = AttemptTotals(1, "interrupted", 20.0, 8.0, 3, 1, 44)
    metrics = replace(summary, identity=identity, state="stopped", earlier=(before,)).to_dict()
    assert (metrics["schema"], metrics["run"], metrics["attempt"]) == (1, "0123456789ab", 2)
    assert metrics["state"] == "stopped"
    assert [entry["state"] for entry in metrics["attempts"]] == ["interrupted", "stopped"]
    assert metrics["attempts"][1] == {
        "attempt": 2, "state": "stopped", "wall_s": 13.5, "generate_s": 10.0, "num_completed": 20,
        "num_failed": 1, "num_output_tokens": 100,
    }  # fmt: skip
    assert metrics["total"]["num_completed"] == 23
    assert metrics["total"]["output_tokens_per_s"] == pytest.approx(144 / 18)


def test_rank_reports_survive_json(summary: RunSummary) -> None:
    report = summary.ranks[0]
    assert from_json(RankReport, to_json(report)) == report


def test_a_run_without_a_single_step_still_has_a_summary() -> None:
    summary = RunSummary(
        phases=PhaseTimes(),
        requests=RequestTally().totals(),
        num_preemptions=0,
        ranks=(RankReport(rank=0, host="node0", stage=StageTotals(stage=0)),),
    )
    metrics = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert metrics["bubble_ratio"] is None
    assert metrics["requests"]["ttft_p50_s"] is None
    assert metrics["ranks"][0]["peak_over_need"] is None
    assert summary_lines(summary)


def test_the_text_says_what_the_user_asked_for(summary: RunSummary) -> None:
    lines = summary_lines(summary)
    text = "\n".join(lines)
    for part in (
        "20 completed, 1 failed",
        "13.5 s · boot 1.0 s · load 2.0 s · generate 10.0 s · shutdown 0.500 s",
        "10.0 output tokens/s · 24.0 tokens/s with prompts · 2 preemptions",
        "1.0 s p50 · 1.9 s p95",
        "45% of all stages' time · 20% in steady state",
        "250 MiB",
        "730 MiB",
    ):
        assert part in text, part
    assert max(map(len, lines)) <= 110


def test_figures_of_a_stopped_run_are_of_what_it_completed(summary: RunSummary) -> None:
    assert "of completed prompts" not in "\n".join(summary_lines(summary))
    requests = replace(summary.requests, num_unfinished=3)
    text = "\n".join(summary_lines(replace(summary, requests=requests)))
    assert "100 output tokens of completed prompts" in text
    assert "10.0 output tokens/s of completed prompts · 24.0" in text


def test_table_columns_are_aligned(summary: RunSummary) -> None:
    lines = summary_lines(summary)
    header = next(index for index, line in enumerate(lines) if line.lstrip().startswith("stage"))
    table = lines[header : header + 3]
    assert len({len(line) for line in table}) == 1, table
    compute_end = table[0].index("compute") + len("compute")
    assert [line[compute_end - 1] for line in table[1:]] == ["%", "%"]
    assert table[1].split()[:5] == ["0", "0", "node0", "6.0", "s"]


def test_the_lanes_of_a_stage_are_told_apart_by_their_ranks(summary: RunSummary) -> None:
    offload, moves = OffloadUse(bytes_per_step=MIB), PageMoveUse(1)
    first = replace(summary.ranks[0], offload=offload, page_moves=moves, kv_host_bytes=MIB)
    ranks = tuple(replace(first, rank=rank) for rank in (2, 3))
    lines = summary_lines(replace(summary, ranks=ranks))
    headers = [n for n, line in enumerate(lines) if line.split()[:2] == ["stage", "rank"]]
    assert len(headers) == 4  # times, memory, offload, pages
    for header in headers:
        assert [line.split()[:2] for line in lines[header + 1 : header + 3]] == [
            ["0", "2"],
            ["0", "3"],
        ]


def test_preemptions_that_moved_pages_are_told(summary: RunSummary) -> None:
    assert not any("KV in host" in line for line in summary_lines(summary))
    assert any(line.endswith(" 2 preemptions") for line in summary_lines(summary))
    first, second = summary.ranks
    use = PageMoveUse(1, saved_bytes=3 * MIB, restored_bytes=2 * MIB, bytes_per_s=1.5e9)
    ranks = [replace(rank, page_moves=use, kv_host_bytes=9 * MIB) for rank in (first, second)]
    moved = replace(summary, ranks=tuple(ranks))
    lines = summary_lines(moved)
    assert any(line.endswith(" 2 preemptions, 1 by moving pages") for line in lines)
    assert lines[-1].split() == ["1", "1", "9.0", "MiB", "3.0", "MiB", "2.0", "MiB", "1.50", "GB/s"]
    layers = replace(summary, ranks=(first, replace(second, kv_host_bytes=7 * MIB)))
    assert summary_lines(layers)[-1].split() == ["1", "1", "7.0", "MiB", "-", "-", "-"]
    metrics = json.loads(json.dumps(moved.to_dict(), allow_nan=False))
    assert metrics["num_saved"] == 1
    assert metrics["ranks"][1]["page_moves"]["restored_bytes"] == 2 * MIB


def test_offloaded_weights_are_told_beside_what_was_planned(summary: RunSummary) -> None:
    """Without them nothing is said; each stage that streams has its row."""
    assert "gate wait" not in "\n".join(summary_lines(summary))
    use = OffloadUse(
        bytes_per_step=1536 * MIB,
        wait_s=2.0,
        host_bytes_per_s=10.5e9,
        planned_host_bytes_per_s=12e9,
        disk_bytes_per_s=0.5e9,
    )
    first, second = summary.ranks
    streaming = replace(summary, ranks=(first, replace(second, offload=use)))
    header, row = summary_lines(streaming)[-2:]
    assert header.endswith("gate wait")
    assert " ".join(row.split()) == "1 1 1.5 GiB 10.50 GB/s 88% 0.50 GB/s - 2.0 s 20%"
    assert streaming.to_dict()["ranks"][1]["offload"]["wait_s"] == 2.0
    assert from_json(RankReport, to_json(streaming.ranks[1])) == streaming.ranks[1]


def test_replicas_have_lines_of_their_own_and_stages_are_named_with_them(
    summary: RunSummary,
) -> None:
    ranks = tuple(replace(rank, replica=number) for number, rank in enumerate(summary.ranks))
    replicas = (
        ReplicaTotals(0, 0, 11, 1, 80, 60, 1, 10.0, 0.0, 0.5),
        ReplicaTotals(1, 1, 9, 0, 60, 40, 1, 10.0, 0.25, 0.0),
    )
    told = replace(summary, ranks=ranks, replicas=replicas)
    lines = summary_lines(told)
    header = next(number for number, line in enumerate(lines) if line.startswith("replica"))
    assert [line.split() for line in lines[header + 1 : header + 3]] == [
        ["0", "12", "60", "6.0", "5%", "0.000", "s", "0.500", "s"],
        ["1", "9", "40", "4.0", "2%", "0.250", "s", "0.000", "s"],
    ]
    assert sum(line.split()[:2] == ["0.0", "0"] for line in lines) == 2  # times, memory
    assert sum(line.split()[:2] == ["1.1", "1"] for line in lines) == 2
    assert all(len(line) <= 120 for line in lines)
    first, second = told.to_dict()["replicas"]
    assert (first["output_tokens_per_s"], first["idle_ratio"]) == (6.0, 0.05)
    assert (second["starved_s"], second["tail_s"], second["head_rank"]) == (0.25, 0.0, 1)
    assert summary.to_dict()["replicas"] == []
    assert not any("replica" in line for line in summary_lines(summary))
