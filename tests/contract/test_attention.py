from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from mpipipe.kv_cache.base import ContiguousKVCache, KVCache
from mpipipe.kv_cache.layout import SequenceLens, build_layout, to_device
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention import sdpa, triton_paged
from mpipipe.models.attention.base import AttentionBackend
from mpipipe.models.attention.reference import ReferenceAttention
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention.select import make_backend
from mpipipe.models.attention.triton_paged import TritonAttention, can_attend_fresh
from mpipipe.models.layer_options import AttentionOptions
from tests.contract.attention_cases import (
    NUM_PAGES,
    PAGE_SIZE,
    PageTable,
    Shape,
    Step,
    on_device,
    random_steps,
    shared_step,
    sharing_steps,
    without_spans,
)

SHAPES = {
    "multi-head": Shape(4, 4, 16),
    "grouped": Shape(6, 2, 16),
    "multi-query": Shape(4, 1, 8),
    "head_dim-100": Shape(2, 2, 100),
}
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
OPTIONS = {
    "plain": AttentionOptions(scale=0.25),
    "unscaled": AttentionOptions(scale=1.0),
    "window": AttentionOptions(scale=0.25, window=3),
    "softcap": AttentionOptions(scale=0.25, softcap=2.0),
    "window-softcap": AttentionOptions(scale=0.25, window=5, softcap=2.0),
}


MAX_KV_LEN = 224  # a bound for the longest sequence of `random_steps`, not its length


def new_cache(
    name: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    *,
    head_major: bool = False,
) -> KVCache:
    if name == "contiguous":
        return ContiguousKVCache()
    return PagedKVCache.allocate(
        num_layers=1,
        num_pages=NUM_PAGES + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
        head_major=head_major,
    )


