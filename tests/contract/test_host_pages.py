"""KV pages in host memory: pages come back as they were, and sequences go on with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpipipe.kv_cache.host_pages import HostPages, page_bytes
from mpipipe.kv_cache.paged import HostLayers, PagedKVCache
from mpipipe.planning.plan import KvInHost
from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import (
    EnginePipeline,
    cache_of,
    engine_plan,
    make_requests,
    plain_outcomes,
)
from tests.contract.test_stage_engine import sampled
from tests.contract.tiny_models import TinyModel

MODES = ["varlen", "tensors", "replayed"]


def new_cache(*, head_major: bool, head_dim: int = 12) -> PagedKVCache:
    cache = PagedKVCache.allocate(
        num_layers=3,
        num_pages=6,
        page_size=4,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        head_major=head_major,
    )
    for number, part in enumerate((*cache.keys, *cache.values)):
        pages = torch.arange(6).view(6, 1, 1, 1)
        part.copy_((100 * number + 10 * pages + torch.rand(part.shape)).to(part.dtype))
    return cache


def open_pages(cache: PagedKVCache, num_pages: int) -> HostPages:
    memory = torch.empty(num_pages * page_bytes(cache), dtype=torch.uint8)
    return HostPages(cache, memory, num_pages, lambda ids: ids)


@pytest.mark.parametrize("head_dim", [12, 3])
@pytest.mark.parametrize("head_major", [False, True])
def test_pages_come_back_as_they_were_in_other_places(head_major: bool, head_dim: int) -> None:
    cache = new_cache(head_major=head_major, head_dim=head_dim)
    before = [part.clone() for part in (*cache.keys, *cache.values)]
    pages = open_pages(cache, 4)
    pages.save((5, 1), (3, 0))
    pages.save((2,), (1,))
    for part in (*cache.keys, *cache.values):
        part.fill_(-1)
    pages.restore((0, 3), (4, 2))
    pages.settle((4, 2))
    for part, was in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(part[4], was[1])
        assert torch.equal(part[2], was[5])
        assert (part[[0, 1, 3, 5]] == -1).all()
    use = pages.use()
    assert use.saved_bytes == 3 * page_bytes(cache)
    assert use.restored_bytes == 2 * page_bytes(cache)
    assert (use.bytes_per_s or 0) > 0


def test_a_page_is_moved_with_all_its_layers() -> None:
    cache = new_cache(head_major=False)
    assert page_bytes(cache) == 2 * 3 * 4 * 2 * 12 * 2
    assert page_bytes(cache) * 6 == cache.num_bytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_stages", "num_host_pages"), [(1, 40), (2, 4)])
def test_preempted_sequences_go_on_with_their_pages_and_end_the_same(
    num_stages: int, num_host_pages: int, mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    """With all sampling options: draws, penalties and log-probabilities go on, too."""
    model = tiny("llama")
    requests = make_requests((9, 3, 14, 6, 2, 11), lambda n: sampled(n).replace(max_new_tokens=20))
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(
        num_stages,
        num_pages=14,
        graphs=mode == "replayed",
        max_sequences=4,
        num_host_pages=num_host_pages,
    )
    pipeline = EnginePipeline(model, plan, mode).prepare()
    num_saved = num_preemptions = 0
    for seed in range(2):
        found = pipeline.generate(requests, seed=seed)
        assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            told = [[e.token_id for e in one.logprobs if e is not None] for one in (ours, theirs)]
            assert told[0] == told[1]
        num_saved += pipeline.num_saved
        num_preemptions += pipeline.num_preemptions
    assert num_saved > 2
    assert (num_saved < num_preemptions) == (num_host_pages == 4)
    for engine in pipeline.engines:
        use = engine.page_moves()
        assert use is not None
        assert use.saved_bytes >= use.restored_bytes > 0


def test_tokens_come_from_the_restored_pages(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that came back empty would be noticed."""
    model = tiny("llama")
    requests = make_requests((9, 3, 14, 6, 2, 11), lambda n: sampled(n).replace(max_new_tokens=20))
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(1, num_pages=14, max_sequences=4, num_host_pages=40)
    monkeypatch.setattr(HostPages, "restore", lambda *_: None)
    found = EnginePipeline(model, plan, "varlen").generate(requests)
    assert [o.token_ids for o in found] != [o.token_ids for o in wanted]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", ["opt", "phi3-longrope"])
def test_the_tokens_are_those_without_host_memory(
    name: str, lookahead: int, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(name)
    requests = make_requests(
        (9, 3, 14, 6, 2, 11), lambda _: SamplingParams(max_new_tokens=30, ignore_eos=True)
    )
    found = []
    for num_host_pages in (0, 40):
        plan = engine_plan(
            2,
            num_pages=14,
            max_sequences=4,
            lookahead=lookahead,
            hidden_size=model.reference.config.hidden_size,
            prefill="phases" if lookahead else "mixed",
            num_host_pages=num_host_pages,
        )
        pipeline = EnginePipeline(model, plan, "varlen").prepare()
        found.append([o.token_ids for o in pipeline.generate(requests)])
        assert (pipeline.num_saved > 0) == (num_host_pages > 0)
    assert found[0] == found[1]


# ---- layers whose pages are in host memory -------------------------------------------------------


@pytest.mark.parametrize("head_major", [False, True])
def test_a_cache_with_layers_in_host_memory_has_the_same_tensors(head_major: bool) -> None:
    taken: list[torch.Tensor] = []

    def take(num_bytes: int) -> torch.Tensor:
        taken.append(torch.full((num_bytes,), 7, dtype=torch.uint8))
        return taken[-1]

    shape: dict[str, Any] = {
        "num_layers": 5,
        "num_pages": 6,
        "page_size": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
    }
    whole = PagedKVCache.allocate(**shape, dtype=torch.float32, head_major=head_major)
    cache = PagedKVCache.allocate(
        **shape,
        dtype=torch.float32,
        head_major=head_major,
        host=HostLayers((1, 4), take),
    )
    (memory,) = taken
    assert cache.host_bytes == memory.numel() == 2 * page_bytes(whole) // 5 * 6
    assert cache.num_bytes() == 3 * page_bytes(whole) // 5 * 6
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
    for n in range(5):
        for ours, theirs in ((cache.keys[n], whole.keys[n]), (cache.values[n], whole.values[n])):
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
            assert not ours.any()
            assert (begin <= ours.data_ptr() < end) == (n in {1, 4})
            ours.fill_(n + 1)
    for n in range(5):
        assert (cache.keys[n] == n + 1).all()
        assert (cache.values[n] == n + 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_same_wherever_the_layers_have_their_pages(
    mode: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama")
    requests = make_requests((9, 3, 14, 6, 2, 11), lambda n: sampled(n).replace(max_new_tokens=12))
    wanted = plain_outcomes(model, requests)
    plan = engine_plan(2, graphs=mode == "replayed", max_sequences=4)
    stages = tuple(
        replace(s, kv_in_host=KvInHost(tuple(range(s.first_layer + 1, s.last_layer))))
        for s in plan.stages
    )
    pipeline = EnginePipeline(model, replace(plan, stages=stages), mode).prepare()
    found = pipeline.generate(requests)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    caches = [cache_of(stage) for stage in pipeline.models]
    in_host = [cache.host_bytes for cache in caches if isinstance(cache, PagedKVCache)]
    assert len(in_host) == 2
    assert sum(in_host) > 0
