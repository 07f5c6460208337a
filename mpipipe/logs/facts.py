"""What the files of a run say, gathered into figures: what `culprit` and `summary` judge.

One attempt of the run, by default the last that generated. Whatever is missing is None or empty,
never invented.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mpipipe.logs.attempts import choose_attempt, last_attempt, told_state
from mpipipe.logs.clocks import RankClocks, read_clocks
from mpipipe.logs.reading import Line, RunFiles, number, rows, text, whole
from mpipipe.logs.steps import PARTS, RankSteps, read_steps

__all__ = [
    "BootEvent",
    "CpuUse",
    "Pause",
    "RankFacts",
    "RequestSpan",
    "RunFacts",
    "read_facts",
]


@dataclass(frozen=True, slots=True)
class BootEvent:
    """One part of a rank's boot, on its own clock."""

    name: str
    start_s: float
    end_s: float
    num_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class CpuUse:
    """What the CPU did while the rank generated, as its samples tell."""

    wall_s: float  # covered by samples
    cpu_s: float  # used by the process, all threads
    node_percent: float | None  # of all cores of the node
    num_involuntary_switches: int | None  # how often the process was put aside for another
    run_delay_s: float | None = None  # its compute thread waited for a core; None: not told


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which the rank noticed that its event loop had stood still."""

    end_s: float  # on its own clock
    seconds: float
    cpu_s: float  # that it used meanwhile; near 0: its process was stopped


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """When a prompt had a place in a slot of a replica, on rank 0's clock."""

    replica: int
    slot: int
    admitted_s: float
    finished_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class RankFacts:
    """One rank of the attempt. Moments are on its own clock."""

    rank: int
    replica: int = 0
    stage: int | None = None
    host: str = ""
    boot: tuple[BootEvent, ...] = ()
    started_s: float | None = None  # start of the process, or the first sign of it
    generating_s: float | None = None  # the generate phase began
    generated_s: float | None = None  # and ended
    ended_s: float | None = None  # the last sign of the rank
    parts_s: Mapping[str, float] = field(default_factory=dict)  # of the generate phase
    num_steps: int = 0
    steps: RankSteps = field(default_factory=RankSteps)  # those that were kept
    cpu: CpuUse | None = None
    pauses: tuple[Pause, ...] = ()

    @property
    def wall_s(self) -> float:
        """From the start of the process to its last sign; 0: unknown."""
        if self.started_s is None or self.ended_s is None:
            return 0.0
        return self.ended_s - self.started_s

    @property
    def generate_s(self) -> float:
        """Length of the generate phase: the sum of its parts, which were cut from it."""
        return sum(self.parts_s.values())

    def boot_s(self, name: str) -> float:
        """Seconds of the boot events of that name."""
        return sum(event.seconds for event in self.boot if event.name == name)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One attempt of a run."""

    run: str
    attempt: int
    num_attempts: int
    state: str  # as the run itself said; empty: it did not say
    # In the order of replicas and stages; those that other attempts alone had are left out.
    ranks: tuple[RankFacts, ...]
    requests: tuple[RequestSpan, ...] = ()
    num_slots: int = 0  # of all replicas; 0: unknown
    device: str = ""
    clocks: RankClocks = field(default_factory=lambda: RankClocks({}))

    @property
    def num_replicas(self) -> int:
        """Pipelines side by side."""
        return len({rank.replica for rank in self.ranks})

    def before(self, rank: RankFacts) -> RankFacts:
        """The rank whose results `rank` computes on: of the stage before, in a ring."""
        ring = [other for other in self.ranks if other.replica == rank.replica]
        return ring[ring.index(rank) - 1]

    def stage_name(self, rank: RankFacts) -> str:
        """In a sentence; with the replica where there are several."""
        where = f" of replica {rank.replica}" if self.num_replicas > 1 else ""
        return f"stage {rank.stage}{where}"

    @property
    def generate_s(self) -> float:
        """The longest generate phase of a rank."""
        return max((rank.generate_s for rank in self.ranks), default=0.0)

    @property
    def wall_s(self) -> float:
        """The longest life of a rank."""
        return max((rank.wall_s for rank in self.ranks), default=0.0)


@dataclass(slots=True)
class _Log:
    """What a rank's log tells of one attempt."""

    replica: int = 0
    stage: int | None = None
    host: str = ""
    boot: list[BootEvent] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    at_s: dict[str, float] = field(default_factory=dict)  # event → the last time it came

    def add(self, line: Line) -> None:
        t_s, event = number(line, "t_s"), text(line, "event")
        if t_s is None:
            return
        self.first_s = t_s if self.first_s is None else self.first_s
        self.last_s = t_s
        self.at_s[event] = t_s
        self.host = self.host or text(line, "host")
        if isinstance(line.get("stage"), int):
            self.stage, self.replica = line["stage"], whole(line, "replica")
        if event == "held up" and (seconds := number(line, "seconds")) is not None:
            self.pauses.append(Pause(t_s, seconds, number(line, "cpu_s") or 0.0))
        start_s, end_s = number(line, "start_s"), number(line, "end_s")
        if event == "boot" and start_s is not None and end_s is not None and end_s >= start_s:
            num_bytes = whole(line, "bytes", -1)
            self.boot.append(
                BootEvent(text(line, "name"), start_s, end_s, num_bytes if num_bytes > 0 else None)
            )