def attend(
    backend: AttentionBackend, step: Step, cache: KVCache, options: AttentionOptions
) -> torch.Tensor:
    return backend.attend(
        layer=0,
        query_THD=step.query_THD,
        key_TKD=step.key_TKD,
        value_TKD=step.value_TKD,
        cache=cache,
        layout=step.layout,
        options=options,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cache_name", ["paged", "contiguous"])
@pytest.mark.parametrize("backend", [SdpaAttention(), ReferenceAttention()], ids=lambda b: b.name)
def test_every_backend_and_cache_agrees_with_the_reference_over_the_oracle(
    backend: AttentionBackend,
    cache_name: str,
    shape: Shape,
    options: AttentionOptions,
) -> None:
    cache = new_cache(cache_name, shape)
    oracle = ContiguousKVCache()
    for step in random_steps(shape, torch.float32):
        expected = attend(ReferenceAttention(), step, oracle, options)
        actual = attend(backend, step, cache, options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def check_varlen_steps(
    backend: AttentionBackend,
    shape: Shape,
    options: AttentionOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Steps of every kind as a GPU gets them, over both page layouts. Also run on GPUs."""
    for head_major in (False, True):
        cache = new_cache("paged", shape, dtype, device, head_major=head_major)
        oracle = ContiguousKVCache()
        for step in random_steps(shape, dtype):
            expected = attend(ReferenceAttention(), step, oracle, options)
            actual = attend(backend, on_device(step, device), cache, options)
            assert actual.dtype == dtype
            torch.testing.assert_close(
                actual.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )
        shared, whole, rows = shared_step(shape, dtype)
        expected = attend(ReferenceAttention(), whole, ContiguousKVCache(), options)[rows]
        actual = attend(backend, on_device(shared, device), cache, options)
        torch.testing.assert_close(
            actual.cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def check_decode_steps(
    backend: AttentionBackend,
    shape: Shape,
    options: AttentionOptions,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Decode steps from device tensors alone, with an empty row. Also run on GPUs."""
    cache = new_cache("paged", shape, dtype, device, head_major=True)
    oracle = ContiguousKVCache()
    num_decode_steps = 0
    for step in random_steps(shape, dtype):
        expected = attend(ReferenceAttention(), step, oracle, options)
        there = on_device(step, device)
        if step.layout.is_decode:
            there = without_spans(there, max_kv_len=MAX_KV_LEN, spare_page=NUM_PAGES)
            num_decode_steps += 1
        actual = attend(backend, there, cache, options)
        assert bool(torch.isfinite(actual).all())
        torch.testing.assert_close(
            actual[: len(expected)].cpu(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    assert num_decode_steps >= 2


def filled_cache(shape: Shape, dtype: torch.dtype, device: torch.device = CPU) -> PagedKVCache:
    """Pages of random keys and values."""
    cache = new_cache("paged", shape, dtype, device, head_major=device.type != "cpu")
    assert isinstance(cache, PagedKVCache)
    generator = torch.Generator().manual_seed(3)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(dtype))
    return cache


@pytest.fixture
def num_joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each call that read pages together, however few tokens that spares."""
    found: list[int] = []
    join = sdpa._attend_joined

    def counted(query_BKGD: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(len(query_BKGD))
        return join(query_BKGD, *rest)

    monkeypatch.setattr(sdpa, "MIN_SPARED_TOKENS", 1)
    monkeypatch.setattr(sdpa, "_attend_joined", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_decodes_that_share_pages_read_them_together(
    shape: Shape, options: AttentionOptions, dtype: torch.dtype, num_joined: list[int]
) -> None:
    cache = filled_cache(shape, dtype)
    for step in sharing_steps(shape, dtype):
        actual = attend(SdpaAttention(), step, cache, options)
        expected = attend(ReferenceAttention(), step, cache, options)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    together = options.softcap is None and options.window is None
    # By step: those of A and those of B; those of A, but for one that is far longer; those with the
    # first two pages of A only, and those with most of it.
    assert num_joined == ([3, 2, 3, 2, 3] if together else [])


def test_decodes_beside_chunks_read_what_they_share_together(num_joined: list[int]) -> None:
    """And a window that no sequence reaches is none."""
    shape, options = SHAPES["grouped"], AttentionOptions(scale=0.25, window=64)
    cache = filled_cache(shape, torch.float32)
    first = next(sharing_steps(shape, torch.float32))
    pages = first.layout.page_table_BP.tolist()
    entries = [(seq, pages[seq.sequence_id]) for seq in first.layout.seq_lens]
    entries.append((SequenceLens(6, 6, 5, 17), [*pages[2][:3], 48, 49]))
    generator = torch.Generator().manual_seed(4)
    step = Step(
        build_layout(entries, PAGE_SIZE),
        *(
            torch.randn(11, heads, shape.head_dim, generator=generator)
            for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        ),
    )
    actual = attend(SdpaAttention(), step, cache, options)
    torch.testing.assert_close(
        actual, attend(ReferenceAttention(), step, cache, options), rtol=1e-5, atol=1e-5
    )
    assert num_joined == [3, 2]


def test_few_tokens_in_common_are_read_by_each_sequence(
    num_joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES["grouped"]
    cache = filled_cache(shape, torch.float32)
    # What the three of the first step spare, and one more.
    monkeypatch.setattr(sdpa, "MIN_SPARED_TOKENS", 49)
    for step, _ in zip(sharing_steps(shape, torch.float32), range(1), strict=False):
        attend(SdpaAttention(), step, cache, OPTIONS["plain"])
    assert num_joined == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("backend", [SdpaAttention(), ReferenceAttention()], ids=lambda b: b.name)
def test_layouts_for_a_gpu_and_strided_pages_change_nothing(
    backend: AttentionBackend, options: AttentionOptions
) -> None:
    check_varlen_steps(backend, SHAPES["grouped"], options, torch.float32, CPU)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_sdpa_decodes_from_tensors_alone(shape: Shape, options: AttentionOptions) -> None:
    check_decode_steps(SdpaAttention(), shape, options, torch.float32, CPU)


if importlib.util.find_spec("triton") is not None:  # in its interpreter: see conftest.py

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ("grouped", "plain"),
            ("multi-query", "window-softcap"),
            ("head_dim-100", "window"),
        ],
    )
    def test_triton_agrees_with_the_reference(shape: str, options: str) -> None:
        backend = TritonAttention()
        check_varlen_steps(backend, SHAPES[shape], OPTIONS[options], torch.float32, CPU)
        check_decode_steps(backend, SHAPES[shape], OPTIONS[options], torch.float32, CPU)


@pytest.mark.parametrize("backend", [SdpaAttention(), ReferenceAttention()], ids=lambda b: b.name)
def test_keys_and_values_that_are_stored_already_are_not_written_again(
    backend: AttentionBackend,
) -> None:
    shape, options = SHAPES["grouped"], OPTIONS["plain"]
    oracle, cache = new_cache("paged", shape), new_cache("paged", shape)
    for step in random_steps(shape, torch.float32):
        expected = attend(backend, step, oracle, options)
        cache.write(0, step.key_TKD, step.value_TKD, step.layout)
        before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]  # type: ignore[attr-defined]
        actual = backend.attend(
            layer=0,
            query_THD=step.query_THD,
            key_TKD=step.key_TKD,
            value_TKD=step.value_TKD,
            cache=cache,
            layout=step.layout,
            options=options,
            stored=True,
        )
        assert torch.equal(actual, expected)
        after = [*cache.keys, *cache.values]  # type: ignore[attr-defined]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_the_reference_is_softmax_of_the_written_formula() -> None:
    # two keys, one head, one dimension: weights are exp(s1) / (exp(s1) + exp(s2))
    layout = PageTable().layout([(0, 2)])
    query = torch.tensor([[[1.0]], [[2.0]]])
    key = torch.tensor([[[0.5]], [[-1.0]]])
    value = torch.tensor([[[10.0]], [[20.0]]])
    output = attend(
        ReferenceAttention(),
        Step(layout, query, key, value),
        ContiguousKVCache(),
        AttentionOptions(scale=3.0),
    )
    weight = torch.sigmoid(torch.tensor(3.0 * 2.0 * (0.5 - -1.0)))
    expected = torch.stack([torch.tensor(10.0), 10.0 * weight + 20.0 * (1 - weight)])
    torch.testing.assert_close(output.flatten(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_half_precision_stays_near_the_reference(
    dtype: torch.dtype, options: AttentionOptions
) -> None:
    shape = SHAPES["grouped"]
    cache = new_cache("paged", shape, dtype)
    oracle = ContiguousKVCache()
    for step in random_steps(shape, dtype):
        expected = attend(ReferenceAttention(), step, oracle, options)
        actual = attend(SdpaAttention(), step, cache, options)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


def test_what_lies_beyond_a_sequence_in_its_last_page_has_no_influence() -> None:
    shape = SHAPES["grouped"]
    outputs: list[torch.Tensor] = []
    for stale in (0.0, 1e4):
        cache = new_cache("paged", shape)
        assert isinstance(cache, PagedKVCache)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(stale)
        outputs.extend(
            attend(SdpaAttention(), step, cache, OPTIONS["plain"])
            for step in random_steps(shape, torch.float32)
        )
    half = len(outputs) // 2
    for clean, dirty in zip(outputs[:half], outputs[half:], strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(
    ("shape", "has_flash", "with_torch"),
    [
        ("multi-head", True, True),
        ("grouped", True, True),
        ("multi-head", False, True),
        ("grouped", False, False),
    ],
)
def test_torch_attends_fresh_prompts_only_where_it_has_a_kernel(
    shape: str, has_flash: bool, with_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before compute capability 8.0 none takes grouped heads: all scores would be written out."""
    monkeypatch.setattr(triton_paged, "_has_flash_kernel", lambda device: has_flash)
    heads = SHAPES[shape]
    query = torch.zeros(8, heads.num_heads, heads.head_dim, dtype=torch.float16)
    key = torch.zeros(8, heads.num_kv_heads, heads.head_dim, dtype=torch.float16)
    layout = to_device(PageTable().layout([(0, 4), (1, 4)]), lambda tensor: tensor)
    assert can_attend_fresh(query, key, layout, OPTIONS["plain"]) == with_torch


@pytest.mark.parametrize("name", ["triton", "flashinfer", "varlen", "sdpa", "reference"])
def test_every_backend_is_made_by_its_name(name: str) -> None:
    assert make_backend(name).name == name
