"""What is open on a GPU ends without waiting for a GPU that waits for a lost rank."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from mpipipe.abandoned import is_abandoned_work_running
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.progress import ProgressEngine
from mpipipe.runtime import kv_memory
from mpipipe.runtime.kv_memory import KvMemory
from mpipipe.stage.cuda_stream import CudaStream
from mpipipe.weights import cuda_carrier
from mpipipe.weights.cuda_carrier import CudaCarrier
from mpipipe.weights.pinned_memory import PinnedMemory
from mpipipe.weights.prefetch import Piece, StreamedPart

LIMIT_S = 60.0
CPU = torch.device("cpu")


class Gpu:
    """As much of one as an end meets. It is at work until `is_done`.

    `reads` is set when a thread waits in it.
    """

    def __init__(self) -> None:
        self.is_done = threading.Event()
        self.reads = threading.Event()
        self.is_lost = False
        self.unpinned_while_at_work: list[bool] = []  # of each pinned memory that was let go

    def synchronize(self, _: torch.device) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.is_done.wait(LIMIT_S)

    # ---- as CUDA's runtime ----

    def cudaHostRegister(self, *_: object) -> int:
        return 0

    def cudaHostUnregister(self, _: int) -> int:
        self.unpinned_while_at_work.append(not self.is_done.is_set())
        return 0


class OnGpu:
    """A stream or an event."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...


class DiskRegion:
    """Its read waits for the GPU, as one into a bounce buffer does."""

    tier = "disk"

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def read_into(self, _offset: int, _out: torch.Tensor) -> None:
        self._gpu.reads.set()
        self._gpu.is_done.wait(LIMIT_S)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, OnGpu)
    monkeypatch.setattr(torch.cuda, "current_stream", OnGpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpu)
    for module in (cuda_carrier, kv_memory):
        monkeypatch.setattr(module, "END_S", 0.05)
    yield gpu
    gpu.is_done.set()
    while is_abandoned_work_running():  # threads of this test are none of the next one's
        threading.Event().wait(0.001)


def open_carrier() -> CudaCarrier:
    return CudaCarrier(
        [torch.empty(8, dtype=torch.uint8)], PinnedMemory(CPU), from_disk=True, end_with_steps=False
    )


def test_a_gpu_that_never_ends_is_not_waited_for(gpu: Gpu) -> None:
    assert not open_carrier().close()
    assert is_abandoned_work_running()


def test_a_reader_that_never_ends_is_not_waited_for(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(OnGpu, "synchronize", lambda _: None, raising=False)
    carrier = open_carrier()
    carrier.load(StreamedPart(0, 0, (Piece(DiskRegion(gpu), 0, 8, 0),)))  # type: ignore[arg-type]
    assert gpu.reads.wait(LIMIT_S)
    assert not carrier.close()
    assert is_abandoned_work_running()


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_gpu_that_has_ended_is_told_so(
    is_lost: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_carrier, "END_S", LIMIT_S)  # its thread may get no core for a while
    gpu.is_lost = is_lost
    gpu.is_done.set()
    assert open_carrier().close()
    assert not is_abandoned_work_running()


@pytest.mark.parametrize("is_lost", [False, True])
def test_memory_of_kv_pages_is_unpinned_when_nothing_copies_any_more(
    is_lost: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.is_lost = is_lost
    memory = KvMemory(ContiguousKVCache(), PinnedMemory(torch.device("cuda")))
    memory.pinned.take(8)
    monkeypatch.setattr(kv_memory, "END_S", LIMIT_S)
    ending = threading.Timer(0.01, gpu.is_done.set)  # copies that were under way end
    if not is_lost:
        ending.start()
    memory.close()
    memory.close()
    assert gpu.unpinned_while_at_work == [is_lost]
    assert not is_abandoned_work_running()


def test_memory_of_kv_pages_stays_pinned_under_copies_that_never_end(gpu: Gpu) -> None:
    memory = KvMemory(ContiguousKVCache(), PinnedMemory(torch.device("cuda")))
    memory.close()  # nothing is pinned: nothing is waited for
    assert not is_abandoned_work_running()
    memory.pinned.take(8)
    memory.close()
    assert gpu.unpinned_while_at_work == []
    assert is_abandoned_work_running()


def test_the_thread_that_launches_steps_is_not_waited_for(gpu: Gpu) -> None:
    """Nor is work that has not begun yet done."""
    begun = list[int]()

    def launch(number: int) -> None:
        begun.append(number)
        gpu.reads.set()
        gpu.is_done.wait(LIMIT_S)

    async def session() -> None:
        stream = CudaStream(CPU, OnGpu(), ProgressEngine())  # type: ignore[arg-type]
        with ExitStack() as at_end:
            at_end.callback(stream.close)
            for number in range(2):
                step = asyncio.ensure_future(stream.compute(partial(launch, number)))
                at_end.callback(step.cancel)
            while not gpu.reads.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert is_abandoned_work_running()

    asyncio.run(session())
    assert begun == [0]
    gpu.is_done.set()
