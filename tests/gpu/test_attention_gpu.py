"""Every attention backend that runs on this GPU agrees with the reference."""

from __future__ import annotations

import pytest
import torch

from mpipipe.models.attention.select import available_backends, make_backend
from mpipipe.models.attention.triton_paged import TritonAttention
from tests.contract.attention_cases import Shape
from tests.contract.test_attention import OPTIONS, check_decode_steps, check_varlen_steps

pytestmark = pytest.mark.gpu

SHAPES = {
    "grouped-64": Shape(6, 2, 64),
    "multi-head-100": Shape(4, 4, 100),
    "grouped-128": Shape(32, 8, 128),
    "multi-query-256": Shape(4, 1, 256),
}
DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = [name for name in available_backends() if name != "reference"]


def can_run(backend: str, shape: Shape, softcap: float | None) -> bool:
    if backend == "flashinfer":
        return shape.head_dim in {64, 128, 256}
    if backend == "varlen":
        return shape.head_dim % 8 == 0 and softcap is None
    return True


CASES = [
    pytest.param(backend, shape, options, id=f"{backend}-{shape_name}-{options_name}")
    for backend in BACKENDS
    for shape_name, shape in SHAPES.items()
    for options_name, options in OPTIONS.items()
    if can_run(backend, shape, options.softcap)
]


def test_our_own_kernels_run_on_a_gpu() -> None:
    if torch.cuda.is_available():
        assert "triton" in BACKENDS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "shape", "options"), CASES)
def test_backends_agree_with_the_reference(
    backend: str, shape: Shape, options: object, dtype: torch.dtype
) -> None:
    check_varlen_steps(make_backend(backend), shape, options, dtype, torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "shape", "options"), CASES)
def test_decode_steps_need_tensors_alone(
    backend: str, shape: Shape, options: object, dtype: torch.dtype
) -> None:
    made = make_backend(backend)
    if made.needs_seq_lens and backend != "sdpa":
        pytest.skip("plans each step on the host")
    check_decode_steps(made, shape, options, dtype, torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_our_prefill_kernel_agrees_without_torchs_flash_attention(shape: Shape) -> None:
    backend = TritonAttention(fresh_with_torch=False)
    check_varlen_steps(backend, shape, OPTIONS["window"], torch.bfloat16, torch.device("cuda"))
