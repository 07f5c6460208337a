"""The stream of a GPU on a pretended one: what it calls of CUDA does the same on a CPU, at once.

Whether CUDA itself behaves so is for `tests/gpu` to say. This runs where no GPU is, so that a line
that cannot run anywhere is found before one is there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpipipe.stage.cuda_stream import CudaStream
from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import (
    EnginePipeline,
    ForetellingDrafter,
    engine_plan,
    make_requests,
)
from tests.contract.replaying_stream import Tape
from tests.contract.tiny_models import TinyModel

CPU = torch.device("cpu")
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


class PretendedStream:
    """All that is added is done at once."""

    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class PretendedEvent:
    """Reached when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.is_recorded = False

    def record(self, stream: object) -> None:
        assert isinstance(stream, PretendedStream)
        self.is_recorded = True

    def query(self) -> bool:
        assert self.is_recorded
        return True

    def elapsed_time(self, later: PretendedEvent) -> float:
        assert self.enable_timing
        assert later.enable_timing
        return 2.0


class PretendedGraph:
    """Repeats the same operations on the same addresses; computes nothing while it is captured."""

    def __init__(self) -> None:
        self._tape: Tape | None = Tape()

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool is POOL
        assert capture_error_mode == "thread_local"
        assert self._tape is not None
        self._tape.__enter__()  # type: ignore[no-untyped-call]

    def capture_end(self) -> None:
        assert self._tape is not None
        self._tape.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._tape.rewind()

    def replay(self) -> None:
        assert self._tape is not None, "it was reset"
        with torch.inference_mode():
            self._tape.play()

    def reset(self) -> None:
        self._tape = None


POOL = object()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> CudaStream:
    """As `open_stream` makes it."""
    empty = torch.empty

    def unpinned(*size: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", unpinned)
    for name, stand_in in {
        "Stream": PretendedStream,
        "stream": lambda stream: stream,
        "Event": PretendedEvent,
        "CUDAGraph": PretendedGraph,
        "graph_pool_handle": lambda: POOL,
        "synchronize": lambda _: None,
        "set_device": lambda _: None,
        "set_stream": lambda _: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CudaStream(CPU, PretendedStream())  # type: ignore[arg-type]


@pytest.mark.parametrize("num_rows", [3, 40_000])
def test_arrays_are_copied_and_may_change_at_once(num_rows: int, stream: CudaStream) -> None:
    """Few bytes, and as many as torch would hand to its threads; also every second column."""
    for dtype in (np.int32, np.int64, np.float32, np.uint64):
        array = np.arange(num_rows * 4).reshape(num_rows, 4).astype(dtype)
        wanted = array.copy()
        new, kept = stream.upload(array), torch.zeros_like(torch.from_numpy(array))
        stream.upload_into(array, kept)
        columns = stream.upload(array[:, ::2])
        array.fill(0)
        assert np.array_equal(new.numpy(), wanted)
        assert np.array_equal(kept.numpy(), wanted)
        assert np.array_equal(columns.numpy(), wanted[:, ::2])


def test_uploads_go_round_the_ring(stream: CudaStream) -> None:
    """More than it has room for, of sizes that fill no segment to its end."""
    for number in range(40):
        array = np.full(700_001, number, dtype=np.int32)
        assert np.array_equal(stream.upload(array).clone().numpy(), array)


def test_results_come_down_and_events_tell_the_time(stream: CudaStream) -> None:
    began = stream.record_event()
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(stream.download(ids), ids)
    ended = stream.record_event()
    assert ended.query()
    assert began.seconds_until(ended) == pytest.approx(2e-3)


def test_captured_work_is_repeated_until_it_is_released(stream: CudaStream) -> None:
    total = torch.zeros(1)
    replay = stream.capture(lambda: total.add_(1))  # type: ignore[arg-type]
    assert total.item() == 0
    replay()
    replay()
    assert total.item() == 2
    stream.release_captured()
    with pytest.raises(AssertionError, match="reset"):
        replay()


def test_no_garbage_is_collected_while_work_is_captured(stream: CudaStream) -> None:
    """CUDA allows no graph to be destroyed then, and old ones may be in the garbage."""
    enabled = list[bool]()
    stream.capture(lambda: enabled.append(gc.isenabled()))
    assert enabled == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("drafted_rows", [0, 8])
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_are_those_of_transformers(
    graphs: bool,
    num_stages: int,
    drafted_rows: int,
    stream: CudaStream,
    tiny: Callable[[str], TinyModel],
) -> None:
    model = tiny("llama")
    requests = make_requests(LENGTHS, lambda n: GREEDY.replace(max_new_tokens=9 + n % 3))
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    plan = engine_plan(num_stages, graphs=graphs, drafted_rows=drafted_rows)
    mode = "replayed" if graphs else "tensors"
    pipeline = EnginePipeline(model, plan, mode, stream=stream).prepare()
    assert (pipeline.engines[0].graph_runner.num_graphs > 0) == graphs
    for seed in range(2):
        drafter = ForetellingDrafter(wanted, seed) if drafted_rows else None
        found = pipeline.generate(requests, seed=seed, drafter=drafter)
        assert [list(outcome.token_ids) for outcome in found] == wanted
