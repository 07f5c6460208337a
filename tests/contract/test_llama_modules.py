"""Our modules of Llama-like models are transformers' to the bit, and keep its code out of a run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.kv_cache.layout import SequenceLens, build_layout
from mpipipe.models.adapter import StageModel, build_stage_model
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.llama_config import llama_config
from mpipipe.models.llama_modules import LlamaModel, empty_llama, inverse_frequencies
from tests.contract.tiny_models import FAMILIES, TinyModel, fill, modules_of_transformers, split

OURS = [
    "llama",
    "llama-head_dim-100",
    "llama-tied",
    "llama-rope-llama3",
    "mistral",
    "qwen2",
    "qwen3",
]
# What a run of these families has no use for: 7 s of imports beside torch on a machine with GPUs.
HEAVY = ["transformers", "torch._dynamo", "torch.distributed.tensor", "sympy", "sklearn", "scipy"]


def built(folder: Path, number: int, *, ours: bool, dtype: torch.dtype) -> StageModel:
    with nullcontext() if ours else modules_of_transformers():
        stage = build_stage_model(
            folder,
            split(2)[number],
            dtype=dtype,
            backend=SdpaAttention(),
            max_sequence_tokens=32,
        )
    fill(stage, folder)
    stage.finish(ContiguousKVCache(), mode="plain")
    assert isinstance(stage.module, LlamaModel) == ours
    return stage


def outputs(stage: StageModel) -> list[torch.Tensor]:
    """A prompt in two chunks beside another, then a token of each."""
    found = []
    for spans in ([(0, 5, 5), (1, 3, 3)], [(0, 2, 7)], [(0, 1, 8), (1, 1, 4)]):
        entries, row = [], 0
        for sequence_id, query_len, kv_len in spans:
            entries.append((SequenceLens(sequence_id, row, query_len, kv_len), [sequence_id]))
            row += query_len
        layout = build_layout(entries, 16)
        torch.manual_seed(row)
        inputs = torch.randn(row, stage.hidden_size).to(stage.dtype)
        if stage.plan.has_embedding:
            inputs = torch.randint(0, stage.vocab_size, (row,))
        found.append(stage.forward(inputs, layout, torch.arange(row)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("family", OURS)
def test_our_modules_are_those_of_transformers(
    family: str, number: int, dtype: torch.dtype, tiny: Callable[[str], TinyModel]
) -> None:
    folder = tiny(family).folder
    ours, theirs = (built(folder, number, ours=own, dtype=dtype) for own in (True, False))
    assert ours.wanted_names() == theirs.wanted_names()
    assert (ours.all_names, ours.tied) == (theirs.all_names, theirs.tied)
    buffers = dict(theirs.module.named_buffers())
    for name, buffer in ours.module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for mine, expected in zip(outputs(ours), outputs(theirs), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight", "lm_head.weight", "x.y"],
)
def test_names_of_checkpoints_are_read_as_transformers_does(
    name: str, tiny: Callable[[str], TinyModel]
) -> None:
    folder = tiny("llama").folder
    ours, theirs = (built(folder, 0, ours=own, dtype=torch.float32) for own in (True, False))
    assert ours.names.canonical(name) == theirs.names.canonical(name)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 0.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"is_causal": False},
        {"is_causal": None},
        {"sliding_window": 8},  # which transformers' cache has, and its layers do not
        {"model_type": "qwen2", "num_key_value_heads": None},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": [1]}},
        {"layer_types": 3},
        {"layer_types": ["linear_attention"]},
        {"head_dim": 0},
        {"head_dim": 17},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": "small"},
        {"attention_bias": None},
        {"hidden_size": 49},
        {"num_hidden_layers": True},
        {"model_type": "gemma"},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "mistral"},  # which has a window of 4,096 where the file is silent
    ],
    ids=str,
)
def test_what_our_modules_do_not_compute_is_left_to_transformers(
    change: dict[str, Any], tiny: Callable[[str], TinyModel]
) -> None:
    config = json.loads((tiny("llama").folder / "config.json").read_text())
    assert llama_config(config) is not None
    assert llama_config(config | change) is None


_PLAIN = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": None,
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4, "original_max_position_embeddings": 8}
_SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500000},
    {"type": "linear", "factor": 8},
    {"type": "yarn", "rope_type": "llama3", "factor": 8.0, **_LLAMA3},
    {"rope_type": "llama3", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"rope_theta": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
]
_CHANGES: dict[str, list[Any]] = {
    "num_attention_heads": [2, 6],
    "num_key_value_heads": [1, None],
    "head_dim": [20, None],
    "attention_bias": [True],
    "mlp_bias": [True],
    "tie_word_embeddings": [True],
    "pad_token_id": [0, -1],
    "sliding_window": [8],
    "use_sliding_window": [True],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2],
    "rope_theta": [1000000, None],
    "rope_scaling": [None, *_SCALINGS],
    "rope_parameters": [None, *_SCALINGS],
    "partial_rotary_factor": [1.0, 0.5, None],
    "is_causal": [True, False, None],
}
_CHANGE = st.sampled_from(sorted(_CHANGES)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(_CHANGES[name]))
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    lacks=st.sampled_from([None, None, None, "num_key_value_heads", "head_dim", "rope_theta"]),
    changes=st.lists(_CHANGE, max_size=3),
)
def test_what_is_read_of_a_configuration_is_what_transformers_reads(
    kind: str, lacks: str | None, changes: list[tuple[str, Any]]
) -> None:
    raw = {"model_type": kind, **_PLAIN, **dict(changes)}
    raw.pop(str(lacks), None)
    ours = llama_config(raw)
    if ours is None:
        return
    event(kind)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(raw)))
    mine = empty_llama(ours, torch.float32)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in mine.state_dict().items()} == shapes
    assert mine.all_tied_weights_keys == theirs.all_tied_weights_keys
    assert getattr(theirs.config, "is_causal", True)
    window = getattr(theirs.config, "sliding_window", None)
    types = getattr(theirs.config, "layer_types", None) or ["sliding_attention"] * 2
    assert ours.sliding_window == (window if "sliding_attention" in types else None)
    rotary = type(theirs.model.rotary_emb)(theirs.config)
    found = inverse_frequencies(ours.rotary, ours.head_dim)
    assert torch.equal(found, rotary.inv_freq)
    assert rotary.attention_scaling == 1


def test_every_family_of_ours_is_one_of_the_tiny_models() -> None:
    assert set(OURS) <= set(FAMILIES)


_LOAD = """
import json, sys, torch
from pathlib import Path
import mpipipe.runtime.boot
from mpipipe.kv_cache.base import ContiguousKVCache
from mpipipe.models.adapter import build_stage_model
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.planning.plan import StagePlan
from mpipipe.plain_values import from_json
from mpipipe.weights.random import fill_random

