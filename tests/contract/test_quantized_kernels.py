"""Products with weights of 8 bits: what torch computes, and compiled for every kind of GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpipipe.models import quantized_linear as plain

pytest.importorskip("triton", reason="triton is part of the dev extra on Linux x86_64 only")

from mpipipe.models.kernels import quantized_linear as kernels
from mpipipe.models.kernels.linear import LinearTuning, launch_linear
from tests.contract.compiling import output_of
from tests.contract.test_kernels import DEVICE, DOT_DTYPES, INTERPRETED, TOLERANCE, assert_near

FP8 = torch.float8_e4m3fn
# 5 rows in one tile; 40 in one, or in three, of which the last is not full.
CUTS = [
    (5, LinearTuning(block_out=64, block_in=64, least_rows=8)),
    (5, LinearTuning(block_out=64, block_in=64, pieces=3)),
    (40, LinearTuning(block_out=32, block_in=64, block_rows=64)),
    (40, LinearTuning(block_out=32, block_in=64, pieces=2, block_rows=16)),
]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def quantized(num_out: int, num_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of 8 bits that uses their whole range, and its scales, which differ a lot."""
    weight_OI = drawn(num_out, num_in)
    largest = 127 if dtype == torch.int8 else 448
    weight_OI *= largest / weight_OI.abs().amax(dim=1, keepdim=True)
    scale_O = torch.logspace(-4, -2, num_out).to(DEVICE)
    if dtype == torch.int8:
        weight_OI = weight_OI.round()
    return weight_OI.to(dtype), scale_O


def exact_product(
    rows_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor
) -> torch.Tensor:
    return rows_TI.float() @ (weight_OI.float() * scale_O[:, None]).T


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), [(128, 256), (96, 200)])
@pytest.mark.parametrize(("num_rows", "tuning"), CUTS, ids=str)
def test_a_streamed_int8_product_is_the_exact_one(
    num_rows: int, tuning: LinearTuning, num_out: int, num_in: int, dtype: torch.dtype
) -> None:
    rows_TI, bias_O = drawn(num_rows, num_in, dtype=dtype), drawn(num_out, dtype=dtype)
    weight_OI, scale_O = quantized(num_out, num_in, torch.int8)
    exact_TO = exact_product(rows_TI, weight_OI, scale_O)
    wide_TI = torch.cat([rows_TI, rows_TI], dim=1)[:, :num_in]  # strided rows
    first_TO = launch_linear(wide_TI, weight_OI, scale_O, None, tuning)
    assert first_TO.dtype == dtype
    assert_near(first_TO, exact_TO, TOLERANCE[dtype])
    # The counters are back at zero, and the order of the sums is the same.
    assert torch.equal(launch_linear(rows_TI, weight_OI, scale_O, None, tuning), first_TO)
    biased_TO = launch_linear(rows_TI, weight_OI, scale_O, bias_O, tuning)
    assert_near(biased_TO, exact_TO + bias_O.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("num_rows", [1, 20])
def test_a_streamed_float8_product_is_the_exact_one(num_rows: int) -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    rows_TI = drawn(num_rows, 256, dtype=torch.float16)
    weight_OI, scale_O = quantized(96, 256, FP8)
    actual_TO = launch_linear(rows_TI, weight_OI, scale_O, None, LinearTuning(32, 64, pieces=2))
    assert_near(actual_TO, exact_product(rows_TI, weight_OI, scale_O), TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.int8, FP8])
