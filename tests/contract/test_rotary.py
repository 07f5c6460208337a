"""Rotary embeddings across the original context: the tokens of `generate` for each prompt alone."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpipipe.checkpoint.families import RESTARTING
from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import UnsupportedModelError
from mpipipe.models import rotary
from mpipipe.models.rotary import LengthRotary
from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import (
    MAX_TOKENS,
    EnginePipeline,
    engine_plan,
    make_requests,
    plain_outcomes,
)
from tests.contract.tiny_models import (
    ORIGINAL,
    ROTARY,
    InProcessPipeline,
    TinyModel,
    load_stage,
    paged_cache,
    split,
)

Tiny = Callable[[str], TinyModel]
# Prompts that stay below, that end at and around the border, that grow over it, and that are above.
LENGTHS = (3, *range(ORIGINAL - 3, ORIGINAL + 4), 9, 23)
NUM_TOKENS = 9
PROMPTS = tuple(
    request.prompt_ids for request in make_requests(LENGTHS, lambda _: SamplingParams())
)
# What depends on the length: these go through schedulers and stages, too.
BY_LENGTH = ("phi3-longrope", "llama-longrope", "llama-dynamic", "gemma3-longrope")


@pytest.fixture(scope="session")
def expected(tiny: Tiny) -> Callable[[str], list[list[int]]]:
    @cache
    def make(name: str) -> list[list[int]]:
        return [tiny(name).greedy_afresh(prompt, NUM_TOKENS) for prompt in PROMPTS]

    return make


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ROTARY)
def test_tokens_are_those_of_transformers_on_both_sides_of_the_original_context(
    name: str, num_stages: int, tiny: Tiny, expected: Callable[[str], list[list[int]]]
) -> None:
    pipeline = InProcessPipeline([load_stage(tiny(name).folder, p) for p in split(num_stages)])
    restart = read_spec(tiny(name).folder).rotary.restart_tokens
    # in chunks, and in steps that mix both sides
    assert pipeline.generate(PROMPTS, NUM_TOKENS, 5, restart) == expected(name)


@pytest.mark.parametrize("name", ["llama-longrope", "qwen3-longrope", "llama-dynamic"])
def test_the_fused_stack_has_the_same_tokens(
    name: str, tiny: Tiny, expected: Callable[[str], list[list[int]]]
) -> None:
    config = tiny(name).reference.config
    stages = [
        load_stage(
            tiny(name).folder,
            plan,
            cache=paged_cache(config, plan.num_layers, head_major=True, num_pages=128),
            mode="fast",
        )
        for plan in split(2)
    ]
    assert InProcessPipeline(stages).generate(PROMPTS, NUM_TOKENS, 5) == expected(name)


@pytest.mark.parametrize("name", ROTARY)
def test_the_border_is_seen(
    name: str, tiny: Tiny, expected: Callable[[str], list[list[int]]]
) -> None:
    """The models must be able to fail: short frequencies for all give other tokens."""
    assert len({token for tokens in expected(name) for token in tokens}) >= 5
    stages = [load_stage(tiny(name).folder, plan) for plan in split(1)]
    found = [m for m in stages[0].module.modules() if isinstance(m, LengthRotary)]
    if "dynamic" in name or "longrope" in name:
        assert found
        for module in found:
            module.forward = module.original.forward  # type: ignore[method-assign]
        assert InProcessPipeline(stages).generate(PROMPTS, NUM_TOKENS, 5) != expected(name)
    else:
        assert not found
        assert not stages[0].rotary_by_length


# ---- through the schedulers ----------------------------------------------------------------------


def requests_of(lengths: tuple[int, ...]) -> Any:
    sampling = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    return make_requests(lengths, lambda _: sampling)


@pytest.mark.parametrize("num_pages", [60, 10], ids=["roomy", "preempting"])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_awaiting_scheduler_has_the_same_tokens(
    name: str, num_pages: int, tiny: Tiny, expected: Callable[[str], list[list[int]]]
) -> None:
    outcomes = plain_outcomes(tiny(name), requests_of(LENGTHS), num_pages=num_pages)
    assert [list(outcome.token_ids) for outcome in outcomes] == expected(name)


@pytest.mark.parametrize("num_pages", [60, 10], ids=["roomy", "preempting"])
@pytest.mark.parametrize("mode", ["varlen", "tensors", "replayed"])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_scheduler_that_runs_ahead_has_the_same_tokens(
    name: str,
    num_stages: int,
    mode: str,
    num_pages: int,
    tiny: Tiny,
    expected: Callable[[str], list[list[int]]],
) -> None:
    plan = engine_plan(num_stages, num_pages=num_pages, graphs=mode == "replayed")
    pipeline = EnginePipeline(tiny(name), plan, mode).prepare()
    outcomes = pipeline.generate(requests_of(LENGTHS), seed=num_pages)
    assert [list(outcome.token_ids) for outcome in outcomes] == expected(name)
    assert (pipeline.num_preemptions > 0) == (num_pages == 10)


# ---- what is known of the families ---------------------------------------------------------------


def test_the_families_that_start_over_are_known() -> None:
    """Those that can be split, and whose `generate` drops its cache at the original context."""
    found = set()
    for model_type, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        module = (
            importlib.import_module(f"transformers.models.{model_type.replace('-', '_')}")
            if (
                Path(transformers.__file__).parent / "models" / model_type.replace("-", "_")
            ).is_dir()
            else None
        )
        kind = getattr(module, class_name, None) if module else None
        if kind is None or not getattr(kind.config_class, "base_model_pp_plan", None):
            continue
        if "original_max_position_embeddings" in inspect.getsource(kind):
            found.add(model_type)
    assert found - {"phi4_multimodal"} == set(RESTARTING)


def test_where_sequences_start_over_is_read_as_transformers_reads_it(tiny: Tiny) -> None:
    config = tiny("phi3-longrope").reference.config
    spec = read_spec(tiny("phi3-longrope").folder)
    assert spec.rotary.restart_tokens == config.original_max_position_embeddings + 1
    assert transformers.Phi3Config().original_max_position_embeddings == RESTARTING["phi3"]
    assert read_spec(tiny("phi3-default").folder).rotary.restart_tokens == 0
    assert read_spec(tiny("llama-longrope").folder).rotary.restart_tokens == 0


def test_a_kind_that_is_not_known_is_refused_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "_FIXED", frozenset({"default"}))
    with pytest.raises(UnsupportedModelError, match='of the unknown kind "yarn"'):
        load_stage(tiny("llama-yarn").folder, split(1)[0])


def test_no_sequence_of_the_engines_is_longer_than_their_tables() -> None:
    assert max(LENGTHS) + NUM_TOKENS <= MAX_TOKENS
