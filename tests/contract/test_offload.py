"""Weights that do not stay on the device: whatever stands where, the tokens are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mpipipe.clock import MonotonicClock
from mpipipe.errors import EnvironmentSetupError
from mpipipe.kv_cache.base import KVCache
from mpipipe.metrics.boot import BootTimeline
from mpipipe.models.adapter import StageModel
from mpipipe.models.fused_cpu import FusedLayer, fuse_layers
from mpipipe.models.operations import torch_operations
from mpipipe.models.prepacked_linear import PrepackedLinear
from mpipipe.models.row_major_linear import RowMajorLinear
from mpipipe.models.streaming import StreamedWeights
from mpipipe.planning.plan import StageOffload, StagePlan
from mpipipe.runtime.loading import load_parts
from mpipipe.stage.cuda_graph_runner import CudaGraphRunner
from mpipipe.types import QuantizeName, SamplingParams, Tier, WeightsSource
from mpipipe.weights.layer_layout import ALIGNMENT
from tests.contract.engine_pipeline import EnginePipeline, engine_plan, make_requests
from tests.contract.tiny_models import (
    NUM_LAYERS,
    InProcessPipeline,
    Offloading,
    TinyModel,
    load_stage,
    paged_cache,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2), (4,))
ALL = tuple(range(NUM_LAYERS))


@pytest.fixture
def offloading(tmp_path: Path) -> Iterator[Offloading]:
    opened = Offloading(tmp_path)
    yield opened
    opened.close()


def offloaded_stage(plan: StagePlan, offload: StageOffload) -> StagePlan:
    """`plan` with its part of `offload`."""
    own = range(plan.first_layer, plan.last_layer)
    host = tuple(number for number in offload.host_layers if number in own)
    disk = tuple(number for number in offload.disk_layers if number in own)
    return replace(plan, offload=replace(offload, host_layers=host, disk_layers=disk))


def stages(
    model: TinyModel,
    offload: StageOffload | None,
    offloading: Offloading,
    mode: str,
    number: int,
    quantize: QuantizeName = "none",
) -> list[StageModel]:
    """All of `number` stages; each takes of `offload` what it has."""
    loaded = []
    for whole in split(number):
        plan = whole if offload is None else offloaded_stage(whole, offload)
        cache: KVCache | None = None
        operations = None
        if mode == "fast":
            cache = paged_cache(model.reference.config, plan.num_layers)
            operations = torch_operations()
        loaded.append(
            load_stage(
                model.folder,
                plan,
                mode=mode,
                cache=cache,
                operations=operations,
                offloading=None if offload is None else offloading,
                quantize=quantize,
            )
        )
    return loaded


def large_head(folder: Path) -> TinyModel:
    """A model whose head is larger than several layers."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return TinyModel(folder, model)


