"""Weights that stream to one GPU: the same tokens as if all of them stood there.

In float32 and with weights whose logits lie far apart (`tiny_models`, 0.3), so that tokens are
equal whatever the order of a sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.planning.plan import StageOffload
from mpipipe.progress import ProgressEngine
from mpipipe.runtime.boot import limit_memory
from mpipipe.stage.assembly import open_stream
from mpipipe.types import SamplingParams
from mpipipe.weights.pinned_memory import PinnedMemory, device_view
from tests.contract.engine_pipeline import EnginePipeline, engine_plan, make_requests
from tests.contract.test_offload import offloaded_stage
from tests.contract.tiny_models import NUM_LAYERS, Offloading, TinyModel
from tests.gpu.test_engine_gpu import MODES
from tests.gpu.waiting import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ALL = tuple(range(NUM_LAYERS))
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)
PLACEMENTS = {
    "two in host memory": StageOffload(host_layers=(1, 3)),
    "three in host memory": StageOffload(host_layers=(0, 2, 3)),
    "all in host memory": StageOffload(host_layers=ALL),
    "all in host memory, three buffers": StageOffload(host_layers=ALL, num_buffers=3),
    "everything in host memory": StageOffload(host_layers=ALL, embedding="host", head="host"),
    "two on disk": StageOffload(disk_layers=(0, 2)),
    "all on disk": StageOffload(disk_layers=ALL),
    "host and disk in turn": StageOffload(host_layers=(0, 2), disk_layers=(1, 3), num_buffers=3),
    "everything on disk": StageOffload(disk_layers=ALL, embedding="disk", head="disk"),
}


@pytest.fixture
def offloading(tmp_path: Path) -> Iterator[Offloading]:
    """Closed when the GPU has done everything; its stream is no thread's current one then."""
    opened = Offloading(tmp_path)
    yield opened
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.default_stream())
    opened.close()


def on_gpu(
    model: TinyModel, offload: StageOffload, num_stages: int, name: str, offloading: Offloading
) -> EnginePipeline:
    graphs = name == "graphs" and not offload.disk_layers
    plan = engine_plan(num_stages, graphs=graphs, hidden_size=model.reference.config.hidden_size)
    plan = replace(plan, stages=tuple(offloaded_stage(stage, offload) for stage in plan.stages))
    offloading.use_graphs = graphs
    device = f"cuda:{torch.cuda.current_device()}"
    mode = MODES[name]
    return EnginePipeline(model, plan, mode, MonotonicClock(), device, offloading).prepare()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
def test_tokens_are_those_of_transformers_wherever_weights_stand(
    family: str,
    placement: str,
    name: str,
    tiny: Callable[[str], TinyModel],
    offloading: Offloading,
) -> None:
    """llama: the fused stack; opt: transformers' own modules."""
    model, offload = tiny(family), PLACEMENTS[placement]
    requests = make_requests(
        LENGTHS, lambda n: SamplingParams(max_new_tokens=9 + n % 3, ignore_eos=True)
    )
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    for num_stages in (1, 2):
        pipeline = on_gpu(model, offload, num_stages, name, offloading)
        captured = pipeline.engines[0].graph_runner.num_graphs > 0
        assert captured == (name == "graphs" and "disk" not in placement)
        for seed in range(2):
            found = pipeline.generate(requests, seed=seed)
            assert [list(outcome.token_ids) for outcome in found] == wanted


@pytest.mark.parametrize("name", ["graphs", "eager"])
def test_streaming_from_host_memory_waits_for_nothing(
    name: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    offload = PLACEMENTS["everything in host memory"]
    pipeline = on_gpu(tiny("llama"), offload, 1, name, offloading)
    requests = make_requests(LENGTHS, lambda n: SamplingParams(max_new_tokens=9, ignore_eos=True))
    pipeline.generate(requests)
    stage = pipeline.models[0]
    assert not stage.waits_on_host
    with torch.inference_mode(), no_synchronisation():
        stage._streamed.gates.before(0)
        stage._streamed.gates.after(0)
        stage._streamed.gates.end()
    (offloaded,) = offloading.opened
    assert not offloaded.warning, "pinned memory is to be had"
    assert (offloaded.use().host_bytes_per_s or 0) > 0


def test_a_gpu_reads_pinned_memory_over_the_link() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pinned = PinnedMemory(device)
    memory = pinned.take(4096)
    assert memory.is_pinned()
    assert not pinned.reason
    view = device_view(memory, device)
    assert view.device == device
    memory.view(torch.float32).copy_(torch.arange(1024.0))
    rows = view.view(torch.float32).view(64, 16)
    ids = torch.tensor([3, 63, 3], device=device)
    found = torch.nn.functional.embedding(ids, rows).cpu()
    assert torch.equal(found, torch.arange(1024.0).view(64, 16)[[3, 63, 3]])
    pinned.close()


def test_torch_takes_no_more_than_the_limit() -> None:
    """Also where freed blocks are too small for what comes next, as with merged weights."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(device) + (256 << 20)
    torch.cuda.reset_peak_memory_stats(device)
    limit_memory(limit, device)
    try:
        parts = [torch.empty(24 << 20, dtype=torch.uint8, device=device) for _ in range(8)]
        del parts
        whole = torch.empty(192 << 20, dtype=torch.uint8, device=device)
        assert torch.cuda.max_memory_reserved(device) <= limit
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(96 << 20, dtype=torch.uint8, device=device)
        del whole
    finally:
        limit_memory("auto", device)
    torch.empty(300 << 20, dtype=torch.uint8, device=device)


def test_memory_that_cannot_be_pinned_is_told_and_still_streams(
    tiny: Callable[[str], TinyModel], offloading: Offloading, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        """CUDA with a small limit of locked memory."""

        def __init__(self, cudart: Any) -> None:
            self._cudart = cudart

        def cudaHostRegister(self, *_: object) -> int:
            return 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cudart, name)

    cudart: Callable[[], Any] = torch.cuda.cudart
    refusing = Refusing(cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    model = tiny("llama")
    offload = PLACEMENTS["everything in host memory"]
    requests = make_requests((5, 3), lambda n: SamplingParams(max_new_tokens=9, ignore_eos=True))
    wanted = [model.greedy(r.prompt_ids, 9) for r in requests]
    pipeline = on_gpu(model, offload, 1, "graphs", offloading)
    assert not pipeline.engines[0].graph_runner.num_graphs
    assert pipeline.models[0].waits_on_host
    assert "could not be pinned (out of memory)" in offloading.opened[0].warning
    assert [list(found.token_ids) for found in pipeline.generate(requests)] == wanted


def test_steps_that_may_wait_are_launched_beside_the_event_loop() -> None:
    """On the stage's own stream, and what they add is there for what the loop adds next."""
    device = torch.device("cuda", torch.cuda.current_device())

    async def session() -> tuple[torch.cuda.Stream, torch.cuda.Stream, int]:
        clock, progress = MonotonicClock(), ProgressEngine()
        stream = open_stream(device, clock, progress, waits_on_host=True)
        going = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> tuple[torch.cuda.Stream, torch.Tensor]:
            asyncio.run_coroutine_threadsafe(_set(going), loop).result(60)  # the loop lives
            return torch.cuda.current_stream(), torch.full((1000,), 3, device=device)

        try:
            there, tensor = await stream.compute(work)
            return there, torch.cuda.current_stream(), int(tensor.sum())
        finally:
            stream.close()

    launching, own, total = asyncio.run(session())
    torch.cuda.set_stream(torch.cuda.default_stream())
    assert launching == own
    assert total == 3000


async def _set(event: asyncio.Event) -> None:
    event.set()
