"""`mpipipe bench load`: what it counts and prints, on a tiny model in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mpipipe.bench.load import _merged
from mpipipe.cli.bench_load import load_command
from mpipipe.errors import PlanError
from mpipipe.weights.readers import Extent
from tests.contract.checkpoint_cases import FORMS, make_model
from tests.contract.test_prequantized import write
from tests.contract.tiny_models import save_tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    FORMS["sharded safetensors"](make_model("llama"), tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(
        f'model.path = "{tmp_path}"\nmodel.dtype = "bfloat16"\npipeline.device = "cpu"\n'
    )
    return path


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_stages_of_a_model_are_read_byte_for_byte(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    sizes = []
    for stage in range(2):
        load_command(config, [], stages=2, stage=stage, cold=True, repeat=2)
        text = capsys.readouterr().out
        warm, cold = records(text)
        assert (warm["state"], cold["state"]) == ("warm", "cold")
        for record in (warm, cold):
            assert record["num_reads"] > 0
            # The counters are files of the kernel, and count themselves.
            assert 0 <= (record["read_ratio"] - 1) * record["bytes"] < 32 << 10
            assert len(record["all_load_s"]) == len(record["all_drop_s"]) == 2
            assert 0 < record["convert_s"] < max(record["all_load_s"])
        assert warm["parameter_bytes"] == warm["bytes"] // 2
        assert "of read+keep" in text
        sizes.append(warm["bytes"])
    torch.set_num_threads(before)
    assert sum(sizes) == sum(t.nbytes for t in make_model("llama").state_dict().values())


@pytest.mark.parametrize(
    ("form", "unread"),
    [
        ("int-quantized", ()),
        ("pack-quantized", ("weight_shape",)),
        ("gptq", ("qzeros", "g_idx")),
    ],
)
def test_a_checkpoint_in_8_bits_is_read_as_it_is_stored(
    form: str, unread: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(save_tiny("llama", tmp_path / "plain"), form, tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(f'model.path = "{tmp_path}"\npipeline.device = "cpu"\n')
    before = torch.get_num_threads()
    load_command(path, [], stages=1, stage=0, cold=False, repeat=1)
    torch.set_num_threads(before)
    (record,) = records(capsys.readouterr().out)
    stored = load_file(tmp_path / "model.safetensors")
    needed = [t.nbytes for name, t in stored.items() if name.rpartition(".")[2] not in unread]
    assert record["bytes"] == sum(needed)
    assert 0 <= (record["read_ratio"] - 1) * record["bytes"] < 32 << 10


def test_neighbours_are_read_in_one_go_and_shared_bytes_once() -> None:
    a, b = Path("a"), Path("b")
    extents = [Extent(b, 0, 8), Extent(a, 8, 8), Extent(a, 0, 8), Extent(a, 4, 2), Extent(a, 20, 4)]
    assert _merged(extents) == [Extent(a, 0, 16), Extent(a, 20, 4), Extent(b, 0, 8)]


@pytest.mark.parametrize(
    ("words", "stage", "expected"),
    [
        ([], 2, "there is no stage 2: the plan has 2 stages"),
        (["model.weights=random"], 0, "random weights are not read"),
    ],
)
def test_what_cannot_be_measured(config: Path, words: list[str], stage: int, expected: str) -> None:
    with pytest.raises(PlanError, match=expected):
        load_command(config, words, stages=2, stage=stage, cold=False, repeat=1)
