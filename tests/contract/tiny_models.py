"""Tiny random models of many families, and an in-process pipeline that runs them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

from mpipipe.checkpoint.index import read_index
from mpipipe.data_plane.lanes import ALONE, Lanes
from mpipipe.kv_cache.base import ContiguousKVCache, KVCache
from mpipipe.kv_cache.layout import SequenceLens, build_layout, to_device
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models import stage_cut
from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.base import AttentionBackend
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.operations import Operations
from mpipipe.planning.plan import StageOffload, StagePlan
from mpipipe.runtime.loading import stage_tensors, streamed_weights
from mpipipe.types import QuantizeName
from mpipipe.weights.destination import Destination
from mpipipe.weights.loader import load_stage as load_weights
from mpipipe.weights.offload import OffloadedWeights, StageTensors, open_offload

NUM_LAYERS = 4
VOCAB = 97
PAGE_SIZE = 4

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Logits far apart, so that the greedy choice does not hang on the last bit of a sum.
    "initializer_range": 0.3,
}
_GATED = {**_COMMON, "intermediate_size": 80, "num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)

# name → (configuration class, settings). `window` of 4 is shorter than the prompts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "llama-head_dim-100": (
        "LlamaConfig",
        {**_GATED, "hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2},
    ),
    "llama-tied": ("LlamaConfig", {**_GATED, "tie_word_embeddings": True}),
    "llama-rope-llama3": (
        "LlamaConfig",
        {
            **_GATED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 80, "word_embed_proj_dim": 48},
    ),
    "opt-350m-like": (
        "OPTConfig",
        {
            **_COMMON,
            "ffn_dim": 80,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
            "initializer_range": 0.1,
        },
    ),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 4}),
    "ministral": (
        "MinistralConfig",
        {**_GATED, "head_dim": 12, "sliding_window": 4, "layer_types": _ALTERNATING},
    ),
    "ministral3": ("Ministral3Config", _GATED),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen2-window": (
        "Qwen2Config",
        {**_GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**_GATED, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            **_GATED,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GATED,
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "vaultgemma": ("VaultGemmaConfig", {**_GATED, "head_dim": 16, "sliding_window": 4}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 80}),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        {**_COMMON, "intermediate_size": 80, "use_parallel_residual": False},
    ),
    "phi": ("PhiConfig", _GATED),
    "phi3": ("Phi3Config", {**_GATED, "sliding_window": 4}),
    "olmo": ("OlmoConfig", {**_GATED, "clip_qkv": 1.0}),
    "olmo2": ("Olmo2Config", _GATED),
    "olmo3": ("Olmo3Config", {**_GATED, "sliding_window": 4}),
    "granite": (
        "GraniteConfig",
        {
            **_GATED,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere": ("CohereConfig", {**_GATED, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**_GATED, "sliding_window": 4, "layer_types": _ALTERNATING}),
    "starcoder2": ("Starcoder2Config", {**_GATED, "sliding_window": 4}),
    "smollm3": (
        "SmolLM3Config",
        {
            **_GATED,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": _ALTERNATING,
        },
    ),
    "glm": ("GlmConfig", {**_GATED, "head_dim": 12}),
    "glm4": ("Glm4Config", {**_GATED, "head_dim": 12}),
    "helium": ("HeliumConfig", {**_GATED, "head_dim": 12}),
    "ernie4_5": ("Ernie4_5Config", {**_GATED, "head_dim": 12}),
    "exaone4": ("Exaone4Config", {**_GATED, "sliding_window": 4, "layer_types": _ALTERNATING}),
    "seed_oss": ("SeedOssConfig", {**_GATED, "head_dim": 12}),
    "arcee": ("ArceeConfig", _GATED),
    "apertus": ("ApertusConfig", _GATED),
    "cwm": (
        "CwmConfig",
        {**_GATED, "head_dim": 12, "sliding_window": 4, "layer_types": _ALTERNATING},
    ),
    "hyperclovax": ("HyperCLOVAXConfig", {**_GATED, "embedding_multiplier": 3.0}),
    "jais2": ("Jais2Config", _GATED),
    "afmoe": (
        "AfmoeConfig",
        {
            **_GATED,
            **_EXPERTS,
            "head_dim": 12,
            "moe_intermediate_size": 40,
            "num_dense_layers": 1,
            "sliding_window": 4,
            "mup_enabled": True,
        },
    ),
    "mixtral": ("MixtralConfig", {**_GATED, **_EXPERTS}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_GATED, **_EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GATED, **_EXPERTS, "moe_intermediate_size": 40}),
}

ORIGINAL = 16  # tokens of the original context below
_THETA = {"rope_theta": 10000.0}
_LONG: dict[str, Any] = {
    "rope_type": "longrope",
    **_THETA,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
}
_DYNAMIC = {"rope_type": "dynamic", **_THETA, "factor": 4.0}
_HEADS = {**_GATED, "head_dim": 16}
_SHORT = {**_HEADS, "max_position_embeddings": ORIGINAL}  # a `dynamic` embedding's original context


def _scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, **_THETA, "factor": 4.0, **settings}


def _long(num_frequencies: int, **settings: Any) -> dict[str, Any]:
    factors = {name: _LONG[name][:num_frequencies] for name in ("short_factor", "long_factor")}
    return {**_LONG, **factors, **settings}


# Models whose rotary embedding changes, or might, where a sequence outgrows ORIGINAL tokens.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": (
        "Phi3Config",
        {
            **_GATED,
            "rope_parameters": _long(6),
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "phi3-longrope-window": (
        "Phi3Config",
        {
            **_GATED,
            "sliding_window": 6,
            "rope_parameters": _long(3, partial_rotary_factor=0.5),
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "phi3-default": ("Phi3Config", {**_GATED, "original_max_position_embeddings": ORIGINAL}),
    "llama-longrope": ("LlamaConfig", {**_HEADS, "rope_parameters": _LONG}),
    "llama-longrope-factor": (
        "LlamaConfig",
        {**_HEADS, "rope_parameters": {**_LONG, "factor": 8.0, "attention_factor": 1.3}},
    ),
    "qwen3-longrope": ("Qwen3Config", {**_HEADS, "rope_parameters": _LONG}),
    "glm-longrope": (
        "GlmConfig",
        {**_HEADS, "rope_parameters": _long(4, partial_rotary_factor=0.5)},
    ),
    "cohere-longrope": ("CohereConfig", {**_GATED, "rope_parameters": _long(6)}),
    "mixtral-longrope": ("MixtralConfig", {**_HEADS, **_EXPERTS, "rope_parameters": _LONG}),
    "gemma3-longrope": (
        "Gemma3TextConfig",
        {
            **_HEADS,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "full_attention": _LONG,
                "sliding_attention": {"rope_type": "default", **_THETA},
            },
        },
    ),
    "gemma3-dynamic": (
        "Gemma3TextConfig",
        {
            **_SHORT,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "full_attention": {**_DYNAMIC, "factor": 64.0},
                "sliding_attention": {"rope_type": "linear", **_THETA, "factor": 2.0},
            },
        },
    ),
    "llama-dynamic": ("LlamaConfig", {**_SHORT, "rope_parameters": _DYNAMIC}),
    "mistral-dynamic": (
        "MistralConfig",
        {**_SHORT, "sliding_window": 6, "rope_parameters": _DYNAMIC},
    ),
    "qwen2-dynamic": (
        "Qwen2Config",
        {**_GATED, "max_position_embeddings": ORIGINAL, "rope_parameters": _DYNAMIC},
    ),
    "gpt_neox-dynamic": (
        "GPTNeoXConfig",
        {
            **_COMMON,
            "intermediate_size": 80,
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {**_DYNAMIC, "partial_rotary_factor": 0.5},
        },
    ),
    "llama-yarn": (
        "LlamaConfig",
        {**_HEADS, "rope_parameters": _scaled("yarn", original_max_position_embeddings=ORIGINAL)},
    ),
    "llama-llama3": (
        "LlamaConfig",
        {
            **_HEADS,
            "rope_parameters": _scaled(
                "llama3",
                original_max_position_embeddings=ORIGINAL,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        },
    ),
    "llama-linear": ("LlamaConfig", {**_SHORT, "rope_parameters": _scaled("linear")}),
    "llama-proportional": (
        "LlamaConfig",
        {**_SHORT, "rope_parameters": _scaled("proportional", partial_rotary_factor=0.5)},
    ),
    "olmo3-yarn": (
        "Olmo3Config",
        {
            **_HEADS,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "rope_parameters": _scaled("yarn", original_max_position_embeddings=ORIGINAL),
        },
    ),
    "ministral3-long": ("Ministral3Config", {**_HEADS, "max_position_embeddings": 64}),
}


@dataclass(frozen=True)
class TinyModel:
    """A saved model and what transformers generates with it."""

    folder: Path
    reference: transformers.PreTrainedModel

    def greedy_afresh(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """As `greedy`, by a model that has seen no longer prompt before.

        transformers' `dynamic` rotary embedding keeps the frequencies of the longest.
        """
        kept = {
            name: (dict(vars(module)), dict(module._buffers))
            for name, module in self.reference.named_modules()
            if "rope_type" in vars(module)
        }
        tokens = self.greedy(prompt, num_tokens)
        for name, (attributes, buffers) in kept.items():
            module = self.reference.get_submodule(name)
            vars(module).clear()
            vars(module).update(attributes)
            vars(module)["_buffers"] = buffers
        return tokens

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """transformers.generate, one prompt, no padding, no end."""
        output = self.reference.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def save_tiny(name: str, folder: Path) -> TinyModel:
    """A random model of the family `name`, saved to `folder`; the same every time."""
    return save_config(*(FAMILIES | ROTARY)[name], folder)


def save_config(config_class: str, settings: dict[str, Any], folder: Path) -> TinyModel:
    """As `save_tiny`, with these settings of a class of transformers' configurations."""
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    # "eager" is each family's written formula (sdpa of transformers 5.17 forgets Gemma 2's softcap)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if config.tie_word_embeddings and config.model_type != "opt":
        # Else a tied model repeats its last token, whatever the layers do.
        model.get_input_embeddings().weight.data.mul_(0.1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases are zero and norms one at birth: nothing would notice
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return TinyModel(folder, model)


def split(num_stages: int, num_layers: int = NUM_LAYERS) -> list[StagePlan]:
    """Uneven on purpose: the first stages get one layer each, the last the rest."""
    borders = [*range(num_stages), num_layers]
    return [
        StagePlan(
            stage=stage,
            rank=stage,
            host="here",
            first_layer=first,
            last_layer=last,
            has_embedding=first == 0,
            has_head=last == num_layers,
            weight_bytes=0,
            cost_share=0.0,
        )
        for stage, (first, last) in enumerate(pairwise(borders))
    ]


_PATCHING = threading.Lock()


@contextmanager
def modules_of_transformers() -> Iterator[None]:
    """Inside, stages of Llama-like models are of transformers' modules, the oracle of ours.

    One thread at a time: lanes are threads in some tests.
    """
    with _PATCHING, mock.patch.object(stage_cut, "llama_config", return_value=None):
        yield


def load_stage(
    folder: Path,
    plan: StagePlan,
    *,
    backend: AttentionBackend | None = None,
    cache: KVCache | None = None,
    dtype: torch.dtype = torch.float32,
    mode: str = "packed",
    operations: Operations | None = None,
    device: str = "cpu",
    max_sequence_tokens: int = 64,
    quantize: QuantizeName = "none",
    offloading: Offloading | None = None,
    lanes: Lanes = ALONE,
) -> StageModel:
    """Build, load and finish one stage from a single safetensors file.

    `offloading` is needed where `plan` offloads weights. "plain" means transformers' own modules.
    """
    with modules_of_transformers() if mode == "plain" else nullcontext():
        stage = build_stage_model(
            folder,
            plan,
            dtype=dtype,
            backend=backend or SdpaAttention(),
            max_sequence_tokens=max_sequence_tokens,
            quantize=quantize,
            lanes=lanes,
        )
    if offloading is None:
        assert plan.offload is None
        fill(stage, folder, device)
        stage.finish(cache or ContiguousKVCache(), mode=mode, operations=operations)
        return stage
    tensors = stage_tensors(stage)
    offloaded = offloading.open(plan, tensors, torch.device(device))
    fill(stage, folder, device, offloaded)
    stage.finish(
        cache or ContiguousKVCache(),
        mode=mode,
        operations=operations,
        streamed=streamed_weights(offloaded, tensors),
    )
    return stage


@dataclass
class Offloading:
    """Opens what stages need whose weights do not stay on the device, and closes it."""

    folder: Path  # for their files
    use_graphs: bool = False
    opened: list[OffloadedWeights] = field(default_factory=list)

    def open(
        self, plan: StagePlan, tensors: StageTensors, device: torch.device
    ) -> OffloadedWeights:
        """As `runtime.loading` does."""
        offloaded = open_offload(
            plan.offload or StageOffload(),
            tensors,
            device,
            folder=str(self.folder),
            name=f"test-rank-{plan.rank}",
            use_graphs=self.use_graphs,
        )
        self.opened.append(offloaded)
        return offloaded

    def close(self) -> None:
        """All that was opened."""
        while self.opened:
            self.opened.pop().close()


def fill(
    stage: StageModel, folder: Path, device: str = "cpu", destination: Destination | None = None
) -> None:
    """Load the stage's weights."""
    load_weights(
        stage.module,
        stage.wanted_names(),
        read_index(folder),
        all_names=stage.all_names,
        tied=stage.tied,
        to_canonical=stage.names.canonical,
        dtype=stage.dtype,
        device=destination or torch.device(device),
        shards=stage.shards(),
    )


class InProcessPipeline:
    """The stages of one model, called one after the other."""

    def __init__(self, stages: Sequence[StageModel], device: str = "cpu") -> None:
        self.stages = stages
        self.device = torch.device(device)
        self.next_page = 0
        self.pages: dict[int, list[int]] = {}
        self.rotary_lens: dict[int, int] = {}  # by sequence, as in `RequestOpened`
        self.hidden: list[torch.Tensor] = []  # what went from stage to stage in the last step

    @torch.inference_mode()
    def step(
        self, work: Sequence[tuple[int, Sequence[int], int]], *, sample: bool = True
    ) -> torch.Tensor:
        """(sequence, its new tokens, tokens cached before) → logits of each one's last row."""
        entries: list[tuple[SequenceLens, list[int]]] = []
        ids: list[int] = []
        for sequence_id, new_ids, num_computed in work:
            kv_len = num_computed + len(new_ids)
            pages = self.pages.setdefault(sequence_id, [])
            while len(pages) * PAGE_SIZE < kv_len:
                pages.append(self.next_page)
                self.next_page += 1
            begun = self.rotary_lens.get(sequence_id, kv_len)
            span = SequenceLens(sequence_id, len(ids), len(new_ids), kv_len, rotary_len=begun)
            entries.append((span, pages))
            ids.extend(new_ids)
        by_length = any(stage.rotary_by_length for stage in self.stages)
        layout = build_layout(entries, PAGE_SIZE, rotary_by_length=by_length)
        if self.device.type != "cpu":
            layout = to_device(layout, lambda tensor: tensor.to(self.device))
        last_rows = [span.query_start + span.query_len - 1 for span, _ in entries]
        rows = torch.tensor(last_rows, device=self.device)
        tensor = torch.tensor(ids, device=self.device)
        self.hidden = []
        for stage in self.stages:
            tensor = stage.forward(tensor, layout, rows if sample else rows[:0])
            self.hidden.append(tensor)
        return self.hidden.pop()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        chunk: int,
        restart_tokens: int = 0,
    ) -> list[list[int]]:
        """Greedy: decodes first, then at most `chunk` tokens of each unfinished prompt.

        A sequence that grows to `restart_tokens` starts over, as the schedulers let it.
        """
        histories = [list(prompt) for prompt in prompts]
        self.rotary_lens = {index: len(prompt) for index, prompt in enumerate(prompts)}
        computed = [0] * len(prompts)
        for number in self._rounds(histories, prompts, num_tokens):
            order = sorted(
                (len(histories[index]) - computed[index] > 1, index)
                for index in range(min(number, len(prompts)))  # one more prompt joins per round
                if len(histories[index]) - len(prompts[index]) < num_tokens
            )
            work = [
                (
                    index,
                    histories[index][computed[index] : computed[index] + chunk],
                    computed[index],
                )
                for _, index in order
            ]
            logits = self.step(work)
            for row, (index, new_ids, _) in enumerate(work):
                computed[index] += len(new_ids)
                if computed[index] == len(histories[index]):
                    histories[index].append(int(logits[row].argmax()))
                    if len(histories[index]) == restart_tokens:
                        self.rotary_lens[index], computed[index] = restart_tokens, 0
        return [history[len(prompt) :] for history, prompt in zip(histories, prompts, strict=True)]

    @staticmethod
    def _rounds(
        histories: list[list[int]], prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> Iterator[int]:
        number = 0
        while any(
            len(history) - len(prompt) < num_tokens
            for history, prompt in zip(histories, prompts, strict=True)
        ):
            number += 1
            yield number


def paged_cache(
    config: transformers.PretrainedConfig,
    num_layers: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    head_major: bool = False,
    num_pages: int = 64,
    num_lanes: int = 1,
) -> PagedKVCache:
    """Pages enough for the tests, in the shape that the model's configuration gives."""
    heads = config.num_attention_heads
    return PagedKVCache.allocate(
        num_layers=num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=(getattr(config, "num_key_value_heads", None) or heads) // num_lanes,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        device=torch.device(device),
        head_major=head_major,
    )
