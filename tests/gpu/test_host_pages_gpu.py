"""KV pages that go to pinned host memory and back: the same tokens, and nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.messages import PagesRestored, PagesSaved
from mpipipe.kv_cache.host_pages import HostPages, page_bytes
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.planning.plan import KvInHost
from mpipipe.types import Request, SamplingParams
from mpipipe.weights.pinned_memory import PinnedMemory, device_view
from tests.contract.engine_pipeline import (
    EnginePipeline,
    cache_of,
    engine_plan,
    make_requests,
)
from tests.contract.tiny_models import TinyModel
from tests.gpu.test_engine_gpu import MODES, on_gpu, sampled
from tests.gpu.waiting import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("own_stream"),
]
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)


def new_cache(device: torch.device, *, head_major: bool) -> PagedKVCache:
    cache = PagedKVCache.allocate(
        num_layers=4,
        num_pages=40,
        page_size=16,
        num_kv_heads=2,
        head_dim=100,
        dtype=torch.bfloat16,
        device=device,
        head_major=head_major,
    )
    for part in (*cache.keys, *cache.values):
        part.copy_(torch.randn(part.shape, device=device))
    return cache


LATE_CYCLES = 20_000_000  # some 10 ms: longer than what reads or overwrites the pages meanwhile


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of copies is late, so that whoever does not wait for it sees other bytes."""
    copy = HostPages._copy

    def late(self: HostPages, *pages: Any, to_host: bool) -> None:
        with torch.cuda.stream(self._copies):
            torch.cuda._sleep(LATE_CYCLES)  # type: ignore[no-untyped-call]
        copy(self, *pages, to_host=to_host)

    monkeypatch.setattr(HostPages, "_copy", late)


def settle_nothing(self: HostPages, pages: Iterable[int]) -> None:
    """In the place of `HostPages.settle`: what follows waits for no copy."""


