"""Prompts that begin alike share pages on every stage, and the tokens are those of each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpipipe.checkpoint.spec import read_spec
from mpipipe.kv_cache import common_tables
from mpipipe.kv_cache.layout import BatchLayout
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention import sdpa
from mpipipe.models.attention.base import AttentionInputs
from mpipipe.models.attention.triton_paged import TritonAttention
from mpipipe.scheduler.sequence import Sequence
from mpipipe.scheduler.shared_prefixes import SharedPrefixes
from mpipipe.stage.cuda_graph_runner import CudaGraphRunner, DecodeOutput, GraphKey
from mpipipe.types import PrefillMode, Request, SamplingParams
from tests.contract.engine_pipeline import (
    MAX_TOKENS,
    EnginePipeline,
    TensorSdpa,
    engine_plan,
    make_requests,
    plain_outcomes,
)
from tests.contract.test_stage_engine import sampled
from tests.contract.tiny_models import TinyModel

MODES = ["varlen", "tensors", "replayed"]
# Of each prompt: which text it begins with, how many tokens of it, and how many of its own follow.
# A page has four tokens, a step sixteen: texts end within, at and behind the ends of both.
BEGINNINGS = (
    (0, 22, 3), (0, 22, 1), (0, 16, 2), (1, 9, 4), (0, 24, 0), (1, 8, 1), (0, 3, 5), (0, 24, 0),
    (1, 24, 2), (0, 20, 6),
)  # fmt: skip


def sharers(sampling: Callable[[int], SamplingParams]) -> list[Request]:
    texts = [request.prompt_ids for request in make_requests((24, 24), sampling)]
    own = make_requests([6] * len(BEGINNINGS), sampling)
    return [
        replace(request, prompt_ids=texts[text][:num_common] + request.prompt_ids[:num_own])
        for request, (text, num_common, num_own) in zip(own, BEGINNINGS, strict=True)
    ]


def check_shared_prefixes(
    requests: list[Request],
    wanted: list[tuple[int, ...]],
    make: Callable[[int, int], EnginePipeline],
    num_pages: int,
) -> None:
    """Of `make`(pages, pages in host memory) pipelines. Also run on GPUs."""
    num_shared = num_preemptions = 0
    for num_host_pages, seeds in ((0, (0,)), (30, (0, 1))):
        pipeline = make(num_pages, num_host_pages)
        for seed in seeds:
            found = pipeline.generate(requests, seed=seed)
            assert [outcome.token_ids for outcome in found] == wanted
            num_shared += pipeline.num_shared_tokens
            num_preemptions += pipeline.num_preemptions
            computed = [
                chunk.num_tokens
                for step in pipeline.steps
                for chunk in getattr(step, "sequences", ()) or getattr(step, "chunks", ())
            ]
            pipeline.steps.clear()
            if not pipeline.num_preemptions:
                num_known = sum(len(request.prompt_ids) for request in requests)
                assert sum(computed) + pipeline.num_shared_tokens == num_known
    assert num_shared >= 3 * 90
    assert (num_preemptions > 0) == (num_pages < 30)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_stages", "num_pages"), [(1, 80), (2, 18)])
def test_the_tokens_are_those_of_each_prompt_alone(
    num_stages: int, num_pages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    requests = sharers(lambda n: sampled(n).replace(max_new_tokens=16))
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]

    def make(num_pages: int, num_host_pages: int) -> EnginePipeline:
        plan = engine_plan(
            num_stages,
            num_pages=num_pages,
            graphs=mode == "replayed",
            max_sequences=4,
            num_host_pages=num_host_pages,
            max_sharing_tokens=MAX_TOKENS,
        )
        return EnginePipeline(model, plan, mode).prepare()

    check_shared_prefixes(requests, wanted, make, num_pages)


@pytest.mark.parametrize("num_pages", [18, 80])
@pytest.mark.parametrize("prefill", ["phases", "mixed"])
def test_the_tokens_are_the_same_where_decodes_read_shared_pages_together(
    prefill: PrefillMode,
    num_pages: int,
    tiny: Callable[[str], TinyModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However few tokens that spares; sequences join, leave, are preempted and restored."""
    model = tiny("llama")
    requests = sharers(lambda n: sampled(n).replace(max_new_tokens=16))
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]
    monkeypatch.setattr(sdpa, "MIN_SPARED_TOKENS", 1)
    num_joined = []
    join = sdpa._attend_joined

    def counted(query_BKGD: torch.Tensor, *rest: Any) -> torch.Tensor:
        num_joined.append(len(query_BKGD))
        return join(query_BKGD, *rest)

    monkeypatch.setattr(sdpa, "_attend_joined", counted)

    def make(num_pages: int, num_host_pages: int) -> EnginePipeline:
        plan = engine_plan(
            2,
            num_pages=num_pages,
            prefill=prefill,
            max_sequences=4,
            num_host_pages=num_host_pages,
            max_sharing_tokens=MAX_TOKENS,
        )
        return EnginePipeline(model, plan, "varlen").prepare()

    check_shared_prefixes(requests, wanted, make, num_pages)
    assert {2, 3} <= set(num_joined)


