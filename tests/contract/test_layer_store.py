"""The file of offloaded weights: private, gone with its process, and honest when it cannot."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mpipipe.errors import EnvironmentSetupError
from mpipipe.weights.layer_layout import ALIGNMENT, Layout, aligned_bytes
from mpipipe.weights.layer_store import HostRegion, OffloadFile

META = torch.device("meta")


def shells(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device=META) for name, shape in shapes.items()}


# ---- layout --------------------------------------------------------------------------------------


def test_what_is_merged_lies_side_by_side() -> None:
    """Weights, biases and scales each, whatever order the module names them in."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("k_proj", 5), ("o_proj", 7), ("q_proj", 9), ("v_proj", 5)):
        shapes[f"self_attn.{name}.bias"] = (rows,)
        shapes[f"self_attn.{name}.weight"] = (rows, 3)
    shapes |= {"mlp.up_proj.weight": (11, 3), "mlp.gate_proj.weight": (11, 3), "norm.weight": (3,)}
    layout = Layout.of(shells(shapes, torch.bfloat16))
    assert layout.spans.keys() == shapes.keys()
    for parent, leaf, merged in (
        ("self_attn", "weight", ("q_proj", "k_proj", "v_proj")),
        ("self_attn", "bias", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "weight", ("gate_proj", "up_proj")),
    ):
        spans = [layout.spans[f"{parent}.{name}.{leaf}"] for name in merged]
        for span, following in pairwise(spans):
            assert span.offset + span.num_bytes == following.offset
        assert spans[0].offset % 256 == 0


def test_tensors_do_not_overlap_and_buffers_are_whole_pages() -> None:
    tensors = {
        **shells({"a.weight": (3, 5), "b.weight": (7,)}, torch.int8),
        **shells({"a.scale": (3,), "c.scalar": ()}, torch.float32),
    }
    layout = Layout.of(tensors)
    spans = sorted(layout.spans.values(), key=lambda span: span.offset)
    for span, following in pairwise(spans):
        assert span.offset + span.num_bytes <= following.offset
    assert spans[-1].offset + spans[-1].num_bytes <= layout.num_bytes
    assert layout.num_bytes % ALIGNMENT == 0
    buffer = aligned_bytes(layout.num_bytes, torch.device("cpu"))
    assert buffer.data_ptr() % ALIGNMENT == 0
    for name, view in layout.views(buffer).items():
        assert (view.shape, view.dtype) == (tensors[name].shape, tensors[name].dtype)


# ---- file ----------------------------------------------------------------------------------------


@contextmanager
def opened(folder: Path) -> Iterator[OffloadFile]:
    file = OffloadFile.open(folder, "mpipipe-job-7-rank-1")
    try:
        yield file
    finally:
        file.close()


def test_regions_keep_what_was_written_after_the_folder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    folder.mkdir()
    first, second = torch.arange(1000.0), torch.arange(5, dtype=torch.bfloat16)
    with opened(folder) as file:
        assert list(folder.iterdir()) == [], "a killed process leaves nothing"
        regions = [file.reserve(5000), file.reserve(100)]
        assert regions[1].start == 2 * ALIGNMENT
        regions[0].write(64, first)
        regions[1].write(0, second)
        shutil.rmtree(folder)
        for region, offset, tensor in ((regions[0], 64, first), (regions[1], 0, second)):
            out = torch.empty(tensor.nbytes, dtype=torch.uint8)
            region.read_into(offset, out)
            assert torch.equal(out.view(tensor.dtype), tensor)
        assert file.read_bytes == first.nbytes + second.nbytes


def test_a_large_read_is_divided_among_threads(tmp_path: Path) -> None:
    """Each piece at its place, and an error of any of them told."""
    content = torch.randint(0, 256, (20 << 20,), dtype=torch.uint8)
    file = OffloadFile.open(tmp_path, "rank-0", num_threads=3)
    try:
        region = file.reserve(content.numel() + 5)
        region.write(5, content)
        out = torch.empty_like(content)
        region.read_into(5, out)
        assert torch.equal(out, content)
        assert file.read_bytes == content.numel()
        os.ftruncate(file._descriptor, 18 << 20)
        with pytest.raises(EnvironmentSetupError, match="ended 2097157 bytes too early"):
            region.read_into(5, out)
    finally:
        file.close()


def test_a_name_that_stays_while_the_file_is_open_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError("in use")

    monkeypatch.setattr(os, "unlink", refuse)
    with opened(tmp_path) as file:
        (path,) = tmp_path.iterdir()
        assert path.name.startswith("mpipipe-job-7-rank-1-")
        assert path.stat().st_mode & 0o077 == 0, "it is private"
        monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    file.close()  # once more does no harm


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "offload"
    if not missing:
        folder.touch()
    cause = "No such file or directory" if missing else "Not a directory"
    with pytest.raises(EnvironmentSetupError, match=rf"offload \({cause}\): memory\.offload_dir"):
        OffloadFile.open(folder, "rank-0")


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """As a full disk does, the system refuses to let a file grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    with opened(tmp_path) as file, files_up_to(1 << 20):
        file.reserve(1 << 19)
        with pytest.raises(
            EnvironmentSetupError,
            match=r"\(File too large; 0\.5 MiB stand there, 3\.0 MiB more .* are free\): make room",
        ):
            file.reserve(3 << 20)


def test_a_disk_that_is_full_when_it_is_written_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where room cannot be reserved, e.g. on a network file system."""

    def refuse(descriptor: int, start: int, num_bytes: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with opened(tmp_path) as file, files_up_to(1 << 20):
        region = file.reserve(3 << 20)
        with pytest.raises(EnvironmentSetupError, match="File too large"):
            region.write(0, torch.zeros(3 << 20, dtype=torch.uint8))


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        region = file.reserve(ALIGNMENT)
        os.ftruncate(file._descriptor, 1000)
        with pytest.raises(EnvironmentSetupError, match="ended 3096 bytes too early"):
            region.read_into(0, torch.empty(ALIGNMENT, dtype=torch.uint8))


def test_a_disk_that_fails_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        region = file.reserve(ALIGNMENT)
        os.close(file._descriptor)
        with pytest.raises(EnvironmentSetupError, match=r"cannot be read .* is the disk well"):
            region.read_into(0, torch.empty(ALIGNMENT, dtype=torch.uint8))
        file._descriptor = -1


def test_host_memory_is_filled_in_its_place() -> None:
    region = HostRegion(torch.zeros(64, dtype=torch.uint8))
    region.write(16, torch.arange(4.0))
    own = region.memory[32:48].view(torch.float32).fill_(3.0)
    region.write(32, own)
    out = torch.empty(32, dtype=torch.uint8)
    region.read_into(16, out)
    assert out.view(torch.float32).tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
