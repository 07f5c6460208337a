"""Profilers of a stage: ranges with names for those outside, torch's own profiler inside.

Which one a stage gets is decided once, when its worker is opened (`open_profiler`). NVTX ranges are
for `nsys` and other programs that listen for them; torch's own profiler runs inside the rank, for
the steps that were asked for.

A transfer has up to two ranges: while it is started, and while the stage waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig

from mpipipe.control_plane.messages import DecodeScheduled
from mpipipe.data_plane.channel import RepeatingChannel
from mpipipe.stage.ranges import Ranges
from mpipipe.topology.profilers import listens_for_ranges

if TYPE_CHECKING:
    from pathlib import Path

    from mpipipe.config.schema import ProfileConfig
    from mpipipe.data_plane.channel import EdgeKind, TensorChannel, Transfer
    from mpipipe.metrics.log import Logger
    from mpipipe.stage.ranges import Step

__all__ = ["NamedRanges", "Profiler", "TorchProfiler", "open_profiler"]

T = TypeVar("T")
_Begin = Callable[[str], Callable[[], object]]  # begins a range of that name, returns what ends it


class Profiler(Ranges):
    """Watches nothing, and costs nothing."""

    def channel(self, channel: TensorChannel) -> TensorChannel:
        """`channel`, whose transfers are ranges."""
        return channel

    def prepare(self) -> None:
        """Do what takes long, before the first step."""

    async def aclose(self) -> None:
        """Write what was recorded."""


class NamedRanges(Profiler):
    """Ranges of any profiler.

    Args:
        begin: begins a range of that name, on the calling thread; returns what ends it.
    """

    def __init__(self, begin: _Begin) -> None:
        self._begin = begin

    def step(self, step: Step, work: Callable[[], T]) -> Callable[[], T]:
        """See `Ranges.step`."""
        phase = "decode" if isinstance(step, DecodeScheduled) else "prefill"
        return partial(_inside, self._begin, f"{phase} step {step.step} slot {step.slot}", work)

    def replay(self, name: str, replay: Callable[[], None]) -> Callable[[], None]:
        """See `Ranges.replay`."""
        return partial(_inside, self._begin, name, replay)

    def channel(self, channel: TensorChannel) -> TensorChannel:
        """See `Profiler.channel`."""
        repeats = isinstance(channel, RepeatingChannel)
        return (_RepeatingRangedChannel if repeats else _RangedChannel)(channel, self._begin)


def _inside(begin: _Begin, name: str, work: Callable[[], T]) -> T:
    end = begin(name)
    try:
        return work()
    finally:
        end()


class TorchProfiler(NamedRanges):
    """torch's own profiler, from the first to the last of the chosen steps; all threads.

    Args:
        steps: the first and the last.
        path: where the trace goes.
        log: told what was recorded.
    """

    def __init__(self, steps: tuple[int, ...], path: Path, log: Logger) -> None:
        super().__init__(_begin_record)
        self._first, self._last = steps
        self._path = path
        self._log = log
        self._profile: torch.profiler.profile | None = None
        self._recording = False
        self._recorded = False
        self._error: Exception | None = None  # of starting or stopping, in the middle of the run

    def prepare(self) -> None:
        """Load what records: a second, which no step should wait for."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # A CPU's steps run in a thread of their own.
        options = _ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(activities=activities, experimental_config=options)
        self._profile.prepare_trace()

    def step(self, step: Step, work: Callable[[], T]) -> Callable[[], T]:
        """See `Ranges.step`. Steps come in their order."""
        if self._recording and step.step > self._last:
            self._try(self._stop)
        elif not self._recorded and not self._recording and step.step >= self._first:
            self._try(self._start)
        return super().step(step, work)

    def _try(self, turn: Callable[[], None]) -> None:
        """The profiler fails, not the run: what cannot be started or stopped is given up."""
        try:
            turn()
        except Exception as error:  # noqa: BLE001 - torch and the GPU's library
            self._recording, self._recorded, self._error = False, True, error

    def _start(self) -> None:
        assert self._profile is not None, "prepare comes first"
        self._profile.start_trace()
        self._recording = True

    def _stop(self) -> None:
        assert self._profile is not None, "prepare comes first"
        self._profile.stop_trace()
        self._recording, self._recorded = False, True

    async def aclose(self) -> None:
        """Write the trace, or log why there is none."""
        profile, path = self._profile, self._path
        if profile is None or not (self._recording or self._recorded):
            self._log.warning(
                "profile",
                message=f"profile.steps = [{self._first}, {self._last}], but this rank ran no such "
                "step, so there is no profile: choose earlier steps",
            )
            return
        try:
            if self._recording:
                self._stop()
            if self._error is not None:
                raise self._error
            await asyncio.to_thread(_export, profile, path)
        except Exception as error:  # noqa: BLE001 - torch and the GPU's library; the run is done
            self._log.warning(
                "profile",
                message=f"the profile cannot be written to {path} ({error}): check that there is "
                "room, and that you can write there",
            )
            return
        self._log.info("profile", path=str(path), steps=[self._first, self._last])


