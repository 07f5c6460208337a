"""`mpipipe logs summary` names what held a run up: each culprit planted, and none where none is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mpipipe.logs.culprit import Culprit, find_culprit
from mpipipe.logs.facts import read_facts
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.stalls import Stall, find_stalls
from mpipipe.logs.step_report import report_steps
from tests.unit.written_run import WrittenRun


def culprit(run: WrittenRun) -> Culprit:
    return find_culprit(read_facts(RunFiles(run.write())))


def stalls(run: WrittenRun) -> list[Stall]:
    return find_stalls(read_facts(RunFiles(run.write())))


def test_a_run_without_a_fault_has_no_culprit(tmp_path: Path) -> None:
    found = culprit(WrittenRun(tmp_path))
    assert (found.kind, found.rank, found.seconds) == ("none", None, 0.0)
    assert found.sentence.startswith("no single culprit: while generating, the ranks spent ")
    assert "compute 67%" in found.sentence


def test_a_run_that_has_generated_nothing_has_no_culprit(tmp_path: Path) -> None:
    """A finished run that was started again: there is no link that takes 0.0 ms a step."""
    folder = WrittenRun(tmp_path).write()
    for rank in (0, 1):
        for name in (f"steps_rank_{rank}.jsonl", f"samples_rank_{rank}.jsonl"):
            (folder / name).unlink()
        log = (folder / f"rank_{rank}.log").read_text().splitlines(keepends=True)
        booted = [line for line in log if '"event": "boot"' in line]
        (folder / f"rank_{rank}.log").write_text("".join(booted))
    (folder / "metrics.json").unlink()
    found = find_culprit(read_facts(RunFiles(folder)))
    assert (found.kind, found.rank) == ("none", None)
    assert found.sentence == "no single culprit: no time of generating is on record"


def test_a_run_of_which_most_is_its_start_is_told_what_that_was(tmp_path: Path) -> None:
    started = culprit(WrittenRun(tmp_path / "long", boot_s={1: {"imports": 9.0, "wait": 30.0}}))
    assert started.kind == "none"
    ending = (
        r"; [\d.]+ s of [\d.]+ s went by before and after that, the longest part of it: imports, "
        r"9\.0 s on rank 1$"
    )
    assert re.search(ending, started.sentence)
    long = culprit(WrittenRun(tmp_path / "short", num_steps=40_000 // 10))
    assert "went by" not in long.sentence


# ---- a slow stage --------------------------------------------------------------------------------


def test_a_stage_that_computes_longest_is_named_with_its_figures(tmp_path: Path) -> None:
    run = WrittenRun(
        tmp_path,
        parts={0: {"wait_s": 0.0054}, 1: {"compute_s": 0.0071}},
        cpu_share={1: 2.1 / 7.1},  # it sleeps: no core is used meanwhile
    )
    found = culprit(run)
    assert (found.kind, found.rank, found.stage) == ("slow_stage", 1, 1)
    assert found.seconds == pytest.approx(400 * 0.0051, rel=0.01)
    assert found.sentence == (
        "stage 1 is the slowest: 7.1 ms of compute a step against 2.0 ms; stage 0 waits for it 69% "
        "of the time"
    )


def test_stages_that_differ_by_little_are_no_culprit(tmp_path: Path) -> None:
    assert culprit(WrittenRun(tmp_path, parts={1: {"compute_s": 0.0023}})).kind == "none"


def test_one_rank_is_never_slower_than_others(tmp_path: Path) -> None:
    found = culprit(WrittenRun(tmp_path, num_ranks=1, parts={0: {"compute_s": 0.5}}))
    assert found.kind == "none"


def test_a_killed_run_of_which_one_rank_left_steps_has_no_slowest_stage(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, parts={0: {"compute_s": 0.0071}}, cpu_share={0: 0.3})
    folder = run.write()
    (folder / "metrics.json").unlink()
    (folder / "steps_rank_1.jsonl").unlink()
    assert find_culprit(read_facts(RunFiles(folder))).kind != "slow_stage"


# ---- a shared core -------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [280.0, None])
def test_a_rank_that_computes_without_a_core_shares_it(
    tmp_path: Path, switches: float | None
) -> None:
    run = WrittenRun(
        tmp_path,
        parts={0: {"wait_s": 0.0024}, 1: {"compute_s": 0.0042}},
        cpu_share={1: 0.5},
        node_cpu_percent=100.0,
        switches_per_s={1: switches} if switches else {},
    )
    run.write()
    if switches is None:  # older samples do not tell
        path = tmp_path / "samples_rank_1.jsonl"
        path.write_text(path.read_text().replace("num_involuntary_switches", "other"))
    found = find_culprit(read_facts(RunFiles(tmp_path)))
    assert (found.kind, found.rank) == ("shared_core", 1)
    assert found.sentence.startswith("rank 1 shares its core: its compute took 2.0 × its CPU time")
    assert found.sentence.endswith("node CPU 100 %)")
    assert found.seconds == pytest.approx(0.5 * 400 * 0.0042, rel=0.01)


@pytest.mark.parametrize(("delay", "kind"), [(0.8, "shared_core"), (0.04, "slow_stage")])
def test_the_time_that_others_had_the_core_tells_a_shared_core_from_a_sleep(
    tmp_path: Path, delay: float, kind: str
) -> None:
    """On a busy node also a rank that sleeps is put aside often."""
    run = WrittenRun(
        tmp_path, parts={0: {"wait_s": 0.0024}, 1: {"compute_s": 0.0042}}, cpu_share={1: 0.5},
        node_cpu_percent=100.0, switches_per_s={1: 280.0}, run_delay_share={0: 0.04, 1: delay},
    )  # fmt: skip
    found = culprit(run)
    assert (found.kind, found.rank) == (kind, 1)


def test_a_stopped_rank_does_not_share_its_core(tmp_path: Path) -> None:
    run = WrittenRun(
        tmp_path, odd={(1, 50): {"compute_s": 4.0}}, cpu_share={1: 0.2}, node_cpu_percent=100.0,
        switches_per_s={1: 280.0},
    )  # fmt: skip
    assert culprit(run).kind == "stall"


def test_on_a_gpu_no_core_computes(tmp_path: Path) -> None:
    run = WrittenRun(
        tmp_path, cpu_share={0: 0.1, 1: 0.1}, node_cpu_percent=100.0, device="cuda",
        switches_per_s={0: 280.0, 1: 280.0},
    )  # fmt: skip
    assert culprit(run).kind == "none"


# ---- reading -------------------------------------------------------------------------------------


def test_a_rank_that_reads_slowly_is_named_with_both_rates(tmp_path: Path) -> None:
    run = WrittenRun(
        tmp_path, boot_s={0: {"read weights": 100 / 900}, 1: {"read weights": 100 / 12}}
    )
    found = culprit(run)
    assert (found.kind, found.rank) == ("slow_read", 1)
    assert found.sentence == ("rank 1 read its weights at 12 MB/s (8.3 s), rank 0 at 900 MB/s")
    assert found.seconds == pytest.approx(100 / 12 - 100 / 900, rel=0.01)


def test_reading_for_a_moment_longer_is_no_culprit(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, boot_s={0: {"read weights": 0.1}, 1: {"read weights": 0.6}})
    assert culprit(run).kind == "none"


# ---- links ---------------------------------------------------------------------------------------


def test_a_link_that_tensors_wait_on_is_named_with_its_rate(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, parts={0: {"idle_s": 0.0048}, 1: {"transfer_s": 0.0048}})
    found = culprit(run)
    assert (found.kind, found.rank) == ("slow_link", 1)
    assert found.sentence == "the link 0→1 took 4.8 ms a step for 46 KB (9.6 MB/s)"
    assert found.seconds == pytest.approx(400 * 0.0048, rel=0.01)


def test_the_way_back_to_the_first_stage_is_a_link_too(tmp_path: Path) -> None:
    found = culprit(WrittenRun(tmp_path, num_ranks=3, parts={0: {"transfer_s": 0.003}}))
    assert found.sentence.startswith("the link 2→0 took 3.0 ms a step")


# ---- prompts -------------------------------------------------------------------------------------


def test_slots_without_work_are_told_when_prompts_are_unequal(tmp_path: Path) -> None:
    short = [(index % 2, 0.0, 0.38, 20) for index in range(7)]
    run = WrittenRun(tmp_path, requests=[*short, (0, 0.0, 1.0, 400)])
    found = culprit(run)
    assert (found.kind, found.rank) == ("unequal_prompts", None)
    assert found.sentence == (
        "prompts of unequal length (30 to 410 tokens): slot 1 had work for 38% of the time"
    )
    assert found.seconds == pytest.approx(0.5 * 0.62 * run.generate_s, rel=0.01)


def test_a_slot_that_ends_early_with_equal_prompts_is_no_unequal_prompt(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, requests=[(0, 0.0, 1.0, 50), (1, 0.0, 0.5, 50)])
    assert culprit(run).kind == "none"


def test_fewer_prompts_than_slots_are_told(tmp_path: Path) -> None:
    found = culprit(WrittenRun(tmp_path, requests=[(0, 0.0, 1.0, 50)]))
    assert found.kind == "none"
    assert found.sentence.endswith("; 1 prompt(s) cannot fill 2 slots")


# ---- stalls --------------------------------------------------------------------------------------


def test_a_stopped_rank_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, odd={(1, 312): {"compute_s": 4.0}, (0, 313): {"wait_s": 4.0}})
    found = culprit(run)
    assert (found.kind, found.rank, found.stage) == ("stall", 1, 1)
    assert found.sentence == (
        "4.0 s stall at step 312: rank 1 took 4.0 s for its compute, its peers waited"
    )
    (stall,) = stalls(WrittenRun(tmp_path / "again", odd=run.odd))
    assert (stall.step, stall.rank, stall.part, stall.phase) == (312, 1, "compute", "decode")
    assert stall.usual_s == pytest.approx(0.003)


def test_a_rank_that_noticed_its_pause_gave_no_sign(tmp_path: Path) -> None:
    """It was stopped while it waited: its peers' steps look the same as its own."""
    run = WrittenRun(
        tmp_path,
        odd={(1, 100): {"idle_s": 4.0}, (0, 100): {"idle_s": 4.0}},
        events=[(1, 4.4, {"event": "held up", "seconds": 3.9, "cpu_s": 0.0})],
    )
    found = culprit(run)
    assert (found.kind, found.rank) == ("stall", 1)
    assert found.sentence == ("4.0 s stall at step 100: rank 1 gave no sign, its peers waited")


