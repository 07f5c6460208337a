"""What `mpipipe run` records while it generates, each in a file: steps, samples, requests, clocks,
and with `log.level = "debug"` the control messages.

All of it is written, that rank's log too, and samples are taken, in one thread per rank
(`run_folder.line_thread`). The event loop only tells what has happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from mpipipe.metrics.energy import EnergyMeter
from mpipipe.metrics.gap_histogram import GapHistogram
from mpipipe.metrics.lines import (
    MessageRecord,
    RequestRecord,
    json_line,
    line_start,
    message_line,
    request_line,
    step_line,
)
from mpipipe.run_folder.line_thread import LineFile, LineThread
from mpipipe.topology.nvml import GpuDevice, opened_nvml
from mpipipe.topology.usage import Usage, read_usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from mpipipe.clock import Clock
    from mpipipe.config.schema import LogConfig
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.metrics.accounting import StepRecord
    from mpipipe.metrics.identity import RunIdentity
    from mpipipe.metrics.log import LogFile
    from mpipipe.runtime.clock_offsets import ClockOffset
    from mpipipe.runtime.session import Session

__all__ = ["Recording", "recording"]

_NUM_STEPS = 4096  # that are kept at least
_NUM_MESSAGES = 16_384
_CLOSE_S = 10.0  # a file system that does not answer must not keep the run from ending
_CLOSE_FAILED_S = 1.0


class Recording:
    """One rank's files about an attempt, while it generates.

    Args:
        folder: of the run.
        identity: of this rank, in every line.
        wanted: what to record.
        session: whose steps and counts.
        log: of this rank, whose lines the thread writes, too.
        clock: monotonic seconds, those of the lines.
        gpu_uuid: of this rank's GPU; empty: it has none.
        on_failure: told once, in a sentence, that lines are lost.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        wanted: LogConfig,
        session: Session,
        *,
        log: LogFile,
        clock: Clock,
        gpu_uuid: str = "",
        on_failure: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.gaps = GapHistogram()  # between the tokens of a request (head); whole when closed
        self.energy = EnergyMeter()
        self._start = line_start(identity)
        self._wanted = wanted
        self._session = session
        self._clock = clock
        self._gpu_uuid = gpu_uuid
        self._gpu: GpuDevice | None = None
        self._nvml = ExitStack()
        self._usage: tuple[float, Usage] | None = None
        num_kept = None if wanted.steps == "all" else _NUM_STEPS
        name = f"rank_{identity.rank}.jsonl"
        self._steps = LineFile(folder / f"steps_{name}", self._step_line, num_kept=num_kept)
        self._samples = LineFile(folder / f"samples_{name}", self._line)
        self._requests = LineFile(folder / "requests.jsonl", self._request_line)
        self._clocks = LineFile(folder / "clock.jsonl", self._line)
        messages = folder / f"messages_{name}"
        self._messages = LineFile(messages, self._message_line, num_kept=_NUM_MESSAGES)
        self.thread = LineThread(
            (log, self._steps, self._messages, self._samples, self._requests, self._clocks),
            clock=clock,
            work=self._sample,
            work_interval_s=wanted.sample_interval_s,
            on_failure=on_failure,
        )

    # ---- told by the event loop ------------------------------------------------------------------

    def take_step(self, record: StepRecord, transfer_s: float | None) -> None:
        """A step has left this stage."""
        self._steps.tell((record, transfer_s))

    def take_request(self, record: RequestRecord, replica: int = 0) -> None:
        """A request has ended on `replica` (rank 0)."""
        self._requests.tell((record, replica))

    def take_clocks(self, offsets: Sequence[ClockOffset]) -> None:
        """The clocks were compared (head)."""
        now_s = self._clock.now_s()
        for offset in offsets:
            fields = {"of_rank": offset.rank, "offset_s": 0.0 - offset.ahead_s}
            self._clocks.tell((now_s, {**fields, "error_s": offset.error_s}))

    def take_message(self, record: MessageRecord) -> None:
        """A control message was sent or received."""
        self._messages.tell(record)

    # ---- in the thread ---------------------------------------------------------------------------

    def _step_line(self, told: tuple[StepRecord, float | None]) -> str:
        return step_line(self._start, *told)

    def _message_line(self, record: MessageRecord) -> str:
        return message_line(self._start, record)

    def _request_line(self, told: tuple[RequestRecord, int]) -> str:
        record, replica = told
        self.gaps.add(gaps_s := record.gaps_s())
        times = self._wanted.token_times
        return request_line(self._start, record, gaps_s, replica=replica, token_times=times)

    def _line(self, told: tuple[float, dict[str, Any]]) -> str:
        return json_line(self._start, *told)

    def _sample(self) -> None:
        if self._usage is None and self._gpu_uuid:
            nvml = self._nvml.enter_context(opened_nvml())
            self._gpu = nvml.device(self._gpu_uuid) if nvml is not None else None
        now_s, usage = self._clock.now_s(), read_usage()
        before_s, before = self._usage or (now_s, Usage())
        self._usage = (now_s, usage)
        gpu = self._gpu.sample() if self._gpu is not None else None
        if gpu is not None:
            self.energy.read(now_s, gpu.energy_j, gpu.power_w)
        fields = {
            **self._counts(),
            "num_steps": self._session.num_steps,
            **usage.fields(before, now_s - before_s),
            "gpu": None if gpu is None else dataclasses.asdict(gpu),
        }
        self._samples.tell((now_s, fields))

    def _counts(self) -> dict[str, int | None]:
        """What the scheduler counts, on the head of a replica; another thread counts meanwhile."""
        names = (
            "num_output_tokens", "num_running", "num_waiting", "kv_pages_used", "num_kv_pages",
        )  # fmt: skip
        statistics = self._session.statistics()
        if statistics is None:
            return dict.fromkeys(names)
        counts = (
            self._session.num_output_tokens,
            self._session.num_running,
            self._session.num_waiting,
            statistics.num_pages - statistics.num_free_pages,
            statistics.num_pages,
        )
        return dict(zip(names, counts, strict=True))

    def release(self) -> None:
        """When the thread has ended: the library that was asked about the GPU."""
        self._nvml.close()


