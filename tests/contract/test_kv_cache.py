from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch

from mpipipe.kv_cache.base import ContiguousKVCache, KVCache
from mpipipe.kv_cache.layout import SequenceLens, build_layout
from mpipipe.kv_cache.paged import PagedKVCache
from tests.contract.attention_cases import NUM_PAGES, PAGE_SIZE, PageTable, Shape, random_steps

SHAPE = Shape(4, 2, 8)


def new_paged(
    num_layers: int = 2, num_pages: int = NUM_PAGES, *, head_major: bool = False
) -> PagedKVCache:
    return PagedKVCache.allocate(
        num_layers=num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        dtype=torch.float32,
        head_major=head_major,
    )


CACHES: dict[str, Callable[[], KVCache]] = {
    "paged": new_paged,
    "head-major": lambda: new_paged(head_major=True),
    "contiguous": ContiguousKVCache,
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> KVCache:
    return CACHES[request.param]()


def test_head_major_pages_have_the_same_shape_and_other_strides() -> None:
    plain, strided = new_paged(), new_paged(head_major=True)
    for ours, theirs in zip(strided.keys, plain.keys, strict=True):
        assert ours.shape == theirs.shape
        assert ours.transpose(1, 2).is_contiguous()
        assert not ours.is_contiguous()
    assert strided.num_bytes() == plain.num_bytes()


def test_the_layout_says_where_every_token_goes() -> None:
    layout = build_layout(
        [
            (SequenceLens(7, query_start=0, query_len=1, kv_len=5), [9, 2, 8]),
            (SequenceLens(3, query_start=1, query_len=3, kv_len=6), [4, 1]),
        ],
        page_size=4,
    )
    assert layout.num_tokens == 4
    assert layout.num_decodes == 1
    assert layout.positions_T.tolist() == [4, 3, 4, 5]
    assert layout.slot_mapping_T.tolist() == [2 * 4 + 0, 4 * 4 + 3, 1 * 4 + 0, 1 * 4 + 1]
    assert layout.page_table_BP.tolist() == [[9, 2], [4, 1]]
    assert layout.kv_lens_B.tolist() == [5, 6]
    assert layout.seq_lens[1].num_computed == 3


def test_a_layout_of_nothing_is_empty() -> None:
    layout = build_layout([], page_size=4)
    assert layout.num_tokens == 0
    assert layout.num_decodes == 0


def test_rows_that_leave_a_gap_are_our_bug() -> None:
    with pytest.raises(AssertionError):
        build_layout([(SequenceLens(0, query_start=2, query_len=1, kv_len=1), [0])], page_size=4)


def test_a_cache_returns_what_was_written(cache: KVCache) -> None:
    written: dict[tuple[int, int], list[torch.Tensor]] = {}
    for step in random_steps(SHAPE, torch.float32):
        layout, key_TKD, value_TKD = step.layout, step.key_TKD, step.value_TKD
        for layer, sign in ((0, 1.0), (1, -1.0)):
            cache.write(layer, sign * key_TKD, sign * value_TKD, layout)
            for index, span in enumerate(layout.seq_lens):
                rows = slice(span.query_start, span.query_start + span.query_len)
                history = written.setdefault((layer, span.sequence_id), [])
                history.append(sign * torch.stack((key_TKD[rows], value_TKD[rows])))
                expected = torch.cat(history, dim=1)
                key_LKD, value_LKD = cache.read(layer, index, span, layout)
                assert torch.equal(key_LKD, expected[0])
                assert torch.equal(value_LKD, expected[1])


def test_padded_reads_hold_the_same_tokens_as_single_reads(cache: KVCache) -> None:
    for step in random_steps(SHAPE, torch.float32):
        layout, key_TKD, value_TKD = step.layout, step.key_TKD, step.value_TKD
        cache.write(0, key_TKD, value_TKD, layout)
        indices = tuple(reversed(range(len(layout.seq_lens))))
        max_len = max(span.kv_len for span in layout.seq_lens)
        keys_BLKD, values_BLKD = cache.read_padded(0, indices, max_len, layout)
        assert keys_BLKD.shape[1] >= max_len
        for row, index in enumerate(indices):
            span = layout.seq_lens[index]
            key_LKD, value_LKD = cache.read(0, index, span, layout)
            assert torch.equal(keys_BLKD[row, : span.kv_len], key_LKD)
            assert torch.equal(values_BLKD[row, : span.kv_len], value_LKD)
        assert bool(torch.isfinite(keys_BLKD).all())
        assert bool(torch.isfinite(values_BLKD).all())


def test_a_preempted_sequence_starts_again_from_nothing(cache: KVCache) -> None:
    pages = PageTable()
    first = torch.ones(6, SHAPE.num_kv_heads, SHAPE.head_dim)
    again = 2 * torch.ones(3, SHAPE.num_kv_heads, SHAPE.head_dim)
    cache.write(0, first, first, pages.layout([(0, 6)]))
    pages.drop(0)
    layout = pages.layout([(0, 3)])
    cache.write(0, again, again, layout)
    key_LKD, value_LKD = cache.read(0, 0, layout.seq_lens[0], layout)
    assert torch.equal(key_LKD, again)
    assert torch.equal(value_LKD, again)


def test_forgetting_a_sequence_frees_the_contiguous_cache() -> None:
    cache = ContiguousKVCache()
    tokens = torch.ones(2, SHAPE.num_kv_heads, SHAPE.head_dim)
    cache.write(
        0, tokens.repeat(2, 1, 1), tokens.repeat(2, 1, 1), PageTable().layout([(0, 2), (1, 2)])
    )
    one_sequence = 2 * tokens.nbytes
    assert cache.num_bytes() == 2 * one_sequence
    cache.forget(0)
    assert cache.num_bytes() == one_sequence
    cache.forget(5)  # a sequence never seen is nothing to complain about


def test_reserved_pages_are_zero_and_cost_no_memory_until_written() -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = new_paged(num_layers=2, num_pages=1_000_000)
    assert cache.num_bytes() == 2 * 2 * 1_000_000 * PAGE_SIZE * 2 * 8 * 4  # 1 GB
    assert not cache.keys[1][-1].any()
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after_kib - before_kib < 50_000