@pytest.mark.parametrize(
    ("odd", "rank", "cause"),
    [
        ({(1, 9): {"transfer_s": 4.0}, (0, 10): {"idle_s": 4.0}}, 1, "did not receive"),
        ({(1, 9): {"wait_s": 4.0}, (0, 10): {"idle_s": 4.0}}, 1, "did not go on"),
        ({(1, 9): {"wait_s": 4.0}}, 0, "has no step that tells why"),
        ({(1, 9): {"idle_s": 4.0}, (0, 9): {"idle_s": 4.0}}, 0, "scheduled nothing"),
        ({(0, 9): {"send_s": 4.0}, (1, 9): {"wait_s": 4.0}}, 0, "took 4.0 s for sending"),
    ],
)
def test_who_held_the_others_up(
    tmp_path: Path, odd: dict[tuple[int, int], dict[str, float]], rank: int, cause: str
) -> None:
    found = culprit(WrittenRun(tmp_path, odd=odd))
    assert (found.kind, found.rank) == ("stall", rank)
    assert f"rank {rank} " in found.sentence
    assert cause in found.sentence


def test_several_stalls_are_summed_and_the_worst_is_named(tmp_path: Path) -> None:
    odd = {(1, 50): {"compute_s": 1.5}, (0, 800): {"compute_s": 2.5}}
    run = WrittenRun(tmp_path, num_steps=1000, odd=odd)
    found = culprit(run)
    assert found.rank == 0
    assert found.sentence.endswith("(2 stalls, 4.0 s in all)")
    assert found.seconds == pytest.approx(4.0)


