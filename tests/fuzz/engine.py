"""The fuzzing loop: seeds and mutations → a target, until the inputs are used up.

A target is fine when it returns or raises one of its documented errors. Everything else is a
finding: a foreign exception, a broken promise (AssertionError), more than `SLOW_S` of CPU time,
which a busy machine does not change, or four times that by the clock, which also counts what a
template's own process burns, or no end within `HUNG_S`. Each finding is told once per place
in the code, with an input made small.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from mpipipe.errors import MpipipeError
from tests.fuzz.mutate import Mutator, mutate_bytes

__all__ = ["HUNG_S", "SLOW_S", "Figures", "Finding", "Target", "fuzz", "minimise"]

Check = Callable[[bytes], None]

SLOW_S = 1.0
HUNG_S = 10.0
_REPEATED = re.compile(rb"(.{1,8}?)\1{24,}", re.DOTALL)
_MAX_FINDINGS = 40  # of different places; a target that has so many is repaired first
_MAX_TRIALS = 1_500  # of one minimisation
_MAX_MINIMISING_S = 10.0
_MAX_CORPUS = 2_000
_BUSY_MACHINE_FACTOR = 4.0  # what others may slow down an input that does not burn our own time


class _HungError(BaseException):
    """The time limit; no `except Exception` of the code under test takes it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is fuzzed.

    `open` gets an empty folder for the files of the target and returns the function to be called
    with each input.
    """

    name: str
    open: Callable[[Path], Check]
    seeds: tuple[bytes, ...]
    mutate: Mutator = mutate_bytes
    documented: tuple[type[BaseException], ...] = (MpipipeError,)
    slow_s: float = SLOW_S


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not happen, and the smallest input seen to cause it."""

    kind: str  # "ValueError at mpipipe/config/load.py:127 …"
    text: str  # the end of the traceback
    content: bytes

    @property
    def reproducer(self) -> str:
        """The input as a Python expression, long repetitions written as such."""
        parts: list[str] = []
        end = 0
        for found in _REPEATED.finditer(self.content):
            count = len(found[0]) // len(found[1])
            parts += [repr(self.content[end : found.start()]), f"{found[1]!r} * {count}"]
            end = found.end()
        parts.append(repr(self.content[end:]))
        return " + ".join(part for part in parts if part != "b''") or "b''"