class LedSdpa(TensorSdpa):
    """Rows of a group read the common pages of its first row, as our kernels do."""

    def attend_stored(self, inputs: AttentionInputs) -> torch.Tensor:
        assert isinstance(inputs.cache, PagedKVCache)
        if inputs.layout.common is not None:
            page_size, layout = inputs.cache.page_size, inputs.layout
            led = layout.derive(("led",), lambda: led_layout(layout, page_size))
            inputs = inputs._replace(layout=led)
        return super().attend_stored(inputs)


def led_layout(layout: BatchLayout, page_size: int) -> BatchLayout:
    """With what the tables say, by operations on tensors alone: a row that they forget reads row 0.

    R places in the table of rows, B rows.
    """
    assert layout.common is not None
    tokens_B, rows_R, ends_G = (table.long() for table in layout.common)
    place_R = torch.arange(len(rows_R))
    group_R = torch.searchsorted(ends_G, place_R, right=True).clamp(max=len(ends_G) - 1)
    start_R = torch.where(group_R == 0, 0, ends_G[group_R - 1])
    is_placed_RB = (rows_R[:, None] == place_R[None, :]) & (place_R < ends_G[-1])[:, None]
    leader_B = (rows_R[start_R][:, None] * is_placed_RB).sum(dim=0)
    column_P = torch.arange(layout.page_table_BP.shape[1])
    is_common_BP = column_P[None, :] < (tokens_B // page_size)[:, None]
    table_BP = torch.where(is_common_BP, layout.page_table_BP[leader_B], layout.page_table_BP)
    return replace(layout, page_table_BP=table_BP, _derived={})


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each decode step that runs, or is replayed, reads common pages together."""
    monkeypatch.setattr(common_tables, "MIN_SPARED_TOKENS_GPU", 1)
    steps: list[bool] = []
    run = CudaGraphRunner.run

    def noted(runner: CudaGraphRunner, key: GraphKey) -> DecodeOutput:
        steps.append(key.in_groups)
        return run(runner, key)

    monkeypatch.setattr(CudaGraphRunner, "run", noted)
    return steps


@pytest.mark.parametrize("mode", ["tensors", "replayed"])
@pytest.mark.parametrize("num_pages", [18, 80])
@pytest.mark.parametrize("prefill", ["phases", "mixed"])
def test_the_tokens_are_the_same_where_tables_say_who_reads_together(
    prefill: PrefillMode,
    num_pages: int,
    mode: str,
    tiny: Callable[[str], TinyModel],
    grouped: list[bool],
) -> None:
    """Tables on the device follow the rows as these join, leave, are preempted and restored."""
    model = tiny("llama")
    requests = sharers(lambda n: sampled(n).replace(max_new_tokens=16))
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]

    def make(num_pages: int, num_host_pages: int) -> EnginePipeline:
        plan = engine_plan(
            2,
            num_pages=num_pages,
            graphs=mode == "replayed",
            prefill=prefill,
            max_sequences=4,
            num_host_pages=num_host_pages,
            max_sharing_tokens=MAX_TOKENS,
            read_prefixes_once=True,
        )
        return EnginePipeline(model, plan, mode, backend=LedSdpa()).prepare()

    check_shared_prefixes(requests, wanted, make, num_pages)
    assert set(grouped) == {False, True}


@pytest.mark.parametrize("read_prefixes_once", [False, True])
def test_our_kernels_read_together_only_where_the_plan_says_so(
    read_prefixes_once: bool, tiny: Callable[[str], TinyModel], grouped: list[bool]
) -> None:
    """In Triton's interpreter, so few sequences."""
    pytest.importorskip("triton", reason="triton is part of the dev extra on Linux x86_64 only")
    model = tiny("llama")
    requests = sharers(lambda _: SamplingParams(max_new_tokens=4, ignore_eos=True))[:3]
    wanted = [outcome.token_ids for outcome in plain_outcomes(model, requests)]
    plan = engine_plan(
        1,
        max_sequences=4,
        max_sharing_tokens=MAX_TOKENS,
        read_prefixes_once=read_prefixes_once,
    )
    pipeline = EnginePipeline(model, plan, "tensors", backend=TritonAttention())
    assert [outcome.token_ids for outcome in pipeline.generate(requests)] == wanted
    assert any(grouped) == read_prefixes_once


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", ["opt", "phi3-longrope"])
def test_families_with_positions_of_their_own_share_what_is_equal(
    name: str, lookahead: int, tiny: Callable[[str], TinyModel]
) -> None:
    """Long prompts of `longrope` share nothing; short ones do, until they start over."""
    model = tiny(name)
    requests = sharers(lambda _: SamplingParams(max_new_tokens=20, ignore_eos=True))
    limit = read_spec(model.folder).rotary.max_equal_tokens
    found, num_shared = [], []
    for max_sharing_tokens in (0, MAX_TOKENS if limit is None else limit):
        plan = engine_plan(
            2,
            max_sequences=4,
            lookahead=lookahead,
            hidden_size=model.reference.config.hidden_size,
            prefill="phases" if lookahead else "mixed",
            max_sharing_tokens=max_sharing_tokens,
        )
        pipeline = EnginePipeline(model, plan, "varlen").prepare()
        found.append([o.token_ids for o in pipeline.generate(requests)])
        num_shared.append(pipeline.num_shared_tokens)
    assert found[0] == found[1]
    assert num_shared[0] == 0
    assert num_shared[1] > 0


def test_tokens_come_from_the_shared_pages(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that are found by fewer tokens than they hold would be noticed."""

    def by_first_token(prefixes: SharedPrefixes, sequence: Sequence) -> object:
        known, token_ids = key(prefixes, sequence)
        return known, token_ids[:1] * len(token_ids)

    model = tiny("llama")
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    requests = [
        replace(request, prompt_ids=(7, *request.prompt_ids))
        for request in make_requests((20, 21, 22), lambda _: sampling)
    ]
    wanted = [o.token_ids for o in plain_outcomes(model, requests)]
    plan = engine_plan(1, max_sharing_tokens=MAX_TOKENS)
    pipeline = EnginePipeline(model, plan, "varlen").prepare()
    assert [o.token_ids for o in pipeline.generate(requests)] == wanted
    key = SharedPrefixes._key
    monkeypatch.setattr(SharedPrefixes, "_key", by_first_token)
    assert [o.token_ids for o in pipeline.generate(requests)] != wanted
