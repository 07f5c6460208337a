"""Kernels on a GPU: early launches wait for their inputs; CUDA graphs hold quantised products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA wheels")

from mpipipe.models.kernels import quantized_linear as kernels
from mpipipe.models.kernels.launch import launch_options
from mpipipe.models.kernels.linear import LinearTuning, small_linear
from mpipipe.models.kernels.rowwise import rms_norm
from tests.gpu.early_launch import early_launch

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(DEVICE)


def test_early_launches_read_nothing_stale() -> None:
    with early_launch(True):
        if not launch_options(DEVICE)["EARLY"]:
            pytest.skip("early launch needs compute capability 9.0")
    weights = [drawn(4096, 4096, seed=seed) / 64 for seed in range(4)]
    norm_H = torch.ones(4096, dtype=torch.bfloat16, device=DEVICE)
    tuning = LinearTuning(pieces=2)

    def chain(hidden_TH: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            for weight_HH in weights:
                hidden_TH = small_linear(
                    rms_norm(hidden_TH, norm_H, 1e-6), weight_HH, tuning=tuning
                )
        return hidden_TH

    static_TH = drawn(4, 4096)
    graph = torch.cuda.CUDAGraph()
    with early_launch(True):
        chain(static_TH)
        with torch.cuda.graph(graph):
            result_TH = chain(static_TH)
    for seed in range(5):
        static_TH.copy_(drawn(4, 4096, seed=seed))
        with early_launch(False):
            expected_TH = chain(static_TH)
        result_TH.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result_TH, expected_TH)


@pytest.mark.parametrize("num_rows", [1, 5, 32, 64, 100, 512, 513])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_products_are_the_plain_ones_from_a_graph_too(kind: str, num_rows: int) -> None:
    """Every way of the selection on this GPU, with shapes that fill no tile."""
    capability = torch.cuda.get_device_capability()
    if kind == "fp8" and capability < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    weight_OI = drawn(1552, 2064).float()
    largest = 127.0 if kind == "int8" else 448.0
    weight_OI *= largest / weight_OI.abs().amax()
    narrow_OI = weight_OI.round().to(torch.int8)
    if kind == "fp8":
        narrow_OI = weight_OI.to(torch.float8_e4m3fn)
    scale_O = torch.logspace(-4, -3, 1552, device=DEVICE)
    bias_O = drawn(1552).to(dtype)
    product = kernels.linear_int8 if kind == "int8" else kernels.linear_fp8
    static_TI = drawn(num_rows, 2064).to(dtype)
    product(static_TI, narrow_OI, scale_O, bias_O)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TO = product(static_TI, narrow_OI, scale_O, bias_O)
    for seed in (1, 2):
        static_TI.copy_(drawn(num_rows, 2064, seed=seed))
        out_TO.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out_TO, product(static_TI, narrow_OI, scale_O, bias_O))
        exact_TO = static_TI.float() @ (narrow_OI.float() * scale_O[:, None]).T + bias_O.float()
        error = (out_TO.float() - exact_TO).norm() / exact_TO.norm()
        assert error <= (1e-2 if kind == "int8" else 5e-2)
