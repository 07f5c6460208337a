"""What stage 0 costs its host in a step: scheduler, runner, worker and engine, without a device.

    python -m tests.benchmarks.first_stage [--rows 64] [--slots 2] [--churn] [--calls | --profile]

The first of two stages as on a GPU, with lookahead and decode graphs. A replay does nothing, ids
come back at once, and the other stage is a channel that reads nothing. What torch itself adds for
a CUDA event, copy or replay is not in it. CPU time of the event loop is told, which varies with
the machine; with `--calls` how many functions are called in a step, which does not.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import math
import pstats
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar

import torch

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane import codec
from mpipipe.control_plane.group import RankGroup
from mpipipe.control_plane.mesh import Mesh
from mpipipe.control_plane.messages import GenerationBegan, GenerationEnded, StepTimes
from mpipipe.data_plane.channel import EdgeKind
from mpipipe.data_plane.lanes import ALONE
from mpipipe.metrics.accounting import StageAccount
from mpipipe.metrics.log import NullLog
from mpipipe.models.operations import torch_operations
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.workload import SamplingUse
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.scheduler.core import SchedulerCore
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.stage.assembly import open_engine
from mpipipe.stage.cpu_stream import CpuStream
from mpipipe.stage.step_times import StepTimesLink
from mpipipe.stage.timeline import StreamTimeline
from mpipipe.stage.worker import StageWorker
from mpipipe.types import Request, SamplingParams
from tests.unit.test_plan import make_plan

T = TypeVar("T")
_TOKEN_ID = 1007
_BATCH_STEPS = 64  # as a stage tells its times


@dataclass(frozen=True)
class Load:
    """What the stage has to do."""

    rows: int = 64  # of a slot
    num_slots: int = 2
    churn: bool = False  # prompts come and go; else all are decoded side by side
    input_tokens: int = 512
    output_tokens: int = 128

    def plan(self) -> PipelinePlan:
        """Of two stages on GPUs; this process is the first one."""
        most_tokens = self.input_tokens + self.output_tokens
        return replace(
            make_plan(),
            num_slots=self.num_slots,
            max_sequences_per_slot=self.rows,
            max_tokens_per_step=2048,
            page_size_tokens=16,
            num_kv_pages=self.rows * self.num_slots * -(-most_tokens // 16) + 64,
            max_context_tokens=most_tokens,
            max_sequence_tokens=most_tokens,
            max_sharing_tokens=most_tokens if self.churn else 0,
            lookahead=1,
            prefill="phases",
            cuda_graphs=True,
            dtype="float32",
            hidden_size=8,
        )

    def requests(self) -> list[Request]:
        """Those of one call of `generate`. Where they come and go, no two end together."""
        waves = 4 if self.churn else 1
        requests = []
        for i in range(self.rows * self.num_slots * waves):
            fewer = i * 7 % (self.output_tokens // 2) if self.churn else 0
            sampling = SamplingParams(self.output_tokens - fewer, ignore_eos=True)
            ids = (i % 5000 + 7, *range(i % 31 + 8, i % 31 + 7 + self.input_tokens))
            requests.append(Request(str(i), i, ids, sampling))
        return requests


class HostStream(CpuStream):
    """Work is added at once, and a replay does nothing."""

    async def compute(self, work: Callable[[], T]) -> T:
        """As a GPU's."""
        return work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:  # type: ignore[override]
        """For the buffers that it names."""
        work()
        return lambda: None