def _export(profile: torch.profiler.profile, path: Path) -> None:
    """Write the trace; torch itself is silent where it cannot."""
    path.unlink(missing_ok=True)
    profile.export_chrome_trace(str(path))
    if not path.exists():
        raise OSError("torch wrote no file")


def open_profiler(
    profile: ProfileConfig, environ: Mapping[str, str], *, folder: Path, rank: int, log: Logger
) -> Profiler:
    """The profiler of this rank: there are ranges where one listens, or was asked for.

    Args:
        profile: what was asked for.
        environ: of this process.
        folder: where torch's profile goes, as `torch_rank_<r>.json`.
        rank: this one.
        log: told where there can be no ranges.
    """
    if profile.tool == "torch":
        return TorchProfiler(profile.steps, folder / f"torch_rank_{rank}.json", log)
    if profile.tool != "nsys" and not listens_for_ranges(environ):
        return Profiler()
    try:
        _begin_nvtx("mpipipe")()
    except (AttributeError, RuntimeError):  # as builds for CPUs say it
        log.warning(
            "profile",
            message=f"torch {torch.__version__} was built without NVTX, as builds for CPUs are: "
            "the profile has no ranges of steps, transfers and graphs",
        )
        return Profiler()
    return NamedRanges(_begin_nvtx)


def _begin_nvtx(name: str) -> Callable[[], object]:
    return partial(torch.cuda.nvtx.range_end, torch.cuda.nvtx.range_start(name))


def _begin_record(name: str) -> Callable[[], object]:
    record = torch.profiler.record_function(name)
    record.__enter__()
    return partial(record.__exit__, None, None, None)


class _RangedTransfer:
    """A transfer whose wait is a range."""

    def __init__(self, transfer: Transfer, name: str, begin: _Begin) -> None:
        self._transfer = transfer
        self._name = name
        self._begin = begin

    async def wait(self) -> None:
        end = self._begin(self._name)
        try:
            await self._transfer.wait()
        finally:
            end()


class _RangedChannel:
    """A tensor channel with a range round each transfer. See `TensorChannel`."""

    def __init__(self, channel: TensorChannel, begin: _Begin) -> None:
        self._channel = channel
        self._begin = begin

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> Transfer:
        name = f"send {kind.name.lower()} to rank {destination}"
        start = partial(self._channel.send, tensor, destination=destination, kind=kind)
        return _RangedTransfer(_inside(self._begin, name, start), f"wait: {name}", self._begin)

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> Transfer:
        name = f"receive {kind.name.lower()} from rank {source}"
        start = partial(self._channel.receive, buffer, source=source, kind=kind)
        return _RangedTransfer(_inside(self._begin, name, start), f"wait: {name}", self._begin)

    async def aclose(self) -> None:
        await self._channel.aclose()


class _RepeatingRangedChannel(_RangedChannel):
    """The same of a channel that repeats transfers. See `RepeatingChannel`."""

    def repeated_send(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> Callable[[], None]:
        assert isinstance(self._channel, RepeatingChannel)
        send = self._channel.repeated_send(tensor, destination=destination, kind=kind)
        name = f"send {kind.name.lower()} to rank {destination}"
        return partial(_inside, self._begin, name, send)

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        assert isinstance(self._channel, RepeatingChannel)
        receive = self._channel.repeated_receive(buffer, source=source, kind=kind)
        name = f"receive {kind.name.lower()} from rank {source}"
        return partial(_inside, self._begin, name, receive)
