"""Ranges of a stage, and torch's profiler inside a rank: what is named, what is recorded, when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mpipipe.config.schema import ProfileConfig
from mpipipe.control_plane.messages import DecodeScheduled, StepScheduled
from mpipipe.data_plane.channel import EdgeKind, RepeatingChannel
from mpipipe.data_plane.loopback import open_loopback_channels
from mpipipe.stage.profiling import NamedRanges, Profiler, TorchProfiler, open_profiler
from mpipipe.stage.ranges import NO_RANGES

LIMIT_S = 30.0


async def limited(job: Any) -> Any:
    async with asyncio.timeout(LIMIT_S):
        return await job


class Ranges:
    """Notes when ranges begin and end."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def begin(self, name: str) -> Callable[[], object]:
        self.noted.append(name)
        return lambda: self.noted.append(f"/{name}")


class Log:
    """Keeps messages by level."""

    def __init__(self) -> None:
        self.infos: list[dict[str, object]] = []
        self.warnings: list[str] = []

    def info(self, event: str, **fields: object) -> None:
        self.infos.append({"event": event, **fields})

    def warning(self, event: str, **fields: object) -> None:
        self.warnings.append(str(fields["message"]))

    debug = error = info

    def bind(self, **fields: object) -> Log:
        return self


def decode(step: int) -> DecodeScheduled:
    return DecodeScheduled(step, step % 2, 1, (), (), (), (), steady=True)


def test_without_a_profiler_work_is_handed_back_as_it_came() -> None:
    def work() -> int:
        return 3

    channel = open_loopback_channels(1)[0]
    assert NO_RANGES.step(decode(0), work) is work
    assert NO_RANGES.replay("graph", print) is print
    assert Profiler().channel(channel) is channel
    assert (
        open_profiler(ProfileConfig(), {}, folder=Path(), rank=0, log=Log()).step(decode(0), work)
        is work
    )


def test_steps_and_replays_are_named_where_they_run() -> None:
    ranges = Ranges()
    named = NamedRanges(ranges.begin)
    step = named.step(decode(5), lambda: len(ranges.noted))
    replay = named.replay("graph slot 1 rows 8", lambda: ranges.noted.append("replay"))
    assert ranges.noted == [], "a range begins where the work runs"
    assert step() == 1, "inside its range"
    replay()
    prefill = StepScheduled(6, 0, (), steady=False)
    named.step(prefill, lambda: None)()
    assert ranges.noted == [
        "decode step 5 slot 1", "/decode step 5 slot 1",
        "graph slot 1 rows 8", "replay", "/graph slot 1 rows 8",
        "prefill step 6 slot 0", "/prefill step 6 slot 0",
    ]  # fmt: skip