def read_facts(files: RunFiles, attempt: int | None = None) -> RunFacts:
    """Read all files of the run; `attempt` None: as `choose_attempt` does."""
    num_attempts = last_attempt(files)
    attempt = attempt or choose_attempt(files)
    manifest, metrics = files.document("manifest.json"), files.document("metrics.json")
    if whole(metrics, "attempt", num_attempts) != attempt:
        metrics = {}
    reported = {whole(rank, "rank", -1): rank for rank in rows(metrics, "ranks")}
    ranks = [_rank_facts(files, rank, attempt, reported.get(rank, {})) for rank in files.ranks()]
    plan = manifest.get("plan")
    plan = plan if isinstance(plan, dict) else {}
    return RunFacts(
        run=text(manifest, "run"),
        attempt=attempt,
        num_attempts=num_attempts,
        state=told_state(files, attempt, num_attempts),
        ranks=tuple(
            sorted(
                [rank for rank in ranks if rank.ended_s is not None] or ranks,
                key=lambda rank: (rank.replica, rank.stage or 0, rank.rank),
            )
        ),
        requests=tuple(_spans(files.lines("requests.jsonl", attempt))),
        num_slots=whole(plan, "num_slots") * whole(plan, "num_replicas", 1),
        device=text(plan, "device"),
        clocks=read_clocks(files.lines("clock.jsonl", attempt)),
    )


def _rank_facts(files: RunFiles, rank: int, attempt: int, reported: Line) -> RankFacts:
    log = _Log()
    for line in files.log_lines(rank, attempt):
        log.add(line)
    steps = read_steps(files, rank, attempt)
    samples = list(files.sample_lines(rank, attempt))
    reported_s = _reported_parts(reported)
    parts_s = reported_s or dict(steps.parts_s if steps.num_steps else {})
    booted_s = max((event.end_s for event in log.boot), default=log.at_s.get("ready"))
    generating_s = log.at_s.get("generating", booted_s)
    generated_s = log.at_s.get("generated")
    if generated_s is None and generating_s is not None and parts_s:
        # Of a run that was killed: up to the last step, of which earlier ones may not be kept.
        generated_s = generating_s + sum(parts_s.values()) if reported_s else steps.last_s
    times_s = [t_s for line in samples if (t_s := number(line, "t_s")) is not None]
    last_s = max([*times_s, steps.last_s, log.last_s or float("-inf")])
    totals = reported.get("stage")
    totals = totals if isinstance(totals, dict) else {}
    num_steps = max(steps.num_steps, *(whole(line, "num_steps") for line in samples), 0)
    return RankFacts(
        rank=rank,
        replica=log.replica,
        stage=log.stage,
        host=log.host,
        boot=tuple(log.boot),
        started_s=min((event.start_s for event in log.boot), default=log.first_s),
        generating_s=generating_s,
        generated_s=generated_s,
        ended_s=last_s if last_s > float("-inf") else None,
        parts_s=parts_s,
        num_steps=whole(totals, "num_steps") or num_steps,
        steps=steps,
        cpu=_cpu_use(samples, generating_s, generated_s),
        pauses=tuple(log.pauses),
    )


def _reported_parts(reported: Line) -> dict[str, float]:
    """The parts of the generate phase in a rank's entry of `metrics.json`; empty without any."""
    stage = reported.get("stage")
    overall = stage.get("overall") if isinstance(stage, dict) else None
    if not isinstance(overall, dict):
        return {}
    return {part: number(overall, f"{part}_s") or 0.0 for part in PARTS}


def _cpu_use(
    samples: Sequence[Line], generating_s: float | None, generated_s: float | None
) -> CpuUse | None:
    """What the samples that lie in the generate phase tell."""
    wall_s = cpu_s = node_s = 0.0
    switches: list[float] = []
    delays_s: list[float] = []
    begin_s = float("-inf") if generating_s is None else generating_s
    end_s = float("inf") if generated_s is None else generated_s
    for before, after in pairwise(samples):
        since_s, until_s = number(before, "t_s"), number(after, "t_s")
        percent = number(after, "cpu_percent")
        if since_s is None or until_s is None or percent is None:
            continue
        covered_s = min(until_s, end_s) - max(since_s, begin_s)
        if covered_s <= 0.5 * (until_s - since_s) or covered_s <= 0:
            continue
        wall_s += covered_s
        cpu_s += covered_s * percent / 100
        node_s += covered_s * (number(after, "node_cpu_percent") or 0.0) / 100
        switches += _growth(before, after, "num_involuntary_switches")
        delays_s += _growth(before, after, "run_delay_s")
    if wall_s <= 0:
        return None
    num_switches = int(sum(switches)) if switches else None
    delay_s = sum(delays_s) if delays_s else None
    return CpuUse(wall_s, cpu_s, 100 * node_s / wall_s or None, num_switches, delay_s)


def _growth(before: Line, after: Line, name: str) -> list[float]:
    """By how much a count has grown; nothing where either sample lacks it."""
    since, until = number(before, name), number(after, name)
    return [] if since is None or until is None else [max(0.0, until - since)]


def _spans(lines: Iterable[Line]) -> Iterable[RequestSpan]:
    for line in lines:
        admitted_s, finished_s = number(line, "admitted_s"), number(line, "finished_s")
        slot = whole(line, "slot", -1)
        if slot < 0 or admitted_s is None or finished_s is None or finished_s < admitted_s:
            continue
        yield RequestSpan(
            whole(line, "on_replica"),
            slot,
            admitted_s,
            finished_s,
            whole(line, "num_prompt_tokens"),
            whole(line, "num_output_tokens"),
        )