PLACEMENTS = {
    "one on disk": StageOffload(disk_layers=(1,)),
    "two on disk": StageOffload(disk_layers=(1, 3)),
    "three on disk": StageOffload(disk_layers=(0, 1, 3)),
    "three on disk, three buffers": StageOffload(disk_layers=(0, 2, 3), num_buffers=3),
    "all on disk": StageOffload(disk_layers=ALL),
    "all on disk, three buffers": StageOffload(disk_layers=ALL, num_buffers=3),
    "all on disk, one buffer": StageOffload(disk_layers=ALL, num_buffers=1),
    "all in host memory": StageOffload(host_layers=ALL),
    "host and disk in turn": StageOffload(host_layers=(0, 2), disk_layers=(1, 3), num_buffers=3),
    "embedding on disk": StageOffload(embedding="disk"),
    "embedding in host memory": StageOffload(embedding="host"),
    "head on disk": StageOffload(head="disk"),
    "head in host memory": StageOffload(head="host", num_buffers=3),
    "everything on disk": StageOffload(disk_layers=ALL, embedding="disk", head="disk"),
    "everything on disk, one buffer": StageOffload(
        disk_layers=ALL, embedding="disk", head="disk", num_buffers=1
    ),
    "one layer and the head": StageOffload(disk_layers=(3,), head="disk"),
    "everything, three buffers": StageOffload(
        host_layers=(1,), disk_layers=(0, 2, 3), embedding="host", head="disk", num_buffers=3
    ),
}


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_are_the_same_wherever_weights_stand(
    placement: str, mode: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model = tiny("llama")
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    for number in (1, 3):
        loaded = stages(model, PLACEMENTS[placement], offloading, mode, number)
        assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


@pytest.mark.parametrize("tiers", [("disk", "disk"), ("host", "disk"), ("device", "disk")])
@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
def test_a_head_that_is_tied_stands_with_the_embedding(
    mode: str,
    tiers: tuple[Tier, Tier],
    tiny: Callable[[str], TinyModel],
    offloading: Offloading,
) -> None:
    model = tiny("llama-tied")
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    offload = StageOffload(disk_layers=(2,), embedding=tiers[0], head=tiers[1])
    for number in (1, 2):
        loaded = stages(model, offload, offloading, mode, number)
        assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma2", "qwen2", "qwen3", "mixtral"])
def test_other_families_stream_too(
    family: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model = tiny(family)
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    offload = StageOffload(disk_layers=ALL, embedding="disk", head="disk")
    loaded = stages(model, offload, offloading, "packed", 2)
    assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_weights_in_8_bits_stream_as_they_are(
    quantize: QuantizeName, mode: str, tmp_path: Path, offloading: Offloading
) -> None:
    """Layers and head, weights and scales, in blocks: the tokens of the same weights resident."""
    model = large_head(tmp_path / "model")
    resident = stages(model, None, offloading, mode, 1, quantize)
    wanted = InProcessPipeline(resident).generate(PROMPTS, 8, chunk=4)
    offload = StageOffload(host_layers=(1,), disk_layers=(0, 2, 3), embedding="disk", head="disk")
    loaded = stages(model, offload, offloading, mode, 1, quantize)
    assert len(loaded[0]._streamed.head_blocks) > 2
    assert all("scale" in block for block in loaded[0]._streamed.head_blocks)
    assert InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4) == wanted


# ---- what is read, and when ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["packed", "fast"])
@pytest.mark.parametrize("num_buffers", [2, 3])
def test_a_head_larger_than_a_buffer_comes_in_blocks(
    num_buffers: int, mode: str, tmp_path: Path, offloading: Offloading
) -> None:
    model = large_head(tmp_path / "model")
    wanted = [model.greedy(prompt, 8) for prompt in PROMPTS]
    offload = StageOffload(disk_layers=(0, 2), head="disk", num_buffers=num_buffers)
    loaded = stages(model, offload, offloading, mode, 1)
    pipeline = InProcessPipeline(loaded)
    assert len(loaded[0]._streamed.head_blocks) > num_buffers
    assert pipeline.generate(PROMPTS, 8, chunk=4) == wanted
    # A step without logits leaves the head unused; the next one has it.
    pipeline.step([(7, PROMPTS[1], 0)], sample=False)
    logits = pipeline.step([(8, PROMPTS[1], 0)])
    assert int(logits.argmax()) == wanted[1][0]


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
def test_each_step_reads_what_it_streams_once(
    mode: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    """However many sequences and tokens it has: the bytes are those of the layers on disk."""
    model = tiny("llama")
    offload = StageOffload(disk_layers=(0, 1, 2, 3))
    loaded = stages(model, offload, offloading, mode, 1)
    (offloaded,) = offloading.opened
    layer_bytes = sum(tensor.nbytes for tensor in model.reference.model.layers[0].parameters())
    per_step = offloaded.use().bytes_per_step
    assert 4 * layer_bytes <= per_step < 4 * (layer_bytes + 2 * ALIGNMENT)
    pipeline = InProcessPipeline(loaded)
    before = offloaded.use().disk_bytes
    for number in range(5):
        pipeline.step([(10 * number + n, prompt, 0) for n, prompt in enumerate(PROMPTS)])
    offloading.opened.clear()
    offloaded.close()  # what is on its way has come, or will not
    # Two buffers are filled ahead at most, before and behind the five steps.
    assert abs(offloaded.use().disk_bytes - before - 5 * per_step) <= per_step / 2


def test_the_merged_projections_of_a_streamed_layer_are_views_of_its_buffer(
    tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    for family in ("llama", "qwen2"):  # qwen2 has biases
        offload = StageOffload(host_layers=(1, 2))
        (stage,) = stages(tiny(family), offload, offloading, "fast", 1)
        buffers = {b.untyped_storage().data_ptr() for b in offloading.opened[-1]._buffers}
        assert stage._fused is not None
        for number, layer in enumerate(stage._fused.layers):
            merged = [layer.qkv, layer.gate_up, layer.output, layer.down]
            tensors = [m.tensors.weight_OI for m in merged] + [
                m.tensors.bias_O for m in merged if m.tensors.bias_O is not None
            ]
            inside = {t.untyped_storage().data_ptr() in buffers for t in tensors}
            assert inside == {number in {1, 2}}


def test_a_file_that_ends_early_ends_the_step_with_a_sentence(
    tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    loaded = stages(tiny("llama"), StageOffload(disk_layers=ALL), offloading, "packed", 1)
    file = offloading.opened[0]._file
    assert file is not None
    os.ftruncate(file._descriptor, 0)
    with pytest.raises(EnvironmentSetupError, match="bytes too early"):
        InProcessPipeline(loaded).generate(PROMPTS, 8, chunk=4)


def test_file_and_pinned_memory_are_let_go_of_whatever_the_carrier_does(
    tiny: Callable[[str], TinyModel], offloading: Offloading, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages(tiny("llama"), StageOffload(disk_layers=ALL), offloading, "packed", 1)
    offloaded, closed = offloading.opened[0], list[str]()
    assert offloaded._file is not None
    assert offloaded._carrier is not None
    end = offloaded._carrier.close

    def fail() -> bool:
        raise RuntimeError("the GPU is lost")

    monkeypatch.setattr(offloaded._carrier, "close", fail)
    monkeypatch.setattr(offloaded._pinned, "close", lambda: closed.append("pinned"))
    with pytest.raises(RuntimeError, match="the GPU is lost"):
        offloaded.close()
    assert offloaded._file._descriptor == -1
    assert closed == ["pinned"]
    monkeypatch.undo()
    end()


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_a_stage_is_loaded_as_its_plan_says(
    weights: WeightsSource, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """On the way that ranks take; what is held is less by what stands elsewhere."""
    model = tiny("llama")
    plan = replace(engine_plan(1), model_path=str(model.folder), weights=weights)
    offload = StageOffload(disk_layers=(0, 1, 3), embedding="disk", head="disk")
    streaming = replace(
        plan,
        stages=(replace(plan.stages[0], offload=offload),),
        offload_dir=str(tmp_path),
    )
    outputs, held = [], []
    for each in (plan, streaming):
        boot = BootTimeline(MonotonicClock())
        parts = load_parts(each, each.stages[0], False, torch.device("cpu"), boot)
        with closing(parts):
            outputs.append(InProcessPipeline([parts.model]).generate(PROMPTS, 8, chunk=4))
            held.append(parts.weight_bytes)
            use = parts.offload_use()
            assert (use is not None) == (each is streaming)
    assert outputs[0] == outputs[1]
    assert use is not None
    assert use.disk_bytes > use.bytes_per_step > 0
    layer_bytes = sum(tensor.nbytes for tensor in model.reference.model.layers[0].parameters())
    ends_bytes = 2 * model.reference.lm_head.weight.nbytes
    spared = held[0] - held[1] - (layer_bytes + ends_bytes)  # three layers away, two buffers
    assert abs(spared) <= 4 * ALIGNMENT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("reason", "expected"), [("", True), ("experts are routed", False)])
def test_copies_end_with_steps_only_where_the_stage_takes_graphs(
    reason: str,
    expected: bool,
    tiny: Callable[[str], TinyModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = replace(engine_plan(1, graphs=True), model_path=str(tiny("llama").folder))
    stage = replace(plan.stages[0], offload=StageOffload(host_layers=(1,)))
    monkeypatch.setattr(StageModel, "graphs_unsupported_reason", lambda _: reason)
    boot = BootTimeline(MonotonicClock())
    with closing(load_parts(plan, stage, False, torch.device("cpu"), boot)) as parts:
        assert parts.offloaded is not None
        assert parts.offloaded._use_graphs == expected


def test_a_stage_that_cannot_be_offloaded_lets_go_of_everything(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    plan = replace(engine_plan(1), model_path=str(tiny("llama").folder), offload_dir="/nowhere")
    stage = replace(plan.stages[0], offload=StageOffload(disk_layers=(1,)))
    boot = BootTimeline(MonotonicClock())
    with pytest.raises(EnvironmentSetupError, match="can be made in /nowhere"):
        load_parts(plan, stage, False, torch.device("cpu"), boot)


@pytest.mark.parametrize("mode", ["varlen", "tensors", "replayed"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt"])
def test_engines_that_run_ahead_stream_too(
    family: str, mode: str, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model = tiny(family)
    requests = make_requests((5, 11, 3, 18, 7), lambda n: SamplingParams(max_new_tokens=6 + n))
    plan = engine_plan(2)
    resident = EnginePipeline(model, plan, mode).prepare().generate(requests)
    offload = StageOffload(host_layers=(1,), disk_layers=(0, 2, 3), embedding="host", head="host")
    streaming = replace(
        plan, stages=tuple(offloaded_stage(stage, offload) for stage in plan.stages)
    )
    pipeline = EnginePipeline(model, streaming, mode, offloading=offloading).prepare()
    assert pipeline.generate(requests) == resident


@pytest.mark.parametrize(("reads_disk", "num_passes"), [(False, 4), (True, 2)])
def test_a_stage_on_a_disk_is_ready_after_two_passes_over_its_weights(
    reads_disk: bool,
    num_passes: int,
    tiny: Callable[[str], TinyModel],
    offloading: Offloading,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest steps: others would each read all of the disk again."""
    passes: list[int] = []
    monkeypatch.setattr(CudaGraphRunner, "_work", counting(CudaGraphRunner._work, passes))
    monkeypatch.setattr(StageModel, "forward", counting(StageModel.forward, passes))
    plan = engine_plan(1)
    if reads_disk:
        stage = offloaded_stage(plan.stages[0], StageOffload(disk_layers=(0, 2, 3)))
        plan = replace(plan, stages=(stage,))
    EnginePipeline(tiny("llama"), plan, "tensors", offloading=offloading).prepare()
    assert len(passes) == num_passes


def counting(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(len(calls))
        return function(*arguments)

    return counted


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_streamed_layers_on_a_cpu_are_fused_without_memory_of_their_own(
    family: str, quantize: QuantizeName, tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    model, offload = tiny(family), StageOffload(disk_layers=(0, 1, 3), head="disk")
    (plain,) = stages(model, offload, offloading, "plain", 1, quantize)
    (packed,) = stages(model, offload, offloading, "packed", 1, quantize)
    for layer in packed.module.model.layers:
        assert isinstance(layer, FusedLayer)
    if quantize == "none":
        for block in packed.module.lm_head.blocks:
            assert isinstance(block, RowMajorLinear)
    storages = {
        layer.input_norm.weight.untyped_storage().data_ptr()
        for layer in (packed.module.model.layers[number] for number in offload.disk_layers)
    }
    assert len(storages) == offload.num_buffers
    for number in offload.disk_layers:
        layer = packed.module.model.layers[number]
        for product in (layer.qkv, layer.output, layer.gate_up, layer.down):
            weight = product.weight if quantize == "int8" else product._weight_OI
            assert weight.untyped_storage().data_ptr() in storages
    for chunk in (1, 3, 20):  # rows of a step: each way to compute a product
        prompt = tuple(range(3, 3 + chunk))
        expected, found = (
            InProcessPipeline([stage]).step([(chunk, prompt, 0)]) for stage in (plain, packed)
        )
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_streamed_layer_that_would_have_to_be_copied_to_be_merged_stays_plain(
    tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """A copy would show the weights of the moment, whatever comes into the buffer later."""
    (stage,) = stages(tiny("llama"), None, Offloading(tmp_path), "plain", 1)
    layers = stage.module.model.layers
    fuse_layers(layers, stage._context, stage._options, StreamedWeights(layers=frozenset({1})))
    assert [isinstance(layer, FusedLayer) for layer in layers] == [True, False, True, True]


def test_a_tied_head_is_not_packed_where_memory_is_short(
    tiny: Callable[[str], TinyModel], offloading: Offloading
) -> None:
    """Its packed form would be a second copy, which no plan has reckoned with."""
    model = tiny("llama-tied")
    (whole,) = stages(model, None, offloading, "packed", 1)
    assert isinstance(whole.module.lm_head, PrepackedLinear)
    (short,) = stages(model, StageOffload(disk_layers=(0, 1, 2)), offloading, "packed", 1)
    assert isinstance(short.module.lm_head, RowMajorLinear)
    embedding = short.module.model.embed_tokens.weight
    assert short.module.lm_head._weight_OI.data_ptr() == embedding.data_ptr()
    (_, last) = stages(model, StageOffload(disk_layers=(1, 2, 3)), offloading, "packed", 2)
    assert isinstance(last.module.lm_head, PrepackedLinear), "it is alone on its stage"