@pytest.mark.usefixtures("late_copies")
@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("head_major", [False, True])
def test_pages_come_back_as_they_were(
    head_major: bool, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of few pages, also where memory could not be pinned."""
    monkeypatch.setattr("mpipipe.kv_cache.host_pages._BATCH_BYTES", 1 << 16)
    check_pages_come_back(head_major=head_major, is_pinned=is_pinned)


@pytest.mark.usefixtures("late_copies")
def test_pages_that_nothing_waits_for_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would prove nothing."""
    monkeypatch.setattr(HostPages, "settle", settle_nothing)
    with pytest.raises(AssertionError):
        check_pages_come_back(head_major=True, is_pinned=True)


def check_pages_come_back(*, head_major: bool, is_pinned: bool) -> None:
    """Save pages, overwrite them, restore them to other places, and look at what is there."""
    device = torch.device("cuda", torch.cuda.current_device())
    cache_ = new_cache(device, head_major=head_major)
    before = [part.clone() for part in (*cache_.keys, *cache_.values)]
    pinned = PinnedMemory(device)
    memory = pinned.take(30 * page_bytes(cache_))
    seen = device_view(memory, device) if is_pinned else memory.clone()
    pages = HostPages(cache_, seen, 30, lambda ids: ids.to(device))
    source, host = list(range(7, 32)), list(range(28, 3, -1))
    pages.save(source, host)
    pages.settle(source)
    for part in (*cache_.keys, *cache_.values):
        part.zero_()
    target = [*range(25, 40), *range(10)]
    pages.restore(host, target)
    pages.settle(target)
    for part, was in zip((*cache_.keys, *cache_.values), before, strict=True):
        assert torch.equal(part[target], was[source])
        assert not part[10:25].any()
    torch.cuda.synchronize()
    use = pages.use()
    assert use.saved_bytes == use.restored_bytes == 25 * page_bytes(cache_)
    assert (use.bytes_per_s or 0) > 0
    del pages, seen
    pinned.close()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("num_host_pages", [4, 40])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_preempted_sequences_go_on_with_their_pages_and_end_the_same(
    num_stages: int, num_host_pages: int, name: str, tiny: Callable[[str], TinyModel]
) -> None:
    """With all sampling options: the tokens of a cache that holds everything."""
    model = tiny("llama-head_dim-100")
    requests: list[Request] = make_requests((*LENGTHS, *LENGTHS), sampled)
    with closing(
        on_gpu(model, num_stages, name, max_sequences=4, num_pages=90, num_host_pages=0)
    ) as roomy:
        wanted = roomy.generate(requests, seed=1)
        assert not roomy.num_preemptions
    tight = on_gpu(
        model, num_stages, name, max_sequences=4, num_pages=16, num_host_pages=num_host_pages
    )
    num_saved = 0
    with closing(tight):
        for seed in range(3):
            found = tight.generate(requests, seed=seed)
            assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
            num_saved += tight.num_saved
            assert (tight.num_saved < tight.num_preemptions) or num_host_pages == 40
        for engine in tight.engines:
            use = engine.page_moves()
            assert use is not None
            assert use.saved_bytes >= use.restored_bytes > 0
    assert num_saved > 3


@pytest.mark.usefixtures("late_copies")
@pytest.mark.parametrize("settles", [True, False])
def test_greedy_tokens_are_those_of_transformers_when_pages_move(
    settles: bool, tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others where steps do not wait for the pages that they read."""
    if not settles:
        monkeypatch.setattr(HostPages, "settle", settle_nothing)
    model = tiny("llama")
    requests = make_requests(LENGTHS, lambda _: SamplingParams(max_new_tokens=20, ignore_eos=True))
    wanted = [model.greedy(r.prompt_ids, 20) for r in requests]
    with closing(
        on_gpu(model, 2, "graphs", max_sequences=4, num_pages=16, num_host_pages=60)
    ) as pipeline:
        found = pipeline.generate(requests)
        assert pipeline.num_saved > 0
    assert ([list(outcome.token_ids) for outcome in found] == wanted) == settles


def test_moving_pages_waits_for_nothing(tiny: Callable[[str], TinyModel]) -> None:
    with closing(
        on_gpu(tiny("llama"), 1, "graphs", max_sequences=4, num_pages=16, num_host_pages=60)
    ) as pipeline:
        requests = make_requests(
            LENGTHS, lambda _: SamplingParams(max_new_tokens=20, ignore_eos=True)
        )
        pipeline.generate(requests)  # the rings of pinned memory are there, kernels loaded
        (engine,) = pipeline.engines
        opened: Any = engine.request_table
        opened._request_row_of[0] = 0
        with no_synchronisation():
            engine.move_pages(PagesSaved((3, 1, 2), (5, 0, 9)))
            engine.move_pages(PagesRestored(0, 30, (0, 9, 5), (7, 8, 9)))
            with torch.inference_mode():
                engine._settle_pages((1, 7), (0,), ())
        opened._request_row_of.clear()


def test_memory_that_cannot_be_pinned_still_moves_pages(
    tiny: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        """CUDA with a small limit of locked memory."""

        def __init__(self, cudart: Any) -> None:
            self._cudart = cudart

        def cudaHostRegister(self, *_: object) -> int:
            return 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._cudart, name)

    cudart: Callable[[], Any] = torch.cuda.cudart
    refusing = Refusing(cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    model = tiny("llama")
    requests = make_requests(LENGTHS, lambda _: SamplingParams(max_new_tokens=20, ignore_eos=True))
    wanted = [model.greedy(r.prompt_ids, 20) for r in requests]
    with closing(
        on_gpu(model, 1, "graphs", max_sequences=4, num_pages=16, num_host_pages=60)
    ) as pipeline:
        assert pipeline.pinned.refused_bytes > 0
        found = pipeline.generate(requests)
        assert pipeline.num_saved > 0
    assert [list(outcome.token_ids) for outcome in found] == wanted


# ---- layers whose pages are in host memory -------------------------------------------------------


@pytest.mark.parametrize("name", ["graphs", "eager"])
@pytest.mark.parametrize("family", ["llama", "llama-head_dim-100", "qwen3", "opt"])
def test_tokens_are_the_same_with_the_cache_of_layers_in_host_memory(
    family: str, name: str, tiny: Callable[[str], TinyModel]
) -> None:
    """All layers but one of a stage, in steps of prompts and in graphs; opt: its own modules."""
    model = tiny(family)
    requests = make_requests(
        LENGTHS, lambda n: SamplingParams(max_new_tokens=9 + n % 3, ignore_eos=True)
    )
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    for num_stages in (1, 2):
        plan = engine_plan(
            num_stages,
            graphs=name == "graphs",
            hidden_size=model.reference.config.hidden_size,
            max_tokens_per_step=7,  # chunks that begin in the middle of a prompt read the cache
        )
        stages = tuple(
            replace(s, kv_in_host=KvInHost(tuple(range(s.first_layer + 1, s.last_layer))))
            for s in plan.stages
        )
        plan = replace(plan, stages=stages)
        device = f"cuda:{torch.cuda.current_device()}"
        pipeline = EnginePipeline(model, plan, MODES[name], MonotonicClock(), device).prepare()
        with closing(pipeline):
            for seed in range(2):
                found = pipeline.generate(requests, seed=seed)
                assert [list(outcome.token_ids) for outcome in found] == wanted
            caches = [cache_of(stage) for stage in pipeline.models]
            assert sum(c.host_bytes for c in caches if isinstance(c, PagedKVCache)) > 0
