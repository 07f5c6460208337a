"""Which tensor goes into which file, and that others can read such files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import UnsupportedModelError
from mpipipe.staging.layout import TensorPlan, index_of, lay_out, stored_dtype

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int8", "bool")
PLANS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), min_size=1
).map(lambda drawn: [TensorPlan(f"t{i}", d, tuple(s)) for i, (d, s) in enumerate(drawn)])


@given(PLANS, st.integers(1, 500))
def test_every_tensor_has_one_place_and_no_file_is_too_large(
    plans: list[TensorPlan], shard_bytes: int
) -> None:
    shards = lay_out(plans, shard_bytes)
    placed = [tensor for shard in shards for tensor in shard.tensors]
    assert sorted(placed, key=lambda tensor: tensor.name) == sorted(
        plans, key=lambda tensor: tensor.name
    )
    for shard in shards:
        held = sum(tensor.num_bytes for tensor in shard.tensors)
        assert held <= shard_bytes or sum(t.num_bytes > 0 for t in shard.tensors) == 1
    assert len({shard.name for shard in shards}) == len(shards)


@given(PLANS)
def test_a_tensor_begins_at_a_multiple_of_its_item_size(plans: list[TensorPlan]) -> None:
    for shard in lay_out(plans, 1 << 40):
        header = shard.header
        length = int.from_bytes(header[:8], "little")
        assert length == len(header) - 8
        described = json.loads(header[8:])
        del described["__metadata__"]
        for tensor in shard.tensors:
            begin, end = described[tensor.name]["data_offsets"]
            assert end - begin == tensor.num_bytes
            elements = math.prod(tensor.shape)
            assert elements == 0 or (len(header) + begin) % (tensor.num_bytes // elements) == 0


def test_the_safetensors_library_and_the_index_read_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "é": rng.integers(0, 9, (7,)).astype(np.int8),
        "b": rng.standard_normal((4,)).astype(np.float64),
        "scalar": np.array(3.0, dtype=np.float16),
    }
    plans = [TensorPlan(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    shards = lay_out(plans, 64)
    assert len(shards) > 1
    for shard in shards:
        content = shard.header + b"".join(arrays[t.name].tobytes() for t in shard.tensors)
        assert len(content) == shard.num_bytes
        (tmp_path / shard.name).write_bytes(content)
        for name, array in load_file(tmp_path / shard.name).items():
            assert np.array_equal(array, arrays[name])
    for name, content in index_of(shards).items():
        (tmp_path / name).write_bytes(content)
    index = read_index(tmp_path)
    assert set(index.tensors) == set(arrays)
    assert [path.name for path in index.files] == [shard.name for shard in shards]


def test_one_file_needs_no_index() -> None:
    (shard,) = lay_out([TensorPlan("a", "float32", (2,))], 1 << 20)
    assert shard.name == "model.safetensors"
    assert index_of([shard]) == {}


@pytest.mark.parametrize(
    ("stored", "wanted", "result"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("int64", "bfloat16", "int64"),
        ("float8_e4m3fn", "bfloat16", "float8_e4m3fn"),
    ],
)
def test_only_floats_change_their_type(stored: str, wanted: str | None, result: str) -> None:
    assert stored_dtype("t", stored, wanted) == result


def test_a_type_without_a_place_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="t is stored as complex64"):
        stored_dtype("t", "complex64", None)