folder, plan = Path(sys.argv[1]), from_json(StagePlan, sys.argv[2])
if len(sys.argv) > 3:
    assert open_tokenizer(Path(sys.argv[3])).encode("the quick fox", True)
stage = build_stage_model(
    folder, plan, dtype=torch.float32, backend=SdpaAttention(), max_sequence_tokens=32
)
device = torch.device("cpu")
fill_random(stage.module, stage.wanted_names(), tied=stage.tied, dtype=stage.dtype, device=device)
stage.finish(ContiguousKVCache())
print(json.dumps([stage.mode, sorted(sys.modules)]))
"""


def test_a_process_that_computes_fused_layers_imports_no_modelling_code(
    tiny: Callable[[str], TinyModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mpipipe.models.tokenizer import open_tokenizer
    from mpipipe.plain_values import to_json
    from tests.contract.published_tokenizers import train_bpe, write

    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    train_bpe().save(str(texts / "tokenizer.json"))
    write(texts / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    open_tokenizer(texts)  # kept for the process
    command = [sys.executable, "-c", _LOAD, tiny("llama").folder, to_json(split(1)[0]), texts]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    mode, modules = json.loads(ended.stdout.splitlines()[-1])
    assert mode == "packed"
    assert [name for name in HEAVY if name in modules] == []