@asynccontextmanager
async def recording(
    folder: Path,
    identity: RunIdentity,
    wanted: LogConfig,
    session: Session,
    *,
    log: LogFile,
    on_failure: Callable[[str], object],
) -> AsyncIterator[Recording]:
    """Record what `session` does inside. At the end all of it is in the files, and counted.

    Lines of `log` that are told inside wait for no disk.
    """
    ranks = session.ranks
    recorder = Recording(
        folder,
        identity,
        wanted,
        session,
        log=log,
        clock=ranks.clock,
        gpu_uuid=session.gpu_uuid,
        on_failure=on_failure,
    )
    log.defer()
    recorder.thread.start()
    session.observe(
        on_step=None if wanted.steps == "none" else recorder.take_step,
        on_request=recorder.take_request,
        on_clocks=recorder.take_clocks,
    )
    try:
        with _messages_told(ranks.mesh, recorder.take_message if wanted.level == "debug" else None):
            yield recorder
            await session.clocks.compare()
            await session.settle()
    except BaseException:
        session.give_up_times()
        recorder.thread.close(_CLOSE_FAILED_S)
        raise
    if await asyncio.to_thread(recorder.thread.close, _CLOSE_S):
        recorder.release()
    session.energy_j, session.io_write_s = recorder.energy.energy_j, recorder.thread.busy_s


@contextmanager
def _messages_told(mesh: Mesh, take: Callable[[MessageRecord], None] | None) -> Iterator[None]:
    mesh.on_message = take
    try:
        yield
    finally:
        mesh.on_message = None