def test_a_dequantised_product_is_the_exact_one_in_slices_too(
    weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    rows_TI, bias_O = drawn(20, 200, dtype=dtype), drawn(96, dtype=dtype)
    weight_OI, scale_O = quantized(96, 200, weight_dtype)
    exact_TO = exact_product(rows_TI, weight_OI, scale_O)
    row_bytes = 200 * rows_TI.element_size()
    for max_bytes in (1 << 20, 40 * row_bytes):  # at once; 40 of 96, 40, 16
        for bias, expected_TO in ((None, exact_TO), (bias_O, exact_TO + bias_O.float())):
            actual_TO = kernels.dequantized_linear(
                rows_TI, weight_OI, scale_O, bias, max_bytes=max_bytes
            )
            assert actual_TO.dtype == dtype
            assert_near(actual_TO, expected_TO, TOLERANCE[dtype])


def test_no_more_than_the_limit_is_dequantised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, held = list[int](), list[weakref.ref[Any]]()

    def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert all(memory() is None for memory in held), "an earlier part still exists"
        sizes.append(weight.shape[0])
        memory = (weight * scale[:, None]).to(dtype).cpu().numpy().copy()
        held.append(weakref.ref(memory))
        return torch.from_numpy(memory).to(weight.device)

    monkeypatch.setattr(kernels, "dequantize", dequantize)
    weight_OI, scale_O = quantized(96, 64, torch.int8)
    kernels.dequantized_linear(drawn(3, 64), weight_OI, scale_O, None, max_bytes=40 * 64 * 4)
    assert sizes == [40, 40, 16]


@pytest.mark.parametrize("size", [48, 1000])
def test_rows_are_quantised_as_in_torch(size: int) -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    sizes_T1 = torch.tensor([[1.0], [1e-3], [0.0], [300.0]], device=DEVICE)
    rows_TI = (sizes_T1 * drawn(4, size)).half()
    narrow_TI, scale_T = kernels.quantize_rows_fp8(rows_TI)
    expected_TI, expected_T = plain.quantize_rows_fp8(rows_TI)
    assert narrow_TI.dtype == FP8
    assert_near(scale_T[:, None], expected_T[:, None], 1e-6)
    # Triton's interpreter loses the carry where rounding to float8 reaches the next power of two.
    assert_near(narrow_TI, expected_TI, 0.1 if INTERPRETED else 1e-3)
    assert torch.equal(narrow_TI[2].float(), torch.zeros(size, device=DEVICE))


def test_a_product_of_two_float8_matrices_is_the_plain_one() -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    sizes_T1 = torch.tensor([[1.0], [1e-3], [300.0]], device=DEVICE)
    rows_TI = (sizes_T1 * drawn(3, 64)).bfloat16()
    weight_OI, scale_O = quantized(32, 64, FP8)
    bias_O = drawn(32, dtype=torch.bfloat16)
    for bias in (None, bias_O):
        actual_TO = kernels.scaled_mm_linear(rows_TI, weight_OI, scale_O, bias)
        expected_TO = plain.linear_fp8(rows_TI, weight_OI, scale_O, bias)
        assert actual_TO.dtype == torch.bfloat16
        for actual, expected in zip(actual_TO, expected_TO, strict=True):
            assert_near(actual, expected, 0.1 if INTERPRETED else TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_step_without_rows_is_allowed(kind: str) -> None:
    weight_OI, scale_O = quantized(32, 64, torch.int8 if kind == "int8" else FP8)
    product = kernels.linear_int8 if kind == "int8" else kernels.linear_fp8
    assert product(drawn(0, 64), weight_OI, scale_O, None).shape == (0, 32)


# ---- which one is taken --------------------------------------------------------------------------


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A GPU whose compute capability is what the list holds."""
    held = [9, 0]
    cached = (kernels.max_streamed_rows, kernels.quantized_tuning, kernels._multiplies_fp8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: tuple(held))
    monkeypatch.setattr(kernels, "num_processors", lambda _: 132)
    monkeypatch.setattr(kernels, "has_async_copy", lambda _: tuple(held) >= (8, 0))
    for function in cached:
        function.cache_clear()
    yield held
    for function in cached:
        function.cache_clear()


def taken(
    monkeypatch: pytest.MonkeyPatch, kind: str, num_rows: int, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Which product is launched, on tensors that exist nowhere."""
    found: list[str] = []
    for name in ("launch_linear", "dequantized_linear", "scaled_mm_linear"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: found.append(name))
    for function in (kernels.max_streamed_rows, kernels._multiplies_fp8):
        function.cache_clear()
    gpu = torch.device("cuda")

    class OnGpu(torch.Tensor):
        device = gpu

    rows_TI = torch.empty(num_rows, 64, dtype=dtype, device="meta").as_subclass(OnGpu)
    weight_dtype = torch.int8 if kind == "int8" else FP8
    weight_OI = torch.empty(96, 64, dtype=weight_dtype, device="meta")
    product = kernels.linear_int8 if kind == "int8" else kernels.linear_fp8
    product(rows_TI, weight_OI, torch.empty(96, device="meta"), None)
    (name,) = found
    return name


def test_products_are_cut_to_fill_an_h100(capability: list[int]) -> None:
    gpu = torch.device("cuda")
    shapes = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    for num_rows, least_programs in ((1, 384), (32, 384), (64, 256), (128, 192), (512, 132)):
        for num_out, num_in in shapes:
            tuning = kernels.quantized_tuning(num_rows, num_out, num_in, gpu)
            tiles = -(-num_out // tuning.block_out) * -(-num_rows // tuning.block_rows)
            assert tiles * tuning.pieces >= least_programs, (num_rows, num_out, num_in)
            assert num_in // tuning.pieces >= 512
    capability[:] = [7, 5]  # no copies in the background, and a quarter of the shared memory
    kernels.quantized_tuning.cache_clear()
    tuning = kernels.quantized_tuning(32, 4096, 4096, gpu)
    assert (tuning.num_stages, tuning.block_rows, tuning.pieces) == (1, 16, 1)


def test_few_rows_stream_the_weight_and_many_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capability: list[int]
) -> None:
    most = kernels.max_streamed_rows(torch.bfloat16, torch.int8, torch.device("cuda"))
    assert taken(monkeypatch, "int8", 1) == taken(monkeypatch, "int8", most) == "launch_linear"
    assert taken(monkeypatch, "int8", most + 1) == "dequantized_linear"
    assert taken(monkeypatch, "int8", 1, torch.float32) == "dequantized_linear"
    assert taken(monkeypatch, "fp8", 2048) == "scaled_mm_linear"
    assert taken(monkeypatch, "fp8", 2048, torch.float16) == "dequantized_linear"
    capability[:] = [8, 9]
    assert taken(monkeypatch, "fp8", 1) == "launch_linear"
    assert taken(monkeypatch, "fp8", 64) == "scaled_mm_linear"
    capability[:] = [8, 0]
    assert taken(monkeypatch, "int8", 64) == "launch_linear"
    capability[:] = [7, 5]
    assert taken(monkeypatch, "int8", 32, torch.float16) == "launch_linear"
    assert taken(monkeypatch, "int8", 64, torch.float16) == "dequantized_linear"


# ---- without the GPU -----------------------------------------------------------------------------

PROGRAM = """
import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpipipe.models.kernels import quantized_linear as kernels
from mpipipe.models.kernels.linear import _linear_kernel

TYPES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.float16: "fp16",
         torch.bfloat16: "bf16"}


def compiled(function, pointers, constants, capability, warps):
    types, known, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        types[name] = pointers.get(name, "constexpr" if name in constants else "i32")
        if name in constants:
            known[(place,)] = constants[name]
        elif name != "num_rows":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=types, constexprs=known, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


# Not 80: the kernels do there what they do on 89, which has less.
for capability, limit, processors in ((75, 64 << 10, 40), (89, 99 << 10, 80), (90, 227 << 10, 132)):
    early = capability >= 90
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    known = (capability // 10, capability % 10)
    kernels.quantized_tuning.cache_clear()
    with (mock.patch.object(kernels, "num_processors", lambda _: processors),
          mock.patch.object(kernels, "has_async_copy", lambda _: capability >= 80),
          mock.patch.object(torch.cuda, "get_device_capability", lambda _=None: known)):
        gpu = torch.device("cuda")
        cases = {}  # by what makes a kernel of its own
        for weight, rows, outs in ((torch.int8, 4, 6144), (torch.int8, 32, 6144),
                                   (torch.int8, 32, 28672), (torch.int8, 64, 4096),
                                   (torch.int8, 64, 6144), (torch.int8, 128, 6144),
                                   (torch.int8, 512, 28672), (torch.float8_e4m3fn, 32, 6144)):
            if rows <= kernels.max_streamed_rows(dtype, weight, gpu):
                tuning = kernels.quantized_tuning(rows, outs, 4096, gpu)
                cases[tuning, rows > tuning.block_rows] = weight, rows, tuning
        for weight, rows, tuning in cases.values():
            block = min(max(triton.next_power_of_2(rows), tuning.least_rows), tuning.block_rows)
            pointer = "*" + TYPES[dtype]
            pointers = {"hidden_ptr": pointer, "weight_ptr": "*" + TYPES[weight],
                        "scale_ptr": "*fp32", "bias_ptr": pointer, "out_ptr": pointer,
                        "part_ptr": "*fp32", "counter_ptr": "*i32"}
            constants = dict(
                HAS_SCALE=True, HAS_BIAS=True, WHOLE=False, ROW_TILES=rows > block,
                PIECES=tuning.pieces, BLOCK_ROWS=block, BLOCK_OUT=tuning.block_out,
                BLOCK_IN=tuning.block_in, STAGES=tuning.num_stages, EARLY=early)
            made = compiled(_linear_kernel, pointers, constants, capability, tuning.num_warps)
            assert made.metadata.shared <= limit, (capability, weight, rows, made.metadata.shared)
            print(capability, TYPES[weight], rows, made.metadata.shared)
    pointers = {"weight_ptr": "*i8", "scale_ptr": "*fp32", "out_ptr": "*" + TYPES[dtype]}
    compiled(kernels._dequantize_kernel, pointers, {"EARLY": early, "BLOCK": 2048}, capability, 4)
    if capability == 90:
        pointers = {"rows_ptr": "*bf16", "narrow_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        tiny = torch.finfo(torch.float32).tiny
        constants = {"LARGEST": 448.0, "TINY": tiny, "EARLY": True, "BLOCK": 4096}
        compiled(kernels._quantize_rows_kernel, pointers, constants, capability, 8)
print("done")
"""


def test_the_kernels_compile_within_the_shared_memory_of_every_kind_of_gpu(tmp_path: Path) -> None:
    lines = output_of(PROGRAM, cache=tmp_path / "cache")
    assert {line.split()[0] for line in lines} == {"75", "89", "90"}
