"""Filling tensors: the same bits whatever the threads, a fixed staging buffer, faults are told."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError
from mpipipe.weights import filling
from mpipipe.weights.filling import Filling, TensorFiller
from mpipipe.weights.layer_layout import ALIGNMENT
from mpipipe.weights.loader import load_stage
from mpipipe.weights.read_buffers import ReadBuffers, content_of
from mpipipe.weights.readers import FileReaders
from mpipipe.weights.sources import StoredTensor, TensorSource, open_source

NUM_TENSORS = 12
CPU = torch.device("cpu")
MANY = 1 << 20  # elements: 4 MiB in float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors of very different sizes in two files, one of them empty."""
    torch.manual_seed(0)
    sizes = [
        (3,),
        (0, 5),
        (),
        (100, 7),
        (1,),
        (64, 65),
        (17,),
        (5, 4, 3),
        (999,),
        (2, 2),
        (8,),
        (1,),
    ]
    tensors = {f"t{number:02d}": torch.randn(size) for number, size in enumerate(sizes)}
    index: dict[str, str] = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, tmp_path / name)
        index |= dict.fromkeys(part, name)
    listing = ", ".join(f'"{name}": "{file}"' for name, file in index.items())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {' + listing + "}}")
    return tmp_path


@contextmanager
def filler(
    source: TensorSource, *, num_threads: int = 2, piece_bytes: int = 64
) -> Iterator[TensorFiller]:
    found = TensorFiller(source, num_threads=num_threads, device=CPU, piece_bytes=piece_bytes)
    try:
        yield found
    finally:
        found.close()


def in_file_order(source: TensorSource, names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: source.stored(name).order)


def empty(source: TensorSource, name: str, dtype: torch.dtype) -> Filling:
    tensor = torch.full(source.stored(name).shape, 7, dtype=dtype)
    return Filling(tensor, [(name, tensor)])


@pytest.mark.parametrize("piece_bytes", [8, 24, 16 << 20])
@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bits_are_the_same_whatever_the_threads_and_pieces(
    folder: Path, dtype: torch.dtype, num_threads: int, piece_bytes: int
) -> None:
    source = open_source(read_index(folder))
    names = in_file_order(source, source.names())
    assert len(names) == NUM_TENSORS
    with filler(source, num_threads=num_threads, piece_bytes=piece_bytes) as found:
        asked = (empty(source, name, dtype) for name in names)
        full = {filled.parts[0][0]: filled.tensor for filled in found.fill(asked)}
    assert list(full) == names, "in the order in which they were asked for"
    torch.manual_seed(0)
    for number in range(NUM_TENSORS):
        name = f"t{number:02d}"
        expected = torch.randn(source.stored(name).shape)
        assert torch.equal(full[name], expected.to(dtype)), name
    assert found.bytes_read == sum(4 * tensor.numel() for tensor in full.values())
    assert (found.convert_s > 0) == (dtype != torch.float32)


def test_a_tensor_is_asked_for_when_there_is_room_to_read_it(folder: Path) -> None:
    source = open_source(read_index(folder))
    names = in_file_order(source, source.names())
    asked: list[str] = []

    def asking() -> Iterator[Filling]:
        for name in names:
            asked.append(name)
            yield empty(source, name, torch.float32)

    with filler(source, num_threads=1, piece_bytes=16 << 20) as found:
        for number, _ in enumerate(found.fill(asking())):
            # Two pieces are begun, a third waits for its turn; the empty tensor has none.
            assert len(asked) <= number + 1 + 2 + 1 + 1
    assert asked == names


def save_large(folder: Path) -> TensorSource:
    save_file({"large": torch.arange(MANY, dtype=torch.float32)}, folder / "model.safetensors")
    return open_source(read_index(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_the_tensor_there_is_one_read_buffer_of_a_fixed_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    source = save_large(tmp_path)
    made: list[torch.Size] = []
    original = torch.empty

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = original(*args, **kwargs)  # type: ignore[call-overload]
        made.append(tensor.shape)
        return tensor

    large = empty(source, "large", dtype)
    monkeypatch.setattr(torch, "empty", spy)
    with filler(source, num_threads=3, piece_bytes=1024) as found:
        assert list(found.fill([large])) == [large]
    assert made == ([] if dtype == torch.float32 else [torch.Size([6 * 1024 + ALIGNMENT])])
    assert torch.equal(large.tensor, torch.arange(MANY, dtype=torch.float32).to(dtype))


def test_memory_that_cannot_be_pinned_is_pageable_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        """CUDA's runtime, where the limit of locked memory is reached."""

        cudaError = int

        def cudaHostRegister(self, _address: int, _num_bytes: int, _flags: int) -> int:
            return 2

        def cudaGetErrorString(self, _code: int) -> str:
            return "out of memory"

    out = torch.zeros(4)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(torch, "zeros", lambda *_args, **_kwargs: None)  # there is no GPU to ask
    buffers = ReadBuffers(2, 1 << 20, torch.device("cuda", 0))
    for number in range(3):
        chunk = buffers.take()
        assert chunk is not None
        chunk[:8].view(torch.bfloat16).fill_(number)
        out.copy_(content_of(chunk, torch.bfloat16, out))
        buffers.give_back(chunk)
    buffers.close()
    assert out.tolist() == [2.0] * 4
    assert len(buffers.warnings) == 1
    assert buffers.warnings[0].startswith("2 MiB of host memory cannot be pinned (out of memory)")


def test_all_chunks_in_use_is_said() -> None:
    buffers = ReadBuffers(2, 64, CPU)
    first, second = buffers.take(), buffers.take()
    assert first is not None
    assert second is not None
    assert buffers.take() is None
    buffers.give_back(first)
    assert buffers.take() is first


# ---- faults, through the whole of the loader -----------------------------------------------------


class Matrices(torch.nn.Module):
    """`count` matrices of 128 KiB."""

    def __init__(self, count: int) -> None:
        super().__init__()
        shell = torch.empty(128, 256, device="meta")
        self.matrices = torch.nn.ParameterList([shell.clone() for _ in range(count)])


def load(folder: Path, module: torch.nn.Module, dtype: torch.dtype, all_names: set[str]) -> float:
    """Bytes that the kernel has counted for each byte that the module holds in its file."""
    own = module.state_dict()
    before = counted_bytes()
    report = load_stage(
        module,
        {name: name for name in own},
        read_index(folder),
        all_names=all_names,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    read = counted_bytes() - before
    assert report.bytes_read == sum(tensor.numel() * 4 for tensor in own.values())
    return read / report.bytes_read


def counted_bytes() -> int:
    """What this process has read so far, from disk or page cache."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def save_matrices(folder: Path, count: int, form: str) -> set[str]:
    state = {f"matrices.{number}": torch.randn(128, 256) for number in range(count)}
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    return set(state)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_counts_no_more_than_the_bytes_of_the_stage(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    names = save_matrices(tmp_path, 64, form)
    stage = Matrices(32).to(dtype)
    assert 1.0 <= load(tmp_path, stage, dtype, names) <= 1.02
    everything = Matrices(64).to(dtype)
    load(tmp_path, everything, dtype, names)
    assert torch.equal(stage.matrices[31], everything.matrices[31])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_in_one_thread_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    names = save_matrices(tmp_path, 64, "safetensors")
    num_reads = 0

    def faulty(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal num_reads
        num_reads += 1
        if offset > 40 << 17:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(file, buffers, offset)

    monkeypatch.setattr(filling, "FileReaders", partial(FileReaders, preadv=faulty))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(Input/output"):
        load(tmp_path, Matrices(64).to(dtype), dtype, names)
    assert 40 <= num_reads <= 40 + 8, "others were not begun"
    for thread in threading.enumerate():
        if thread.name.startswith("read-weights"):
            thread.join(30.0)
            assert not thread.is_alive()


class Vanishing:
    """A source whose file ends before what its header said."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.close = source.close
        self.names = source.names
        self.unpickled = source.unpickled

    def stored(self, name: str) -> StoredTensor:
        found = self._source.stored(name)
        assert found.extent is not None
        if name == "t03":
            os.truncate(found.extent.path, found.extent.offset + 5)
        return found


def test_a_shard_that_is_cut_off_while_it_is_read(folder: Path) -> None:
    source = Vanishing(open_source(read_index(folder)))
    names = in_file_order(open_source(read_index(folder)), source.names())
    with (
        filler(source, num_threads=1) as found,
        pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors ends at byte"),
    ):
        list(found.fill(empty(source, name, torch.float32) for name in names))
