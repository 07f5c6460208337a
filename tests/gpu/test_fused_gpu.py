"""The fused stack on a GPU: right, without a wait in decode steps, and the same in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.select import make_backend
from mpipipe.models.operations import Operations, torch_operations, triton_operations
from tests.contract.stage_steps import (
    run_tensor_decodes,
    run_varlen,
    stage_inputs,
    step_cache,
    tensor_layout,
)
from tests.contract.tiny_models import fill, modules_of_transformers, split
from tests.gpu.sized_models import FUSED, SIZED, SizedModel, save_sized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], SizedModel]:
    @cache
    def make(name: str, dtype: torch.dtype) -> SizedModel:
        return save_sized(name, tmp_path_factory.mktemp(name), dtype, "cpu")

    return make


def finished(
    model: SizedModel,
    number: int,
    mode: str,
    *,
    device: str = "cuda",
    dtype: torch.dtype | None = None,
    attention: str = "triton",
    operations: Operations | None = None,
) -> StageModel:
    """Stage `number` of two, with the head-major cache of `stage_steps`."""
    config = model.config
    with modules_of_transformers() if mode == "plain" else nullcontext():
        stage = build_stage_model(
            model.folder,
            split(2)[number],
            dtype=dtype or model.dtype,
            backend=make_backend(attention) if device == "cuda" else SdpaAttention(),
            max_sequence_tokens=64,
        )
    fill(stage, model.folder, device)
    heads = config.num_attention_heads
    pages = step_cache(
        stage,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        device=device,
    )
    stage.finish(pages, mode=mode, operations=operations)
    return stage


def error_of(outputs: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    ours, truth = torch.cat(outputs).float(), torch.cat(exact).float()
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_fused_stages_round_no_worse_than_plain_ones(
    name: str, number: int, dtype: torch.dtype, sized: Callable[[str, torch.dtype], SizedModel]
) -> None:
    model = sized(name, dtype)
    exact = run_varlen(finished(model, number, "plain", device="cpu", dtype=torch.float32))
    plain = error_of(run_varlen(finished(model, number, "plain", attention="sdpa")), exact)
    for operations in (torch_operations(), triton_operations()):
        fused = run_varlen(finished(model, number, "fast", operations=operations))
        assert error_of(fused, exact) <= 1.3 * plain + 1e-4, operations.name


@pytest.mark.parametrize("name", sorted(SIZED))
def test_decode_steps_wait_for_nothing_and_replay_as_a_graph(
    name: str, sized: Callable[[str, torch.dtype], SizedModel]
) -> None:
    for number in (0, 1):
        stage = finished(sized(name, torch.bfloat16), number, "auto")
        assert (stage.mode == "fast") == (name in FUSED)
        assert not stage.graphs_unsupported_reason()
        run_varlen(stage)
        eager = run_tensor_decodes(stage)
        check_no_wait(stage)
        check_graph(stage, eager)


def check_no_wait(stage: StageModel) -> None:
    inputs, layout = stage_inputs(stage, 3, 1), tensor_layout((8, 14, 0), "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.forward_decode(inputs, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph(stage: StageModel, eager: list[torch.Tensor]) -> None:
    """One capture, replayed for two steps of growing lengths."""
    inputs = torch.zeros_like(torch.cat([stage_inputs(stage, 2, 10)] * 2)[:3])
    # Not of length 0: such a row would write to the first page of a sequence.
    kept = tensor_layout((8, 14, 0), "cuda")
    lens_B = kept.kv_lens_B

    def work() -> torch.Tensor:
        from mpipipe.kv_cache.layout import decode_layout

        layout = decode_layout(kept.page_table_BP, lens_B, page_size=4, max_kv_len=kept.max_kv_len)
        return stage.forward_decode(inputs, layout)

    with torch.inference_mode():
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = work()
        for expected, seed, lens in zip(eager, (10, 11), ((8, 14, 0), (9, 15, 0)), strict=True):
            inputs[:2].copy_(stage_inputs(stage, 2, seed))
            lens_B.copy_(torch.tensor(lens, dtype=torch.int32))
            graph.replay()
            torch.testing.assert_close(output[:2].cpu(), expected, rtol=2e-2, atol=2e-2)


def test_finishing_leaves_no_garbage(sized: Callable[[str, torch.dtype], SizedModel]) -> None:
    model = sized("llama", torch.bfloat16)
    finished(model, 0, "auto")  # loads kernels and libraries
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    stage = finished(model, 0, "auto")
    config, cache = model.config, stage._context.cache
    assert cache is not None
    hidden, width = config.hidden_size, config.intermediate_size
    head = config.hidden_size // config.num_attention_heads
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    weights = 2 * (config.vocab_size * hidden + hidden * (qkv + hidden + 3 * width))
    used = torch.cuda.memory_allocated() - before
    assert used <= 1.1 * (weights + cache.num_bytes()) + (1 << 20)


def test_folders_are_not_needed_after_loading(
    tmp_path: Path, sized: Callable[[str, torch.dtype], SizedModel]
) -> None:
    stage = finished(sized("llama", torch.bfloat16), 1, "auto")
    assert stage.device.type == "cuda"
    assert run_varlen(stage)[0].dtype == torch.float32
    assert run_tensor_decodes(stage)[0].dtype == torch.bfloat16
