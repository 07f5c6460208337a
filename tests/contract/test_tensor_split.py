"""A stage split over lanes computes what the whole one does, and holds its part only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import UnsupportedModelError
from mpipipe.models.adapter import StageModel
from mpipipe.models.operations import torch_operations
from mpipipe.models.prepacked_linear import PrepackedLinear
from mpipipe.models.quantized_linear import quantized_linears
from mpipipe.planning.plan import StageOffload
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.types import QuantizeName
from tests.contract import tiny_models
from tests.contract.lane_threads import ThreadLanes, on_lanes
from tests.contract.test_prequantized import FORMS, write
from tests.contract.tiny_models import (
    NUM_LAYERS,
    InProcessPipeline,
    Offloading,
    TinyModel,
    load_stage,
    paged_cache,
    save_tiny,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2))
NUM_TOKENS = 6
# One of each way to lay a layer out; in transformers' plans and by hand.
SPLIT = [
    "llama", "llama-tied", "qwen2", "qwen3", "gemma2", "mistral", "opt", "gpt_neox", "phi"
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def with_even_vocabulary(name: str, folder: Path) -> TinyModel:
    """The family `name` with a vocabulary that lanes divide, and so the LM head."""
    kind, settings = tiny_models.FAMILIES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.FAMILIES, "even", (kind, {**settings, "vocab_size": 100}))
        return save_tiny("even", folder)


def stages(
    model: TinyModel,
    lanes: ThreadLanes,
    num_stages: int = 1,
    mode: str = "plain",
    *,
    folder: Path | None = None,
    quantize: QuantizeName = "none",
) -> list[StageModel]:
    return [
        load_stage(
            folder or model.folder,
            plan,
            mode=mode,
            operations=torch_operations(),
            cache=paged_cache(model.reference.config, plan.num_layers, num_lanes=lanes.num_lanes),
            quantize=quantize,
            lanes=lanes,
        )
        for plan in split(num_stages)
    ]


def generated(
    model: TinyModel,
    num_lanes: int,
    *,
    num_stages: int = 1,
    mode: str = "plain",
    folder: Path | None = None,
    quantize: QuantizeName = "none",
) -> list[list[list[int]]]:
    """By lane, the tokens of each prompt."""

    def body(lanes: ThreadLanes) -> list[list[int]]:
        loaded = stages(model, lanes, num_stages, mode, folder=folder, quantize=quantize)
        return InProcessPipeline(loaded).generate(PROMPTS, NUM_TOKENS, chunk=4)

    return on_lanes(num_lanes, body)


def greedy(model: TinyModel) -> list[list[int]]:
    return [model.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("name", SPLIT)
def test_two_lanes_choose_the_tokens_of_transformers(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    assert generated(model, 2) == [greedy(model)] * 2


@pytest.mark.parametrize("mode", ["packed", "fast"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_two_lanes_of_the_fused_forms_over_two_stages_do_too(
    name: str, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    assert generated(model, 2, num_stages=2, mode=mode) == [greedy(model)] * 2


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
@pytest.mark.parametrize(("name", "num_stages"), [("llama", 1), ("llama-tied", 1), ("llama", 2)])
def test_a_head_is_split_by_vocabulary_and_gathered(
    name: str, num_stages: int, mode: str, tmp_path: Path
) -> None:
    model = with_even_vocabulary(name, tmp_path)
    assert generated(model, 2, num_stages=num_stages, mode=mode) == [greedy(model)] * 2


def test_four_lanes_of_a_model_with_four_kv_heads(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("opt")
    assert generated(model, 4, mode="packed") == [greedy(model)] * 4


def test_a_lane_holds_its_part_of_every_matrix(tmp_path: Path) -> None:
    model = with_even_vocabulary("qwen2", tmp_path)
    whole = model.reference.state_dict()

    def body(lanes: ThreadLanes) -> dict[str, torch.Tensor]:
        (stage,) = stages(model, lanes)
        return dict(stage.module.state_dict())

    first, second = on_lanes(2, body)
    layer = "model.layers.1."
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
        parts = [lane[f"{layer}{name}.weight"] for lane in (first, second)]
        assert torch.equal(torch.cat(parts), whole[f"{layer}{name}.weight"]), name
    biases = [lane[f"{layer}self_attn.q_proj.bias"] for lane in (first, second)]
    assert torch.equal(torch.cat(biases), whole[f"{layer}self_attn.q_proj.bias"])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        parts = [lane[f"{layer}{name}.weight"] for lane in (first, second)]
        assert torch.equal(torch.cat(parts, dim=1), whole[f"{layer}{name}.weight"]), name
    heads = [lane["lm_head.weight"] for lane in (first, second)]
    assert torch.equal(torch.cat(heads), whole["lm_head.weight"])
    for name in ("model.embed_tokens.weight", f"{layer}input_layernorm.weight"):
        assert torch.equal(first[name], whole[name])
        assert torch.equal(second[name], whole[name])


def test_a_tied_head_is_a_view_of_the_embedding(tmp_path: Path) -> None:
    model = with_even_vocabulary("llama-tied", tmp_path)

    def body(lanes: ThreadLanes) -> bool:
        (stage,) = stages(model, lanes)
        embedding, head = stage.module.model.embed_tokens.weight, stage.module.lm_head.weight
        assert head.shape[0] * 2 == embedding.shape[0]
        return bool(head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr())

    assert on_lanes(2, body) == [True, True]


def test_a_bias_behind_a_sum_is_on_the_first_lane_alone(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("opt")

    def body(lanes: ThreadLanes) -> bool:
        (stage,) = stages(model, lanes)
        return any(name.endswith("out_proj.bias") for name in stage.module.state_dict())

    assert on_lanes(2, body) == [True, False]


def test_packed_lanes_are_fused_layers_of_packed_parts(tiny: Callable[[str], TinyModel]) -> None:
    def body(lanes: ThreadLanes) -> bool:
        (stage,) = stages(tiny("llama"), lanes, mode="packed")
        layer = stage.module.model.layers[0]
        return isinstance(layer.output, PrepackedLinear) and type(layer).__name__ == "FusedLayer"

    assert on_lanes(2, body) == [True, True]


# ---- 8 bits, offload -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "packed", "fast"])
def test_lanes_in_int8_stay_near_the_whole_stage_in_int8(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    """Each lane scales the rows of its own columns, so it rounds no more coarsely."""
    model = tiny("llama")

    def logits(num_lanes: int, quantize: QuantizeName) -> torch.Tensor:
        def body(lanes: ThreadLanes) -> torch.Tensor:
            (stage,) = stages(model, lanes, mode=mode, quantize=quantize)
            if mode == "plain" and quantize == "int8":
                assert len(list(quantized_linears(stage.module))) == 7 * NUM_LAYERS + 1
            pipeline = InProcessPipeline([stage])
            return pipeline.step([(0, PROMPTS[0], 0), (1, PROMPTS[1], 0)])

        return on_lanes(num_lanes, body)[-1]

    exact_SV, alone_SV, lanes_SV = logits(1, "none"), logits(1, "int8"), logits(2, "int8")
    alone_error = float((alone_SV - exact_SV).norm() / exact_SV.norm())
    lanes_error = float((lanes_SV - exact_SV).norm() / exact_SV.norm())
    assert 0 < lanes_error <= 1.5 * alone_error


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_8_bits_is_cut_after_it_is_unpacked(
    form: str, tiny: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    exact = write(tiny("llama"), form, tmp_path)
    scheme = FORMS[form][2]
    alone = generated(exact, 1, folder=tmp_path, quantize=scheme)
    both = generated(exact, 2, folder=tmp_path, quantize=scheme)
    if scheme == "int8":  # rows in fp8 are scaled by what a lane has of them
        assert both == alone * 2
    assert both[0] == both[1]


@pytest.mark.parametrize("mode", ["packed", "fast"])
def test_lanes_bring_their_parts_from_host_and_disk(mode: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = with_even_vocabulary("llama", tmp_path / "model")
    offload = StageOffload(host_layers=(0,), disk_layers=(1, 3), embedding="disk", head="disk")
    plan = replace(split(1)[0], offload=offload)

    def body(lanes: ThreadLanes) -> list[list[int]]:
        folder = tmp_path / f"lane-{lanes.lane}"
        folder.mkdir()
        with closing(Offloading(folder)) as offloading:
            stage = load_stage(
                model.folder,
                plan,
                mode=mode,
                operations=torch_operations(),
                cache=paged_cache(model.reference.config, NUM_LAYERS, num_lanes=2),
                offloading=offloading,
                lanes=lanes,
            )
            return InProcessPipeline([stage]).generate(PROMPTS, NUM_TOKENS, chunk=4)

    assert on_lanes(2, body) == [greedy(model)] * 2


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_lanes", "why"),
    [
        ("phi3", 2, r'splits "self_attn\.qkv_proj" as "colwise_gather_output", which is not done'),
        ("olmo2", 2, r'splits "self_attn\.[qkv]_proj" as "colwise_gather_output"'),
        ("mixtral", 2, "experts"),
        ("cohere", 2, "trial step"),
        ("opt", 3, '"fc1" has 80 rows, which 3 lanes do not divide'),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(
    name: str, num_lanes: int, why: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match=why) as raised:
        generated(model, num_lanes)
    assert model.reference.config.model_type in str(raised.value)
    assert "pipeline.tensor_parallel = 1" in str(raised.value)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_the_plan_refuses_the_families_that_loading_refuses(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    assert _is_refused(lambda: lane_spec(read_spec(model.folder), 2)) == _is_refused(
        lambda: on_lanes(2, lambda lanes: stages(model, lanes))
    )


def _is_refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except UnsupportedModelError:
        return True
    return False