class NoTensors:
    """Tensors that go nowhere; ids are here at once."""

    def send(self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind) -> NoTensors:
        """Nothing leaves."""
        return self

    def receive(self, buffer: torch.Tensor, *, source: int, kind: EdgeKind) -> NoTensors:
        """As the last stage sends them."""
        if kind is EdgeKind.IDS:
            buffer.fill_(_TOKEN_ID)
        return self

    async def wait(self) -> None:
        """It is done."""

    def repeated_send(
        self, tensor: torch.Tensor, *, destination: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """Nothing leaves."""
        return lambda: None

    def repeated_receive(
        self, buffer: torch.Tensor, *, source: int, kind: EdgeKind
    ) -> Callable[[], None]:
        """They lie there."""
        buffer.fill_(_TOKEN_ID)
        return lambda: None

    async def aclose(self) -> None:
        """Nothing is open."""


class OtherStage:
    """The control channel to a stage that reads nothing, and tells when it has computed."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.num_frames = self.num_bytes = 0
        self._frames: deque[bytes] = deque()
        self._num_told = 0

    def send_nowait(self, to: int, frame: bytes, *, quiet: bool = False) -> None:
        """Counted and forgotten."""
        self.num_frames += 1
        self.num_bytes += len(frame)

    def computed(self, num_steps: int) -> bool:
        """All steps up to there; returns that nothing completed, as a poll."""
        while self._num_told + _BATCH_STEPS <= num_steps:
            self._frames.append(codec.encode(StepTimes(self._num_told, (0.0,) * _BATCH_STEPS)))
            self._num_told += _BATCH_STEPS
        return False

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """Only its times."""
        return (1, self._frames.popleft()) if self._frames else None

    async def aclose(self) -> None:
        """Nothing is open."""

    def abort(self, exit_code: int) -> NoReturn:
        """End this process."""
        raise SystemExit(exit_code)


def stub_model(plan: PipelinePlan) -> Any:
    """The layers of stage 0: hidden states of the right shape, always the same ones."""
    hidden_TH = torch.zeros(plan.max_tokens_per_step + plan.max_decode_rows, plan.hidden_size)

    def forward(inputs: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden_TH[: len(inputs)]

    return SimpleNamespace(
        plan=plan.stages[0],
        vocab_size=32_000,
        dtype=torch.float32,
        operations=torch_operations(),
        lanes=ALONE,
        rotary_by_length=False,
        waits_on_host=False,
        graphs_unsupported_reason=lambda: None,
        forward=forward,
        forward_decode=forward,
    )


@dataclass
class FirstStage:
    """Rank 0, wired as a session wires it."""

    load: Load
    account: StageAccount = field(default_factory=lambda: StageAccount(0))
    loop_s: float = 0.0  # CPU time of generating
    num_steps: int = 0
    head_us: float = 0.0
    launch_us: float = 0.0

    async def generate(self, around: Callable[[], Any]) -> int:
        """Complete the load once, inside of `around`; returns the number of tokens."""
        plan, clock, progress = self.load.plan(), MonotonicClock(), ProgressEngine()
        other = OtherStage()
        mesh = Mesh(other, progress, clock)
        worker = self._worker(plan, mesh, clock, progress)
        recorded: deque[object] = deque(maxlen=4096)

        def on_step(*told: object) -> None:
            recorded.append(told)

        self.account.on_step = on_step
        runner = Runner(
            core=SchedulerCore.of_plan(plan, (2,)),
            group=RankGroup(mesh, [0, 1]),
            texts=TextMaker(lambda ids: " seven" * len(ids)),
            clock=clock,
            log=NullLog(),
            on_request=recorded.append,
        )
        requests = self.load.requests()
        mesh.start()
        unregister = progress.register(lambda: other.computed(self.account.num_steps))
        num_tokens = 0
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(progress.run())
            await worker.exercise_edges()
            mesh.broadcast_message(GenerationBegan())
            serving = tasks.create_task(worker.serve())
            await asyncio.sleep(0)
            gc.collect()
            gc.freeze()
            with around():
                began_s = time.thread_time()
                async for completion in runner.generate(requests):
                    num_tokens += len(completion.token_ids)
                self.loop_s = time.thread_time() - began_s
            mesh.broadcast_message(GenerationEnded())
            await serving
            polling.cancel()
        unregister()
        gc.unfreeze()
        self.num_steps = self.account.num_steps
        self.head_us = runner.us_per_step or math.nan
        self.launch_us = worker.device_use().cpu_us_per_step or math.nan
        return num_tokens

    def _worker(
        self, plan: PipelinePlan, mesh: Mesh, clock: MonotonicClock, progress: ProgressEngine
    ) -> StageWorker:
        stream = HostStream(torch.device("cpu"), clock, progress)
        model, cache = stub_model(plan), SimpleNamespace(forget=lambda request_row: None)
        engine: Any = open_engine(plan, model, cache, stream, attention_needs_seq_lens=False)
        engine.prepare(SamplingUse())
        link = StepTimesLink(
            plan, 0, mesh=mesh, account=self.account, clock=clock, ahead_s=lambda _: 0.0
        )
        return StageWorker(
            plan=plan,
            stage=plan.stages[0],
            mesh=mesh,
            channel=NoTensors(),
            engine=engine,
            stream=stream,
            timeline=StreamTimeline(stream, self.account, clock, link),
            progress=progress,
            clock=clock,
        )


@contextmanager
def nothing() -> Iterator[None]:
    """Only the time is taken."""
    yield


def run(load: Load, around: Callable[[], Any] = nothing) -> FirstStage:
    """One call of `generate`."""
    torch.set_num_threads(1)
    stage = FirstStage(load)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        num_tokens = runner.run(stage.generate(around))
    assert num_tokens == sum(r.sampling.max_new_tokens for r in load.requests())
    return stage


def calls_per_step(load: Load) -> float:
    """Functions that are called in a step, on average: of Python and of C."""
    stage, stats = profiled(load)
    return float(stats.total_calls / stage.num_steps)


def profiled(load: Load) -> tuple[FirstStage, Any]:
    """One call of `generate`, and what was called in it."""
    profile = cProfile.Profile()
    stage = run(load, lambda: profile)
    return stage, pstats.Stats(profile)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="of each completion")
    parser.add_argument("--churn", action="store_true", help="prompts come and go")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", action="store_true", help="count calls of functions")
    parser.add_argument("--profile", action="store_true", help="by cProfile")
    asked = parser.parse_args()
    for rows in asked.rows:
        load = Load(rows, asked.slots, asked.churn, output_tokens=asked.tokens)
        what = f"{rows:4} rows, {asked.slots} slots, {'churn' if asked.churn else 'decode'}"
        if asked.calls:
            print(f"{what}: {calls_per_step(load):.1f} calls a step")
        elif asked.profile:
            profiled(load)[1].sort_stats("tottime").print_stats(45)
        else:
            runs = [run(load) for _ in range(asked.repeats)]
            best = min(runs, key=lambda stage: stage.loop_s / stage.num_steps)
            print(
                f"{what}: {best.loop_s / best.num_steps * 1e6:6.1f} us of CPU a step "
                f"({min(s.head_us for s in runs):.1f} scheduling, "
                f"{min(s.launch_us for s in runs):.1f} launching; {best.num_steps} steps)"
            )


if __name__ == "__main__":
    main()
