"""What a rank records: only what was asked for, samples with its GPU, the energy of the run."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.clock import ScriptedClock
from mpipipe.config.schema import LogConfig
from mpipipe.job import recording as module
from mpipipe.job.recording import Recording, recording
from mpipipe.logs.schema import check_line
from mpipipe.metrics.accounting import StageAccount
from mpipipe.metrics.identity import RunIdentity
from mpipipe.metrics.lines import MessageRecord
from mpipipe.metrics.log import RunLog, open_log
from mpipipe.runtime.clock_offsets import ClockOffset
from mpipipe.topology.nvml import opened_nvml
from tests.unit.fake_nvml import FakeCard, FakeNvml, memory

IDENTITY = RunIdentity("0123456789ab", 1, None, 0, 0, 0)


class FakeSession:
    """Of a head whose stage has run one step."""

    gpu_uuid = "GPU-1"
    num_steps = 1
    num_output_tokens = 7
    num_running = 3
    num_waiting = 2

    def __init__(self) -> None:
        self.ranks = SimpleNamespace(
            clock=ScriptedClock(50.0), mesh=SimpleNamespace(on_message=None)
        )
        self.clocks = self
        self.energy_j: float | None = None
        self.io_write_s = 0.0
        self.account = StageAccount(0)
        self.on_clocks: Any = None

    def statistics(self) -> Any:
        return SimpleNamespace(num_running=3, num_waiting=2, num_pages=10, num_free_pages=4)

    def observe(self, *, on_step: Any, on_request: Any, on_clocks: Any) -> None:
        assert on_request is not None
        self.account.on_step, self.on_clocks = on_step, on_clocks

    async def compare(self) -> None:
        self.on_clocks([ClockOffset(0, 0.0, 0.0), ClockOffset(1, 2.5, 0.001)])

    async def settle(self) -> None:
        self.give_up_times()

    def give_up_times(self) -> None:
        self.account.give_up(float("inf"))

    def run_step(self) -> None:
        """One whose wait is not divided yet."""
        step: Any = SimpleNamespace(
            step=0, slot=0, num_tokens=1, num_sampled=1, num_sequences=1, phase="decode",
            steady=False,
        )  # fmt: skip
        self.account.begin(1.0)
        self.account.step_scheduled(0, 1.0)
        self.account.input_ready(0, 2.0)
        self.account.computed(0, 3.0)
        self.account.sent(step, 3.0, needs=0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """The only GPU of the host."""
    card = FakeCard("GPU-1")
    card.answers = {
        "nvmlDeviceGetTotalEnergyConsumption": 9_000_000,
        "nvmlDeviceGetPowerUsage": 250_000,
        "nvmlDeviceGetMemoryInfo": memory(1000, 400),
    }
    library = FakeNvml(card)
    monkeypatch.setattr(module, "opened_nvml", functools.partial(opened_nvml, library))
    return card


def record(
    folder: Path, session: FakeSession, wanted: LogConfig, inside: Any, log: RunLog | None = None
) -> None:
    async def run() -> None:
        told: Any = session
        ignored = open_log(Path(os.devnull), identity=IDENTITY, host="n1")
        try:
            async with recording(
                folder,
                IDENTITY,
                wanted,
                told,
                log=(log or ignored).file,
                on_failure=pytest.fail,
            ) as recorder:
                inside(recorder)
        finally:
            ignored.close()

    asyncio.run(run())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_that_was_told_is_in_the_files_at_the_end(tmp_path: Path, card: FakeCard) -> None:
    session = FakeSession()

    def generate(recorder: Recording) -> None:
        recorder._sample()  # the thread's first one may come before or after it
        session.run_step()
        card.answers["nvmlDeviceGetTotalEnergyConsumption"] = 9_700_000

    record(tmp_path, session, LogConfig(sample_interval_s=3600.0), generate)
    (step,) = lines(tmp_path / "steps_rank_0.jsonl")
    assert (step["step"], step["wait_s"], step["transfer_s"]) == (0, 1.0, None)
    samples = lines(tmp_path / "samples_rank_0.jsonl")
    assert len(samples) == 3, "at the start, at the end, and the test's own"
    last = samples[-1]
    assert (last["t_s"], last["num_output_tokens"], last["num_steps"]) == (50.0, 7, 1)
    assert (last["num_running"], last["num_waiting"]) == (3, 2)
    assert (last["kv_pages_used"], last["num_kv_pages"]) == (6, 10)
    assert last["gpu"]["power_w"] == 250.0
    assert last["gpu"]["energy_j"] == 9700.0
    assert last["gpu"]["throttle"] is None
    assert session.energy_j == 700.0
    clocks = lines(tmp_path / "clock.jsonl")
    assert [(c["of_rank"], c["offset_s"], c["error_s"]) for c in clocks] == [
        (0, 0.0, 0.0), (1, -2.5, 0.001),
    ]  # fmt: skip


def test_what_was_not_asked_for_is_not_there(tmp_path: Path, card: FakeCard) -> None:
    session = FakeSession()
    wanted = LogConfig(steps="none", sample_interval_s=0.0)
    record(tmp_path, session, wanted, lambda _: session.run_step())
    assert {path.name for path in tmp_path.iterdir()} == {"clock.jsonl"}
    assert session.energy_j is None
    assert card.num_asked == 0


def test_a_run_that_fails_leaves_the_lines_that_were_told(tmp_path: Path, card: FakeCard) -> None:
    session = FakeSession()

    def fail(_: Recording) -> None:
        session.run_step()
        raise RuntimeError("a rank was lost")

    with pytest.raises(RuntimeError, match="a rank was lost"):
        record(tmp_path, session, LogConfig(), fail)
    (step,) = lines(tmp_path / "steps_rank_0.jsonl")
    assert step["transfer_s"] is None


@pytest.mark.parametrize("fails", [False, True])
def test_lines_of_the_log_are_written_beside_the_event_loop_and_in_order(
    fails: bool, tmp_path: Path, card: FakeCard
) -> None:
    """A disk that does not answer must not keep a step waiting."""
    log = open_log(tmp_path / "rank_0.log", identity=IDENTITY, host="n1")
    writers: list[str] = []
    write = log.file.write_told

    def write_told() -> None:
        writers.append(threading.current_thread().name)
        write()

    log.file.write_told = write_told  # type: ignore[method-assign]

    def generate(_: Recording) -> None:
        for number in range(100):
            log.info("preempted", number=number)
        assert "MainThread" not in writers
        if fails:
            raise RuntimeError("a rank was lost")

    log.info("generating", number=-1)
    writers.clear()
    with suppress(RuntimeError):
        record(tmp_path, FakeSession(), LogConfig(), generate, log)
    log.info("ended", number=100)
    log.close()
    assert "lines" in writers
    assert [line["number"] for line in lines(tmp_path / "rank_0.log")] == list(range(-1, 101))


@pytest.mark.parametrize("level", ["info", "debug"])
def test_control_messages_are_on_record_at_debug_level_only(
    level: Any, tmp_path: Path, card: FakeCard
) -> None:
    session = FakeSession()

    def generate(_: Recording) -> None:
        tell = session.ranks.mesh.on_message
        assert (tell is not None) == (level == "debug")
        if tell is not None:
            tell(MessageRecord(2.5, "sent", "StepScheduled", 1, 7, 56))

    record(tmp_path, session, LogConfig(level=level), generate)
    assert session.ranks.mesh.on_message is None
    path = tmp_path / "messages_rank_0.jsonl"
    assert path.exists() == (level == "debug")
    if level == "debug":
        (line,) = lines(path)
        assert check_line(path.name, line) == []
        told = {name: line[name] for name in ("t_s", "way", "kind", "peer", "number", "bytes")}
        assert list(told.values()) == [2.5, "sent", "StepScheduled", 1, 7, 56]