def test_long_steps_of_a_phase_that_is_long_are_no_stalls(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path, num_steps=50, parts={0: {"compute_s": 0.9}, 1: {"wait_s": 0.9}})
    assert stalls(run) == []


def test_the_cause_with_the_most_seconds_is_named(tmp_path: Path) -> None:
    both = {"parts": {1: {"compute_s": 0.0071}}, "boot_s": {1: {"read weights": 9.0}}}
    assert culprit(WrittenRun(tmp_path / "a", num_steps=400, **both)).kind == "slow_read"  # type: ignore[arg-type]
    assert culprit(WrittenRun(tmp_path / "b", num_steps=8000, **both)).kind == "slow_stage"  # type: ignore[arg-type]


# ---- several replicas ----------------------------------------------------------------------------


def as_replicas(folder: Path, num_stages: int) -> RunFiles:
    """The run of `folder` as one of pipelines of `num_stages` neighbouring ranks each."""
    for path in [*folder.glob("*.jsonl"), *folder.glob("*.log")]:
        lines = [json.loads(row) for row in path.read_text().splitlines()]
        for line in lines:
            line["replica"], line["stage"] = divmod(line["rank"], num_stages)
            if path.name == "requests.jsonl":
                line["on_replica"] = line["index"] % 2
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["plan"]["num_replicas"] = 2
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return RunFiles(folder)