@dataclass(slots=True)
class Figures:
    """What a run of one target came to."""

    target: str
    num_inputs: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)  # "ok", or the name of the error
    findings: list[Finding] = field(default_factory=list)

    def line(self) -> str:
        """The figures in a line for people."""
        rate = self.num_inputs / self.seconds if self.seconds else 0.0
        kinds = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common())
        return (
            f"{self.target:16} {self.num_inputs:>9,} inputs {self.seconds:7.1f} s {rate:>8,.0f}/s "
            f"slowest {self.slowest_s * 1e3:5.0f} ms  findings {len(self.findings)}  ({kinds})"
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    name: str
    place: tuple[str, ...]  # the way through our code: new ones are worth to be mutated further
    seconds: float
    is_finding: bool
    text: str = ""


def fuzz(target: Target, folder: Path, num_inputs: int, seed: int) -> Figures:
    """Run `num_inputs` inputs, the seeds first; the same for the same seed."""
    rng = Random(f"{target.name}:{seed}")
    check = target.open(folder)
    _run(target, check, target.seeds[0])  # what is imported late is no input's fault
    corpus = list(target.seeds)
    figures = Figures(target.name)
    seen: set[tuple[str, ...]] = set()
    told: set[str] = set()
    began_s = time.perf_counter()
    for content in _inputs(target, rng, corpus, num_inputs):
        outcome = _run(target, check, content)
        if outcome.name == "slow":  # or the machine was busy
            outcome = _run(target, check, content)
        figures.num_inputs += 1
        figures.outcomes[outcome.name] += 1
        figures.slowest_s = max(figures.slowest_s, outcome.seconds)
        kind = _kind(outcome)
        if outcome.is_finding and kind not in told:
            told.add(kind)
            figures.findings.append(_finding(target, check, outcome, content))
            if len(figures.findings) == _MAX_FINDINGS:
                break
        elif not outcome.is_finding and outcome.place not in seen and len(corpus) < _MAX_CORPUS:
            seen.add(outcome.place)
            corpus.append(content)
    figures.seconds = time.perf_counter() - began_s
    return figures


def _inputs(target: Target, rng: Random, corpus: list[bytes], num_inputs: int) -> Iterator[bytes]:
    yield from target.seeds[:num_inputs]
    for _ in range(num_inputs - len(target.seeds)):
        # Half of the time a seed: what earlier inputs have become grows away from what is valid.
        content = rng.choice(corpus if rng.random() < 0.5 else target.seeds)
        yield target.mutate(rng, content, corpus)


def _run(target: Target, check: Check, content: bytes) -> _Outcome:
    spent_s = _stopwatch()
    try:
        with _limit(max(HUNG_S, 1.5 * _BUSY_MACHINE_FACTOR * target.slow_s)):
            check(content)
    except target.documented as error:
        seconds = spent_s()
        if seconds > target.slow_s:
            return _slow(seconds)
        return _Outcome(type(error).__name__, _frames(error), seconds, is_finding=False)
    except _HungError as error:
        seconds = spent_s()
        return _Outcome("hung", ("hung",), seconds, is_finding=True, text=_told(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - looked for; also Rust's panics
        seconds = spent_s()
        return _Outcome(
            type(error).__name__, _frames(error)[-2:], seconds, is_finding=True, text=_told(error)
        )
    seconds = spent_s()
    return _slow(seconds) if seconds > target.slow_s else _Outcome("ok", (), seconds, False)


def _stopwatch() -> Callable[[], float]:
    """CPU time from now on, or what another process burnt for us: a quarter of the clock's time."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    return lambda: max(
        time.process_time() - cpu_s, (time.perf_counter() - wall_s) / _BUSY_MACHINE_FACTOR
    )


def _slow(seconds: float) -> _Outcome:
    return _Outcome("slow", ("slow",), seconds, is_finding=True, text=f"{seconds:.1f} s")


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """End what takes longer, in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_: int, __: FrameType | None) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _frames(error: BaseException) -> tuple[str, ...]:
    """The places of the package that the error came through, innermost last."""
    places: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/mpipipe/" in name or "/tests/fuzz/" in name:
            places.append(f"{'/'.join(name.rsplit('/', 3)[-3:])}:{trace.tb_lineno}")
        trace = trace.tb_next
    return tuple(places)


def _told(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error, chain=False)).splitlines()
    return "\n".join(line[:300] for line in lines[-14:])


def _kind(outcome: _Outcome) -> str:
    return f"{outcome.name} at {outcome.place[-1] if outcome.place else '(no frame of ours)'}"


def _finding(target: Target, check: Check, outcome: _Outcome, content: bytes) -> Finding:
    def is_same(smaller: bytes) -> bool:
        return _kind(_run(target, check, smaller)) == _kind(outcome)

    return Finding(_kind(outcome), outcome.text, minimise(content, is_same))


def minimise(content: bytes, is_same: Callable[[bytes], bool]) -> bytes:
    """A shorter input that `is_same` still takes: stretches left out, ever smaller ones."""
    until_s = time.perf_counter() + _MAX_MINIMISING_S
    trials = 0
    size = max(1, len(content) // 2)
    while size:
        begin = 0
        while begin < len(content):
            trials += 1
            if trials > _MAX_TRIALS or time.perf_counter() > until_s:
                return content
            smaller = content[:begin] + content[begin + size :]
            if is_same(smaller):
                content = smaller
            else:
                begin += size
        size //= 2
    return content


def names(targets: Sequence[Target], wanted: str) -> list[Target]:
    """The targets called `wanted`, or of that group (`config` → `config-toml` …); all for "all"."""
    return [
        target
        for target in targets
        if wanted in ("all", target.name) or target.name.startswith(f"{wanted}-")
    ]
