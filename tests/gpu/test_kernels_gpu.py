"""Kernels that are launched early wait for their inputs (Hopper and later)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA wheels")

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
