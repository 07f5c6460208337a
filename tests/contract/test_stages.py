"""What a stage holds, what it refuses, and that its own checks can fail."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import NumericsError, UnsupportedModelError
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models import families, prepacked_linear, verification
from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.prepacked_linear import (
    BlockedLinear,
    HalfStoredLinear,
    PrepackedLinear,
    prepack,
    prepack_linears,
)
from mpipipe.types import QuantizeName
from tests.contract.tiny_models import (
    FAMILIES,
    NUM_LAYERS,
    InProcessPipeline,
    TinyModel,
    fill,
    load_stage,
    paged_cache,
    save_config,
    split,
)

PROMPTS = ((5, 9, 3), (7, 7, 20, 31, 8, 90, 41, 12, 60, 33, 2))


def build(folder: Path, num_stages: int = 1, stage: int = 0) -> StageModel:
    return build_stage_model(
        folder,
        split(num_stages)[stage],
        dtype=torch.float32,
        backend=SdpaAttention(),
        max_sequence_tokens=32,
    )


def saved_config(folder: Path, config: transformers.PretrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_every_stage_is_materialised_and_none_of_another_stage_is_there(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    full = model.reference.state_dict()
    seen: list[str] = []
    for plan in split(3):
        stage = load_stage(model.folder, plan, mode="plain")
        tensors = [*stage.module.named_parameters(), *stage.module.named_buffers()]
        assert [tensor_name for tensor_name, tensor in tensors if tensor.is_meta] == []
        wanted = stage.wanted_names()
        for own_name, canonical in wanted.items():
            own = stage.module.state_dict()[own_name]
            assert torch.equal(own, full[canonical]), canonical
        assert {own_name for own_name, _ in stage.module.named_parameters()} <= set(wanted)
        seen.extend(wanted.values())
    assert sorted(seen) == sorted(full)  # each name on exactly one stage, all of them
    assert stage.all_names == set(full)


def test_a_stage_in_the_middle_holds_its_layers_only(tiny: Callable[[str], TinyModel]) -> None:
    stage = build(tiny("llama").folder, num_stages=3, stage=1)
    layers = {canonical.split(".")[2] for canonical in stage.wanted_names().values()}
    assert layers == {"1"}
    assert all(canonical.startswith("model.layers.") for canonical in stage.wanted_names().values())


def test_tied_ends_on_one_stage_are_one_tensor_and_on_two_stages_are_two(
    tiny: Callable[[str], TinyModel],
) -> None:
    folder = tiny("llama-tied").folder
    alone = load_stage(folder, split(1)[0], mode="plain")
    assert alone.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert alone.module.lm_head.weight is alone.module.model.embed_tokens.weight
    first, last = (load_stage(folder, plan, mode="plain") for plan in split(2))
    assert "lm_head.weight" not in first.wanted_names()
    assert "model.embed_tokens.weight" not in last.wanted_names()
    assert torch.equal(first.module.model.embed_tokens.weight, last.module.lm_head.weight)


def test_building_takes_no_memory_for_weights(tiny: Callable[[str], TinyModel]) -> None:
    stage = build(tiny("llama").folder)
    assert all(parameter.is_meta for parameter in stage.module.parameters())


def test_names_of_older_checkpoints_are_translated(tiny: Callable[[str], TinyModel]) -> None:
    names = build(tiny("gpt_neox").folder).names
    assert names.canonical("embed_out.weight") == "lm_head.weight"
    assert names.canonical("layers.0.mlp.dense_h_to_4h.bias") == (
        "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"
    )
    assert names.canonical("something.else") == "something.else"


def test_a_stage_that_was_not_loaded_is_our_bug(tiny: Callable[[str], TinyModel]) -> None:
    with pytest.raises(AssertionError, match="not loaded: "):
        build(tiny("llama").folder).finish(ContiguousKVCache())


def test_no_sampled_row_gives_no_logits_but_fills_the_cache(
    tiny: Callable[[str], TinyModel],
) -> None:
    model = tiny("llama")
    pages = paged_cache(model.reference.config, NUM_LAYERS)
    stage = load_stage(model.folder, split(1)[0], cache=pages)
    wanted = InProcessPipeline([stage]).step([(0, PROMPTS[0], 0)])
    kept = [tensor.clone() for tensor in pages.keys]
    for tensor in pages.keys:
        tensor.zero_()
    logits = InProcessPipeline([stage]).step([(0, PROMPTS[0], 0)], sample=False)
    assert wanted.shape == (1, stage.vocab_size)
    assert logits.shape == (0, stage.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(kept, pages.keys, strict=True))


def test_the_reference_backend_generates_the_same(tiny: Callable[[str], TinyModel]) -> None:
    model = tiny("gemma2")
    stages = [load_stage(model.folder, plan, backend=ReferenceAttention()) for plan in split(2)]
    expected = [model.greedy(prompt, 5) for prompt in PROMPTS]
    assert InProcessPipeline(stages).generate(PROMPTS, 5, chunk=4) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "granite", "gpt_neox"])
def test_half_precision_hidden_states_and_logits_stay_near_float32(
    name: str, dtype: torch.dtype, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    stages = [load_stage(model.folder, plan, dtype=dtype) for plan in split(2)]
    pipeline = InProcessPipeline(stages)
    logits = pipeline.step([(0, PROMPTS[1], 0)])[0]
    (hidden,) = pipeline.hidden
    assert hidden.dtype == dtype
    assert hidden.shape == (len(PROMPTS[1]), stages[0].hidden_size)
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        expected = model.reference(torch.tensor([PROMPTS[1]])).logits[0, -1]
    error = torch.linalg.vector_norm(logits - expected) / torch.linalg.vector_norm(expected)
    assert error < (0.02 if dtype == torch.float16 else 0.12)


# --- packed weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 24), (3, 24), (1, 8, 24), (1, 200, 24), (1, 0, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", [BlockedLinear, HalfStoredLinear])
def test_a_packed_linear_computes_what_the_linear_does(
    shape: tuple[int, ...], bias: bool, form: type[BlockedLinear | HalfStoredLinear]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 37, bias=bias)
    linear.weight.data = linear.weight.data.half().float()
    packed = form(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
    rows, residual = torch.randn(shape), torch.randn(*shape[:-1], 37)
    with torch.inference_mode():
        expected = linear(rows)
        torch.testing.assert_close(packed(rows), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            packed.plus(rows, residual), expected + residual, rtol=1e-5, atol=1e-6
        )


def test_only_weights_that_half_precision_holds_exactly_are_stored_in_it() -> None:
    torch.manual_seed(0)
    exact = torch.randn(8, 8).half().float()
    assert isinstance(prepack(exact, None), HalfStoredLinear)
    for changed in (exact + 2.0**-20, exact * 2.0**40, exact * 2.0**-20):
        assert isinstance(prepack(changed, None), BlockedLinear)


def test_weights_in_bfloat16_are_packed_where_the_processor_can_and_else_left() -> None:
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    model = nn.Sequential(linear)
    prepack_linears(model)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(model[0], BlockedLinear)
    else:
        assert model[0] is linear


def test_packing_frees_the_plain_weights_but_keeps_the_embedding(
    tiny: Callable[[str], TinyModel],
) -> None:
    stage = load_stage(tiny("llama-tied").folder, split(1)[0], mode="packed")
    assert isinstance(stage.module.lm_head, PrepackedLinear)
    assert not any(type(module) is nn.Linear for module in stage.module.modules())
    left = {name for name, _ in stage.module.named_parameters()}
    assert "model.embed_tokens.weight" in left
    assert not any(name.endswith("proj.weight") for name in left)


def test_packing_frees_each_plain_weight_before_the_next_is_packed(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = loaded(tiny("olmo2"), 2, 1)  # a family without a fused layer
    weights = [
        weakref.ref(module.weight)
        for module in stage.module.modules()
        if isinstance(module, nn.Linear)
    ]
    alive: list[int] = []

    def counting(weight: torch.Tensor, bias: torch.Tensor | None) -> PrepackedLinear:
        alive.append(sum(weight() is not None for weight in weights))
        return prepack(weight, bias)

    monkeypatch.setattr(prepacked_linear, "prepack", counting)
    stage.finish(ContiguousKVCache())
    assert alive == list(range(len(weights), 0, -1))


def test_packed_and_plain_stages_give_the_same_tokens(tiny: Callable[[str], TinyModel]) -> None:
    folder = tiny("llama").folder
    packed, plain = (
        InProcessPipeline([load_stage(folder, plan, mode=mode) for plan in split(2)])
        for mode in ("packed", "plain")
    )
    assert packed.generate(PROMPTS, 6, chunk=4) == plain.generate(PROMPTS, 6, chunk=4)


def test_without_the_kernel_linears_stay_plain(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    stage = load_stage(tiny("llama").folder, split(1)[0], mode="packed")
    assert not any(isinstance(module, PrepackedLinear) for module in stage.module.modules())


# --- what is refused --------------------------------------------------------------------------

REFUSED = {
    "t5": (transformers.T5Config(), "encoder"),
    "gpt2": (transformers.GPT2Config(), "declares no base_model_pp_plan"),
    "mamba": (transformers.MambaConfig(), "declares no base_model_pp_plan"),
    "gemma3": (transformers.Gemma3Config(), "multi-modal"),
    "qwen3_next": (transformers.Qwen3NextConfig(), "linear_attention"),
    "minimax": (transformers.MiniMaxConfig(), "linear_attention"),
    "gemma3n_text": (transformers.Gemma3nTextConfig(), "token ids into every layer"),
    "llama": (transformers.LlamaConfig(is_causal=False), "see later ones"),
}


@pytest.mark.parametrize(("model_type", "case"), REFUSED.items(), ids=REFUSED.keys())
def test_a_family_that_cannot_be_split_is_refused_before_anything_is_built(
    model_type: str, case: tuple[transformers.PretrainedConfig, str], tmp_path: Path
) -> None:
    config, reason = case
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        build(saved_config(tmp_path, config))
    assert f'"{model_type}"' in str(error.value)
    assert "Supported are" in str(error.value)


# Without `gemma4_assistant`, whose configuration refuses its own defaults (transformers 5.23).
EVERY_FAMILY = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "t5", "bart"} - {"gemma4_assistant"}


@pytest.mark.parametrize("model_type", sorted(EVERY_FAMILY))
def test_every_family_of_transformers_is_planned_or_refused_for_what_it_is(
    model_type: str, tmp_path: Path
) -> None:
    """Whatever a family calls its sizes, it is no incomplete file that keeps it from running."""
    config = transformers.AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)
    why = ""
    try:
        assert read_spec(tmp_path).num_layers > 0
        families.check_config(config)
    except UnsupportedModelError as error:
        why = str(error)
    assert not why or f'"{config.model_type}' in why


def test_what_transformers_cannot_build_is_one_sentence(tmp_path: Path) -> None:
    config = transformers.MinistralConfig(**FAMILIES["ministral"][1])
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": "ten thousand"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"transformers (cannot build|does not know)"):
        build(tmp_path)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UnsupportedModelError, match="nonesuch"):
        build(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        build(saved_config(tmp_path, config))


# --- the safety net can catch something -------------------------------------------------------


def loaded(model: TinyModel, num_stages: int, stage: int) -> StageModel:
    """Loaded, but not finished: the test breaks it first."""
    loaded_stage = build(model.folder, num_stages, stage)
    fill(loaded_stage, model.folder)
    return loaded_stage


@pytest.mark.parametrize(
    ("config_class", "settings", "reason"),
    [
        ("LlamaConfig", {"sliding_window": 4}, "hides its sliding window"),
        ("MistralConfig", {"sliding_window": 0}, "window of 0 tokens"),
    ],
)
def test_windows_that_the_layers_do_not_compute_are_refused(
    config_class: str, settings: dict[str, int], reason: str, tmp_path: Path
) -> None:
    """Transformers' cache drops keys beyond a window of Llama, which its layers do not have."""
    model = save_config(config_class, {**FAMILIES["llama"][1], **settings}, tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_stage(model.folder, split(1)[0])


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    config = transformers.GraniteSWAConfig(**{**FAMILIES["llama"][1], "sliding_window": 4})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        load_stage(tmp_path, split(1)[0])


def test_an_embedding_scale_applied_again_is_caught(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(families._LATER_STAGE_CHANGES, "granite")
    load_stage(tiny("granite").folder, split(2)[0])  # the first stage is not concerned
    with pytest.raises(UnsupportedModelError, match="changes its embeddings"):
        load_stage(tiny("granite").folder, split(2)[1])


class MixesNeighbours(nn.Module):
    """As a convolution or a recurrence over the tokens of a step would."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.cumsum(dim=1)


def test_a_layer_that_mixes_the_tokens_of_a_step_is_caught(
    tiny: Callable[[str], TinyModel],
) -> None:
    stage = loaded(tiny("llama"), 2, 1)
    stage.module.model.layers[0].mlp = MixesNeighbours()
    with pytest.raises(UnsupportedModelError, match="keeps something between steps"):
        stage.finish(ContiguousKVCache())


class Jitter(nn.Module):
    """As rounding to float8 does that falls to the other side: a few percent, by where a row is."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 0.05 * torch.arange(hidden.shape[1])[:, None])


@pytest.mark.parametrize(
    ("quantize", "mlp", "refused"),
    [("none", Jitter(), True), ("fp8", Jitter(), False), ("fp8", MixesNeighbours(), True)],
)
def test_rounding_to_float8_is_no_state_between_steps(
    quantize: QuantizeName, mlp: nn.Module, refused: bool, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    stage = build_stage_model(
        model.folder,
        split(2)[1],
        dtype=torch.float32,
        backend=SdpaAttention(),
        max_sequence_tokens=32,
        quantize=quantize,
    )
    fill(stage, model.folder)
    stage.module.model.layers[0].mlp = mlp
    if not refused:
        stage.finish(ContiguousKVCache(), mode="plain")
        return
    with pytest.raises(UnsupportedModelError, match="keeps something between steps"):
        stage.finish(ContiguousKVCache(), mode="plain")


class TooLarge(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"no room for {hidden.shape}")


def test_too_little_memory_for_a_trial_step_is_not_put_down_to_the_family(
    tiny: Callable[[str], TinyModel],
) -> None:
    stage = loaded(tiny("llama"), 2, 1)
    stage.module.model.layers[0].mlp = TooLarge()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        stage.finish(ContiguousKVCache())


class NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, _rotary: object) -> torch.Tensor:
        return hidden_states


def test_a_layer_that_never_calls_attention_is_caught(tiny: Callable[[str], TinyModel]) -> None:
    stage = loaded(tiny("llama"), 2, 1)
    stage.module.model.layers[1].self_attn = NoAttention()
    with pytest.raises(UnsupportedModelError, match=r"does not call attention once .* \[0, 2\]"):
        stage.finish(ContiguousKVCache())


def test_a_window_hidden_in_a_mask_is_caught(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = loaded(tiny("llama"), 1, 0)
    monkeypatch.setattr(verification, "_has_window", lambda stage, layer: layer == 2)
    with pytest.raises(UnsupportedModelError, match="hides its sliding window"):
        stage.finish(ContiguousKVCache())


def test_a_crash_of_the_family_in_the_trial_step_names_the_family(
    tiny: Callable[[str], TinyModel],
) -> None:
    stage = loaded(tiny("llama"), 1, 0)
    stage.module.model.layers[1].mlp = None
    with pytest.raises(UnsupportedModelError, match=r'"llama".*TypeError'):
        stage.finish(ContiguousKVCache())


def test_damaged_weights_are_not_blamed_on_the_family(tiny: Callable[[str], TinyModel]) -> None:
    stage = loaded(tiny("llama"), 1, 0)
    stage.module.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        stage.finish(ContiguousKVCache())


def test_a_cache_of_another_shape_than_the_layers_fill_is_caught(
    tiny: Callable[[str], TinyModel],
) -> None:
    wrong = PagedKVCache.allocate(
        num_layers=NUM_LAYERS,
        num_pages=4,
        page_size=4,
        num_kv_heads=4,
        head_dim=12,
        dtype=torch.float32,
    )
    with pytest.raises(UnsupportedModelError, match=r"caches 2 heads of 12 .* says 4 of 12"):
        load_stage(tiny("llama").folder, split(1)[0], cache=wrong)


def test_a_plan_that_cuts_beyond_the_layers_is_our_bug(tiny: Callable[[str], TinyModel]) -> None:
    plan = dataclasses.replace(split(1)[0], last_layer=NUM_LAYERS + 1)
    with pytest.raises(AssertionError, match="of 4"):
        build_stage_model(
            tiny("llama").folder,
            plan,
            dtype=torch.float32,
            backend=SdpaAttention(),
            max_sequence_tokens=32,
        )
