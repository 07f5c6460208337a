"""What held a run up most, in one sentence: rules over the figures of `facts`. Pure.

Each rule tells how many seconds the run would have been shorter without its cause. The cause with
the most seconds is named if it cost a tenth of the phase that it belongs to; otherwise there is no
single culprit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from mpipipe.logs.facts import BootEvent, RankFacts, RunFacts
from mpipipe.logs.stalls import Stall, find_stalls
from mpipipe.logs.steps import PARTS

__all__ = ["Culprit", "CulpritKind", "find_culprit"]

CulpritKind = Literal[
    "slow_stage", "slow_read", "slow_link", "shared_core", "unequal_prompts", "stall", "none"
]

_LEAST_SHARE = 0.1  # of the generate phase, or of the whole run for what happens before it
_LEAST_READ_S = 1.0
_LEAST_STALL_S = 1.0
_SLOWER = 1.25  # a stage that computes so much longer than the others
_CPU_SHARE = 0.8  # a thread that computes has its core for more of the time than this
_NODE_BUSY_PERCENT = 85.0
# A process that is put aside comes back after a slice of its rival: 3 to 6 ms on Linux. Time that
# so many switches cannot explain was given away on purpose: a sleep, a disk.
_MOST_SLICE_S = 0.010
_READ = "read weights"
_WAIT = "wait"  # the boot event
_MOST_START = 0.5  # of the wall clock: it is worth a word


@dataclass(frozen=True, slots=True)
class Culprit:
    """What held the run up; of the kind `none` the sentence says what its time went to."""

    kind: CulpritKind
    sentence: str
    rank: int | None = None
    stage: int | None = None
    seconds: float = 0.0  # that the run would have been shorter


def find_culprit(run: RunFacts) -> Culprit:
    """The one thing that cost the run the most time, if there is one."""
    stalls = [stall for stall in find_stalls(run) if stall.seconds >= _LEAST_STALL_S]
    found = [
        *_stalled(stalls),
        *_shared_core(run, stalls),
        *_slow_stage(run, stalls),
        *_slow_link(run, stalls),
        *_unequal_prompts(run),
    ]
    found = [one for one in found if one.seconds >= _LEAST_SHARE * run.generate_s]
    found += [one for one in _slow_read(run) if one.seconds >= _LEAST_SHARE * run.wall_s]
    found = [one for one in found if one.seconds > 0]
    return max(found, key=lambda one: one.seconds, default=_no_culprit(run))


# ---- one rule each -------------------------------------------------------------------------------


def _stalled(stalls: Sequence[Stall]) -> Iterator[Culprit]:
    if not stalls:
        return
    worst = max(stalls, key=lambda stall: stall.seconds)
    lost_s = sum(stall.seconds for stall in stalls)
    more = f" ({len(stalls)} stalls, {lost_s:.1f} s in all)" if len(stalls) > 1 else ""
    yield Culprit(
        "stall",
        f"{worst.seconds:.1f} s stall at step {worst.step}: rank {worst.rank} {worst.cause}{more}",
        worst.rank,
        worst.stage,
        lost_s,
    )


def _computed(run: RunFacts, stalls: Sequence[Stall]) -> dict[int, float]:
    """Seconds of compute by rank, without stalls."""
    computed = {rank.rank: rank.parts_s.get("compute", 0.0) for rank in run.ranks}
    for stall in stalls:
        if stall.part == "compute":
            computed[stall.rank] -= stall.seconds - stall.usual_s
    return computed


def _put_aside(run: RunFacts, stalls: Sequence[Stall]) -> dict[int, float]:
    """Seconds by rank in which it computed without a core; on CPUs only."""
    if run.device == "cuda":
        return {rank.rank: 0.0 for rank in run.ranks}
    computed = _computed(run, stalls)
    return {rank.rank: _put_aside_s(rank, computed[rank.rank]) for rank in run.ranks}


def _shared_core(run: RunFacts, stalls: Sequence[Stall]) -> Iterator[Culprit]:
    """A rank whose thread computed for longer than it had a core."""
    lost_s = _put_aside(run, stalls)
    worst = max(run.ranks, key=lambda rank: lost_s[rank.rank], default=None)
    if worst is None or lost_s[worst.rank] <= 0:
        return
    cpu = worst.cpu
    assert cpu is not None, "it has lost time"
    compute_s = cpu.cpu_s + lost_s[worst.rank]
    others = [str(rank) for rank, seconds in lost_s.items() if seconds > 0 and rank != worst.rank]
    node = f", node CPU {cpu.node_percent:.0f} %" if cpu.node_percent is not None else ""
    sentence = (
        f"rank {worst.rank} shares its core: its compute took {compute_s / cpu.cpu_s:.1f} × its "
        f"CPU time ({compute_s:.1f} s against {cpu.cpu_s:.1f} s{node})"
    )
    if others:
        sentence += f"; so {'do ranks' if len(others) > 1 else 'does rank'} {', '.join(others)}"
    yield Culprit("shared_core", sentence, worst.rank, worst.stage, lost_s[worst.rank])


def _put_aside_s(rank: RankFacts, computed_s: float) -> float:
    """For how long the rank computed without a core, if others had it meanwhile; else 0."""
    cpu = rank.cpu
    if cpu is None or cpu.cpu_s <= 0 or rank.generate_s <= 0:
        return 0.0
    compute_s = computed_s * min(1.0, cpu.wall_s / rank.generate_s)
    lost_s = compute_s - cpu.cpu_s
    if cpu.cpu_s > _CPU_SHARE * compute_s:
        return 0.0
    if cpu.run_delay_s is not None:
        return min(lost_s, cpu.run_delay_s)
    if cpu.num_involuntary_switches is not None:
        was_busy = cpu.num_involuntary_switches * _MOST_SLICE_S >= 0.5 * lost_s
    else:
        was_busy = (cpu.node_percent or 0.0) >= _NODE_BUSY_PERCENT
    return lost_s if was_busy else 0.0


def _slow_stage(run: RunFacts, stalls: Sequence[Stall]) -> Iterator[Culprit]:
    """A stage that computes longer than the others, other than by a stall or for want of a core."""
    put_aside = _put_aside(run, stalls)
    computed = {rank: s - put_aside[rank] for rank, s in _computed(run, stalls).items()}
    if len(computed) < 2 or not any(computed.values()):
        return
    slowest = max(run.ranks, key=lambda rank: computed[rank.rank])
    others = [rank for rank in run.ranks if rank is not slowest]
    others_s = fmean(computed[rank.rank] for rank in others)
    lost_s = computed[slowest.rank] - others_s
    if computed[slowest.rank] < _SLOWER * others_s:
        return
    waited = [
        (rank.parts_s.get("wait", 0.0) + rank.parts_s.get("idle", 0.0)) / rank.generate_s
        for rank in others
        if rank.generate_s > 0
    ]
    if not waited:  # of a killed run only this rank has left steps
        return
    waiting = fmean(waited)
    mine, theirs = _per_step(slowest), fmean(_per_step(rank) for rank in others)
    verb = "the others wait" if len(others) > 1 else f"{run.stage_name(others[0])} waits"
    yield Culprit(
        "slow_stage",
        f"{run.stage_name(slowest)} is the slowest: {_milliseconds(mine)} of compute a step "
        f"against {_milliseconds(theirs)}; {verb} for it {waiting:.0%} of the time",
        slowest.rank,
        slowest.stage,
        lost_s,
    )


def _per_step(rank: RankFacts) -> float:
    """What a usual step computes: the median of decode steps if there are, else the mean."""
    decode = rank.steps.phases.get("decode")
    if decode is not None and decode.compute_s:
        return median(decode.compute_s)
    return rank.parts_s.get("compute", 0.0) / max(1, rank.num_steps)


def _slow_link(run: RunFacts, stalls: Sequence[Stall]) -> Iterator[Culprit]:
    """An edge on which tensors were on their way while the stage behind it could have computed."""
    if len(run.ranks) < 2:
        return
    exposed = {rank.rank: rank.parts_s.get("transfer", 0.0) for rank in run.ranks}
    for stall in stalls:
        if stall.part == "transfer":
            exposed[stall.rank] -= stall.seconds
    slowest = max(run.ranks, key=lambda rank: exposed[rank.rank])
    before = run.before(slowest)
    edge = f"the link {before.rank}→{slowest.rank} took"
    phases = slowest.steps.phases.values()
    transfers = [seconds for phase in phases for seconds in phase.transfer_s]
    num_bytes = sum(phase.bytes_in for phase in phases)
    if transfers and num_bytes and (usual_s := median(transfers)) > 0:
        per_step = num_bytes / len(transfers)
        rate = sum(transfers) and num_bytes / sum(transfers)
        sentence = f"{edge} {_milliseconds(usual_s)} a step for {_size(per_step)} ({_size(rate)}/s)"
    else:
        sentence = f"{edge} {exposed[slowest.rank] / max(1, slowest.num_steps) * 1e3:.1f} ms a step"
    yield Culprit("slow_link", sentence, slowest.rank, slowest.stage, exposed[slowest.rank])


def _unequal_prompts(run: RunFacts) -> Iterator[Culprit]:
    """Slots that had no work while another had: the time that equal shares would have saved."""
    spans, num_slots = run.requests, run.num_slots
    if num_slots < 2 or len(spans) < num_slots:
        return
    lengths = [span.num_prompt_tokens + span.num_output_tokens for span in spans]
    if max(lengths) < 2 * min(lengths):
        return
    per_replica = max(num_slots // run.num_replicas, 1 + max(span.slot for span in spans))
    numbers = [span.replica * per_replica + span.slot for span in spans]
    changes = sorted(
        [(span.admitted_s, slot, 1) for span, slot in zip(spans, numbers, strict=True)]
        + [(span.finished_s, slot, -1) for span, slot in zip(spans, numbers, strict=True)]
    )
    running = dict.fromkeys(range(max(num_slots, 1 + max(numbers))), 0)
    busy_s = dict.fromkeys(running, 0.0)
    lost_s = 0.0
    for (since_s, slot, change), (until_s, _, _) in pairwise(changes):
        running[slot] += change
        active = [one for one, count in running.items() if count > 0]
        for one in active:
            busy_s[one] += until_s - since_s
        lost_s += (until_s - since_s) * (1 - len(active) / len(running)) if active else 0.0
    total_s = changes[-1][0] - changes[0][0]
    if total_s <= 0:
        return
    least = min(busy_s, key=lambda slot: busy_s[slot])
    replica, slot = divmod(least, per_replica)
    where = f" of replica {replica}" if run.num_replicas > 1 else ""
    yield Culprit(
        "unequal_prompts",
        f"prompts of unequal length ({min(lengths):,} to {max(lengths):,} tokens): "
        f"slot {slot}{where} had work for {busy_s[least] / total_s:.0%} of the time",
        seconds=lost_s,
    )


def _slow_read(run: RunFacts) -> Iterator[Culprit]:
    """A rank that read its weights at a far lower rate than the others."""
    reads = {
        rank.rank: (seconds, num_bytes)
        for rank in run.ranks
        if (seconds := rank.boot_s(_READ)) > 0
        and (num_bytes := sum(event.num_bytes or 0 for event in _reads(rank)))
    }
    if len(reads) < 2:
        return
    rates = {rank: num_bytes / seconds for rank, (seconds, num_bytes) in reads.items()}
    slowest = min(rates, key=lambda rank: rates[rank])
    usual = median(rate for rank, rate in rates.items() if rank != slowest)
    seconds, num_bytes = reads[slowest]
    lost_s = seconds - num_bytes / usual
    if rates[slowest] > 0.5 * usual or lost_s < _LEAST_READ_S:
        return
    (stage,) = (rank.stage for rank in run.ranks if rank.rank == slowest)
    if len(rates) == 2:
        others = f"rank {next(rank for rank in rates if rank != slowest)}"
    else:
        others = "the others"
    yield Culprit(
        "slow_read",
        f"rank {slowest} read its weights at {_size(rates[slowest])}/s ({seconds:.1f} s), {others} "
        f"at {_size(usual)}/s",
        slowest,
        stage,
        lost_s,
    )


def _reads(rank: RankFacts) -> Iterator[BootEvent]:
    return (event for event in rank.boot if event.name == _READ)


def _no_culprit(run: RunFacts) -> Culprit:
    """No culprit: what the time went to instead."""
    total_s = sum(rank.generate_s for rank in run.ranks)
    if total_s <= 0:
        return Culprit("none", "no single culprit: no time of generating is on record")
    shares = {
        part: sum(rank.parts_s.get(part, 0.0) for rank in run.ranks) / total_s for part in PARTS
    }
    largest = sorted(shares, key=lambda part: -shares[part])[:3]
    told = ", ".join(f"{part} {shares[part]:.0%}" for part in largest)
    few = ""
    if 0 < len(run.requests) < run.num_slots:
        few = f"; {len(run.requests)} prompt(s) cannot fill {run.num_slots} slots"
    told += _long_start(run) + few
    return Culprit("none", f"no single culprit: while generating, the ranks spent {told}")


def _long_start(run: RunFacts) -> str:
    """Where most of the run went before it generated: how much, and what took longest of it."""
    started = [rank for rank in run.ranks if rank.started_s is not None and rank.boot]
    if not started:
        return ""
    slowest = max(started, key=lambda rank: sum(e.seconds for e in rank.boot if e.name != _WAIT))
    start_s = slowest.wall_s - slowest.generate_s
    if start_s < _MOST_START * slowest.wall_s:
        return ""
    names = {event.name for event in slowest.boot} - {_WAIT}
    longest = max(names, key=slowest.boot_s, default=_WAIT)
    return (
        f"; {start_s:.1f} s of {slowest.wall_s:.1f} s went by before and after that, the longest "
        f"part of it: {longest}, {slowest.boot_s(longest):.1f} s on rank {slowest.rank}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if num_bytes >= 10 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
