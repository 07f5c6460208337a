"""Of a tensor that lanes share, a lane reads its own bytes, and gets its own values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError
from mpipipe.types import Shard
from mpipipe.weights.filling import Filling, TensorFiller
from mpipipe.weights.loader import LoadReport, load_stage
from mpipipe.weights.random import fill_random
from mpipipe.weights.sources import open_source

ROWS, COLUMNS, LANES = 24, 18, 3
CPU = torch.device("cpu")
WHOLE = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def part_of(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    return whole.tensor_split(shard.count, dim=shard.dim)[shard.index]


class Model(nn.Module):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        shape = part_of(WHOLE, shard).shape
        self.whole = nn.Parameter(torch.empty(COLUMNS, device="meta"), requires_grad=False)
        self.part = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    (folder / "config.json").write_text("{}")
    tensors = {"whole": torch.ones(COLUMNS, dtype=dtype), "part": WHOLE.to(dtype)}
    match kind:
        case "safetensors":
            save_file(tensors, folder / "model.safetensors")
        case "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        case "unpickled":  # not contiguous: only torch reads it
            tensors["part"] = tensors["part"].t().contiguous().t()
            torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def load(folder: Path, shard: Shard) -> tuple[Model, LoadReport]:
    model = Model(shard)
    report = load_stage(
        model,
        {"whole": "whole", "part": "part"},
        read_index(folder),
        all_names=("whole", "part"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        shards={"part": shard},
    )
    return model, report


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "unpickled"])
def test_lanes_have_the_parts_of_the_stored_tensor(
    kind: str, dtype: torch.dtype, dim: int, tmp_path: Path
) -> None:
    folder = save(tmp_path, kind, dtype)
    for lane in range(LANES):
        shard = Shard(dim, lane, LANES)
        model, report = load(folder, shard)
        assert torch.equal(model.part, part_of(WHOLE.to(dtype).float(), shard))
        assert torch.equal(model.whole, torch.ones(COLUMNS))
        assert report.bytes_read == (COLUMNS + ROWS * COLUMNS // LANES) * dtype.itemsize


def test_pieces_of_a_few_rows_give_the_same(tmp_path: Path) -> None:
    source = open_source(read_index(save(tmp_path, "safetensors")))
    row_bytes = COLUMNS // LANES * 4
    for piece_bytes in (row_bytes, 5 * row_bytes + 8, 1 << 20):
        filler = TensorFiller(source, num_threads=2, device=CPU, piece_bytes=piece_bytes)
        try:
            shard = Shard(1, 2, LANES)
            out = torch.zeros(ROWS, COLUMNS // LANES)
            (filled,) = filler.fill([Filling(out, [("part", out)], shard)])
            assert torch.equal(filled.tensor, part_of(WHOLE, shard))
        finally:
            filler.close()


def test_a_tensor_that_is_no_multiple_of_the_part_is_refused(tmp_path: Path) -> None:
    folder, model = save(tmp_path, "safetensors"), Model(Shard(1, 0, 2))
    with pytest.raises(CheckpointError, match=r"part is \[24, 18\], expected \[24, 27\]"):
        load_stage(
            model,
            {"whole": "whole", "part": "part"},
            read_index(folder),
            all_names=("whole", "part"),
            dtype=torch.float32,
            device=torch.device("cpu"),
            shards={"part": Shard(1, 0, 3)},
        )


def test_a_file_that_ends_within_the_last_stretch_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, "safetensors")
    file = folder / "model.safetensors"
    index = read_index(folder)
    entry = index.tensors["part"]
    with file.open("r+b") as opened:
        opened.truncate(entry.offset + entry.num_bytes - 1)
    filler = TensorFiller(open_source(index), num_threads=2, device=CPU)
    out = torch.zeros(ROWS, COLUMNS // LANES)
    try:
        with pytest.raises(CheckpointError, match="the file was shortened"):
            list(filler.fill([Filling(out, [("part", out)], Shard(1, LANES - 1, LANES))]))
    finally:
        filler.close()


@pytest.mark.parametrize("dim", [0, 1])
def test_random_lanes_are_parts_of_one_random_tensor(dim: int) -> None:
    shards = [Shard(dim, lane, LANES) for lane in range(LANES)]
    names = {"whole": "whole", "part": "layers.0.part"}
    parts: list[torch.Tensor] = []
    for shard in shards:
        model = Model(shard)
        fill_random(
            model, names, dtype=torch.float32, device=torch.device("cpu"), shards={"part": shard}
        )
        parts.append(model.part)
    alone = Model(Shard(0, 0, 1))
    fill_random(alone, names, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(torch.cat(parts, dim=dim), alone.part)