def test_a_slow_stage_of_a_replica_is_named_with_its_replica(tmp_path: Path) -> None:
    run = WrittenRun(
        tmp_path, num_ranks=4, parts={2: {"compute_s": 0.0071}}, cpu_share={2: 2.1 / 7.1}
    )
    facts = read_facts(as_replicas(run.write(), 2))
    assert [(rank.replica, rank.stage) for rank in facts.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = find_culprit(facts)
    assert (found.kind, found.rank, found.stage) == ("slow_stage", 2, 0)
    assert found.sentence.startswith("stage 0 of replica 1 is the slowest: 7.1 ms")


def test_the_link_into_a_first_stage_comes_from_the_last_one_of_its_replica(
    tmp_path: Path,
) -> None:
    slow = {2: {"transfer_s": 0.004}}
    run = WrittenRun(tmp_path, num_ranks=4, parts=slow)
    facts = read_facts(as_replicas(run.write(), 2))
    found = find_culprit(facts)
    assert (found.kind, found.rank) == ("slow_link", 2)
    assert found.sentence.startswith("the link 3→2 took 4.0 ms a step")
    assert [facts.before(rank).rank for rank in facts.ranks] == [1, 0, 3, 2]


def test_a_slot_without_work_is_one_of_a_replica(tmp_path: Path) -> None:
    """Of four slots, the one of replica 1 that odd requests of slot 1 ran in ends early."""
    spans = [(0, 0.0, 1.0, 90), (0, 0.0, 1.0, 90), (1, 0.0, 1.0, 90), (1, 0.0, 0.3, 20)]
    run = WrittenRun(tmp_path, num_ranks=4, requests=spans)
    found = find_culprit(read_facts(as_replicas(run.write(), 2)))
    assert found.kind == "unequal_prompts"
    assert "slot 1 of replica 1 had work for 30% of the time" in found.sentence


def test_steps_are_counted_over_all_replicas(tmp_path: Path) -> None:
    files = as_replicas(WrittenRun(tmp_path, num_ranks=4).write(), 2)
    report = report_steps(read_facts(files), 1.0)
    assert (report.num_steps, report.num_steps_kept) == (800, 800)
    assert {(row.replica, row.stage) for row in report.phases} == {(0, 0), (0, 1), (1, 0), (1, 1)}
