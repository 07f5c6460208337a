"""Weights from files onto a GPU: the bits that a CPU makes, through a fixed staging buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError
from mpipipe.weights.filling import Filling, TensorFiller
from mpipipe.weights.loader import LoadReport, load_stage
from mpipipe.weights.read_buffers import ReadBuffers
from mpipipe.weights.sources import open_source
from tests.contract.checkpoint_cases import FORMS, NUM_LAYERS, Stage, make_model, make_stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU = torch.device("cuda", 0)
MANY = 5_000_003  # elements: more than a piece, and no multiple of one


def load(folder: Path, stage: Stage, dtype: torch.dtype) -> LoadReport:
    return load_stage(
        stage.module,
        stage.wanted,
        read_index(folder),
        all_names=stage.all_names,
        tied=stage.tied,
        dtype=dtype,
        device=GPU,
    )


@pytest.mark.parametrize("run", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_on_a_gpu_has_the_bits_that_a_cpu_makes(
    tmp_path: Path, form: str, stored: torch.dtype, run: torch.dtype
) -> None:
    model = make_model("mixtral", stored)
    FORMS[form](model, tmp_path)
    stage = make_stage(model.config, 0, NUM_LAYERS, run)
    report = load(tmp_path, stage, run)
    state, expected = stage.module.state_dict(), model.state_dict()
    for name, canonical in stage.wanted.items():
        assert state[name].device.type == "cuda"
        assert torch.equal(state[name].cpu(), expected[canonical].to(run)), canonical
    assert report.warnings == ()
    assert report.bytes_read == sum(tensor.nbytes for tensor in expected.values())


def save_large(folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    tensor = torch.randn(MANY)
    torch.save({"large": tensor, "small": tensor[:5].clone()}, folder / "pytorch_model.bin")
    return tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_large_tensor_passes_through_few_chunks_that_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int, dtype: torch.dtype
) -> None:
    expected = save_large(tmp_path)
    pinned: list[int] = []
    original = ReadBuffers._allocate

    def spy(self: ReadBuffers) -> torch.Tensor:
        memory = original(self)
        pinned.append(memory.numel() if memory.is_pinned() else 0)
        return memory

    monkeypatch.setattr(ReadBuffers, "_allocate", spy)
    source = open_source(read_index(tmp_path))
    filler = TensorFiller(source, num_threads=num_threads, device=GPU, piece_bytes=1 << 16)
    # `work` keeps the caller's stream busy on memory that is freed before its kernel has run.
    work = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        work = work @ work * 1e-3
    del work
    out = {
        name: torch.empty(size, dtype=dtype, device="cuda")
        for name, size in (("large", MANY), ("small", 5))
    }
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    filled = list(filler.fill([Filling(out[name], [(name, out[name])]) for name in out]))
    peak = torch.cuda.max_memory_allocated() - before
    assert torch.equal(filled[0].tensor.cpu(), expected.to(dtype))
    assert torch.equal(filled[1].tensor.cpu(), expected[:5].to(dtype))
    filler.close()
    assert pinned == [2 * num_threads << 16]
    assert peak <= 4 << 16, "a piece of the stored type at a time"
    assert filler.convert_s > 0


def test_what_is_read_is_used_by_the_callers_stream_without_a_wait(tmp_path: Path) -> None:
    expected = save_large(tmp_path)
    source = open_source(read_index(tmp_path))
    filler = TensorFiller(source, num_threads=2, device=GPU)
    out = torch.empty(MANY, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for filled in filler.fill([Filling(out, [("large", out)])]):
            doubled = filled.tensor * 2
    stream.synchronize()
    filler.close()
    assert torch.equal(doubled.cpu(), expected * 2)


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    FORMS["safetensors"](model, tmp_path)
    stage = make_stage(model.config, 0, NUM_LAYERS, torch.float16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds values beyond float16"):
        load(tmp_path, stage, torch.float16)