def test_the_range_of_a_step_that_fails_ends() -> None:
    ranges = Ranges()
    with pytest.raises(ZeroDivisionError):
        NamedRanges(ranges.begin).step(decode(1), lambda: 1 // 0)()
    assert ranges.noted == ["decode step 1 slot 1", "/decode step 1 slot 1"]


def test_a_transfer_is_named_while_it_starts_and_while_it_is_waited_for() -> None:
    ranges = Ranges()

    async def transfer() -> torch.Tensor:
        first, second = open_loopback_channels(2)
        watched = NamedRanges(ranges.begin).channel(second)
        assert not isinstance(watched, RepeatingChannel)
        buffer = torch.zeros(3)
        receive = watched.receive(buffer, source=0, kind=EdgeKind.HIDDEN)
        await first.send(torch.ones(3), destination=1, kind=EdgeKind.HIDDEN).wait()
        await receive.wait()
        first.receive(torch.zeros(1), source=1, kind=EdgeKind.IDS)
        await watched.send(torch.ones(1), destination=0, kind=EdgeKind.IDS).wait()
        await watched.aclose()
        return buffer

    assert asyncio.run(limited(transfer())).tolist() == [1, 1, 1]
    assert ranges.noted == [
        "receive hidden from rank 0", "/receive hidden from rank 0",
        "wait: receive hidden from rank 0", "/wait: receive hidden from rank 0",
        "send ids to rank 0", "/send ids to rank 0",
        "wait: send ids to rank 0", "/wait: send ids to rank 0",
    ]  # fmt: skip


class Repeating:
    """A channel whose transfers can be repeated."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def repeated_send(self, tensor: Any, *, destination: int, kind: EdgeKind) -> Any:
        return lambda: self.calls.append(f"send {destination}")

    def repeated_receive(self, buffer: Any, *, source: int, kind: EdgeKind) -> Any:
        return lambda: self.calls.append(f"receive {source}")


def test_a_transfer_that_repeats_is_named_each_time() -> None:
    ranges, inner = Ranges(), Repeating()
    watched: Any = NamedRanges(ranges.begin).channel(inner)  # type: ignore[arg-type]
    assert isinstance(watched, RepeatingChannel)
    send = watched.repeated_send(torch.ones(1), destination=1, kind=EdgeKind.HIDDEN)
    watched.repeated_receive(torch.ones(1), source=2, kind=EdgeKind.IDS)()
    send()
    send()
    assert inner.calls == ["receive 2", "send 1", "send 1"]
    assert ranges.noted.count("send hidden to rank 1") == 2
    assert ranges.noted.count("/receive ids from rank 2") == 1


# ---- torch's profiler ----------------------------------------------------------------------------


def profile(path: Path, log: Log, steps: range, chosen: tuple[int, int]) -> None:
    """Steps in a thread of their own, as on a CPU, each with a transfer in this one."""
    profiler = TorchProfiler(chosen, path, log)
    profiler.prepare()
    (channel,) = open_loopback_channels(1)
    watched = profiler.channel(channel)

    async def run() -> None:
        with ThreadPoolExecutor(1) as thread:
            for number in steps:
                work = profiler.step(decode(number), lambda: torch.ones(8, 8) @ torch.ones(8, 8))
                thread.submit(work).result()
                receive = watched.receive(torch.zeros(1), source=0, kind=EdgeKind.IDS)
                await watched.send(torch.ones(1), destination=0, kind=EdgeKind.IDS).wait()
                await receive.wait()
        await profiler.aclose()

    asyncio.run(limited(run()))


def names(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


@pytest.mark.parametrize(
    ("chosen", "recorded"), [((2, 3), [2, 3]), ((4, 9), [4, 5])], ids=["inside", "to the end"]
)
def test_the_chosen_steps_are_recorded_with_what_they_compute_and_send(
    tmp_path: Path, chosen: tuple[int, int], recorded: list[int]
) -> None:
    path, log = tmp_path / "torch_rank_0.json", Log()
    profile(path, log, range(6), chosen)
    found = names(path)
    steps = [name for name in found if name.startswith("decode step")]
    assert sorted(steps) == [f"decode step {n} slot {n % 2}" for n in recorded]
    assert found.count("aten::mm") == len(recorded)
    assert found.count("send ids to rank 0") == len(recorded)
    assert found.count("wait: receive ids from rank 0") == len(recorded)
    assert log.infos == [{"event": "profile", "path": str(path), "steps": list(chosen)}]
    assert not log.warnings


def test_steps_that_never_ran_are_a_warning_and_no_file(tmp_path: Path) -> None:
    path, log = tmp_path / "torch_rank_0.json", Log()
    profile(path, log, range(3), (16, 31))
    assert "choose earlier steps" in log.warnings[0]
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    log = Log()
    profile(tmp_path / "no" / "torch_rank_0.json", log, range(3), (0, 1))
    assert "cannot be written" in log.warnings[0]


@pytest.mark.parametrize("last", [1, 9], ids=["in-the-middle", "at-the-end"])
def test_a_profiler_that_fails_when_it_ends_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    stop_trace = torch.profiler.profile.stop_trace

    def fails(stopped: torch.profiler.profile) -> None:
        stop_trace(stopped)
        raise KeyError("an odd answer")

    monkeypatch.setattr(torch.profiler.profile, "stop_trace", fails)
    log = Log()
    profile(tmp_path / "torch_rank_0.json", log, range(3), (0, last))
    assert "cannot be written" in log.warnings[0]
    assert "an odd answer" in log.warnings[0]


def test_the_tool_decides_and_a_torch_without_nvtx_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(tool: Any, environ: dict[str, str], log: Log) -> Profiler:
        config = ProfileConfig(tool=tool)
        return open_profiler(config, environ, folder=tmp_path, rank=1, log=log)

    log = Log()
    assert isinstance(opened("torch", {}, log), TorchProfiler)
    assert type(opened("perf", {}, log)) is Profiler
    begun: list[str] = []
    ended: list[str] = []

    def start(name: str) -> str:
        begun.append(name)
        return name

    monkeypatch.setattr(torch.cuda.nvtx, "range_start", start)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", ended.append)
    watched = {"NSYS_PROFILING_SESSION_ID": "1"}
    opened("none", watched, log).step(decode(2), lambda: None)()
    assert begun == ended == ["mpipipe", "decode step 2 slot 0"]
    assert type(opened("nsys", {}, log)) is NamedRanges
    assert not log.warnings

    def missing(name: str) -> int:
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "range_start", missing)
    assert type(opened("nsys", watched, log)) is Profiler
    assert "without NVTX" in log.warnings[0]
