"""Every kernel computes what its torch counterpart does: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mpipipe.models.kernels import probe
from mpipipe.models.layer_options import AttentionOptions

pytest.importorskip("triton", reason="triton is part of the dev extra on Linux x86_64 only")

from mpipipe.models.kernels.decode_attention import (
    DecodeTuning,
    num_pieces,
    paged_decode_attention,
)
from mpipipe.models.kernels.decode_rows import advance_rows, greedy_ids
from mpipipe.models.kernels.launch import MAX_COUNTERS
from mpipipe.models.kernels.linear import (
    LinearTuning,
    default_tuning,
    prefers_small_linear,
    small_linear,
)
from mpipipe.models.kernels.prefill_attention import (
    Chunks,
    PrefillTuning,
    paged_prefill_attention,
)
from mpipipe.models.kernels.rotary import rotate_and_store
from mpipipe.models.kernels.rowwise import add_rms_norm, gated_silu, rms_norm
from mpipipe.models.layer_options import HeadNorms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE_SIZE = 16
POISON = 6.0e4  # finite where unwritten cells may be multiplied by zero, wrong everywhere else
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # a sum of products
# Same rounding steps, so only the order of the float32 sums differs. Triton's interpreter cuts off
# where bfloat16 should be rounded: up to three steps, each up to 2^-7.
INTERPRETED = DEVICE.type == "cpu"
ROUNDING = {
    torch.float32: 1e-6,
    torch.float16: 2e-4,
    torch.bfloat16: 2e-2 if INTERPRETED else 1e-3,
}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


# It also multiplies bfloat16 matrices by their bits; there, only a GPU says anything.
DOT_DTYPES = DTYPES[:2] if INTERPRETED else DTYPES


def exact(dtype: torch.dtype) -> bool:
    return not INTERPRETED or dtype != torch.bfloat16


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= tolerance, f"relative error {error:.2e}"
    worst = (actual.float() - expected.float()).abs().max()
    assert worst <= 10 * tolerance * expected.float().abs().max(), f"worst error {worst:.2e}"


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 320, 1000])
def test_rms_norm_rounds_as_transformers_does(size: int, dtype: torch.dtype) -> None:
    hidden_TH = drawn(5, size, dtype=dtype)
    module = LlamaRMSNorm(size, eps=1e-6).to(DEVICE, dtype)
    module.weight.data = drawn(size, dtype=dtype)
    strided_TH = drawn(5, 2 * size, dtype=dtype)[:, :size]
    for rows_TH in (hidden_TH, strided_TH):
        actual_TH = rms_norm(rows_TH, module.weight.data, 1e-6)
        assert_near(actual_TH, module(rows_TH).detach(), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_returns_the_rounded_sum_and_its_norm(dtype: torch.dtype) -> None:
    hidden_TH, residual_TH = drawn(4, 320, dtype=dtype), drawn(4, 320, dtype=dtype, seed=1)
    weight_H = drawn(320, dtype=dtype)
    normed_TH, sum_TH = add_rms_norm(hidden_TH, residual_TH, weight_H, 1e-5)
    assert_near(sum_TH, hidden_TH + residual_TH, 0 if exact(dtype) else ROUNDING[dtype])
    assert torch.equal(normed_TH, rms_norm(sum_TH, weight_H, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 1536])
def test_gated_silu_is_silu_of_gate_times_up(size: int, dtype: torch.dtype) -> None:
    gate_up_TX = drawn(3, 2 * size, dtype=dtype) * 3
    gate_TI, up_TI = gate_up_TX.chunk(2, dim=1)
    assert_near(gated_silu(gate_up_TX), silu(gate_TI) * up_TI, ROUNDING[dtype])


def test_empty_steps_are_allowed() -> None:
    nothing_TH = drawn(0, 64)
    assert rms_norm(nothing_TH, drawn(64), 1e-6).shape == (0, 64)
    assert gated_silu(nothing_TH).shape == (0, 32)


# ---- the cache -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


def cache_pair(
    heads: Heads, num_pages: int, layout: str, dtype: torch.dtype, fill: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[pages, page_size, K, D]; in memory heads first, or rows padded to a multiple of 8."""

    def one() -> torch.Tensor:
        K, D = heads.num_kv_heads, heads.head_dim
        if layout == "token-major":
            return torch.full((num_pages, PAGE_SIZE, K, D), fill, dtype=dtype, device=DEVICE)
        row = -(-D // 8) * 8 if layout == "head-major-padded" else D
        cells = torch.full((num_pages, K, PAGE_SIZE, row), fill, dtype=dtype, device=DEVICE)
        return cells[..., :D].transpose(1, 2)

    return one(), one()


LAYOUTS = ["token-major", "head-major", "head-major-padded"]


@dataclass(frozen=True, eq=False)
class Filled:
    """A cache that holds sequences in scattered pages, and what it holds."""

    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_table_BP: torch.Tensor
    kv_lens_B: torch.Tensor
    keys: list[torch.Tensor]  # per sequence [L, K, D]
    values: list[torch.Tensor]


def filled(heads: Heads, kv_lens: list[int], layout: str, dtype: torch.dtype) -> Filled:
    max_pages = max(-(-kv_len // PAGE_SIZE) for kv_len in kv_lens) + 1
    num_pages = len(kv_lens) * max_pages + 1
    key_cache, value_cache = cache_pair(heads, num_pages, layout, dtype, fill=POISON)
    key_cache[-1] = value_cache[-1] = float("nan")  # a stale page: never a part of any sum
    order = torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(0))
    table_BP = torch.full((len(kv_lens), max_pages), num_pages - 1, dtype=torch.int32)
    keys, values = [], []
    for index, kv_len in enumerate(kv_lens):
        pages_P = order[index * max_pages : index * max_pages + -(-kv_len // PAGE_SIZE)]
        table_BP[index, : len(pages_P)] = pages_P.int()
        keys.append(drawn(kv_len, heads.num_kv_heads, heads.head_dim, dtype=dtype, seed=index))
        values.append(drawn(kv_len, heads.num_kv_heads, heads.head_dim, dtype=dtype, seed=-index))
        for token in range(kv_len):
            place = int(pages_P[token // PAGE_SIZE]), token % PAGE_SIZE
            key_cache[place], value_cache[place] = keys[-1][token], values[-1][token]
    lens_B = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
    return Filled(key_cache, value_cache, table_BP.to(DEVICE), lens_B, keys, values)


def plain_attention(
    query_QHD: torch.Tensor,
    key_LKD: torch.Tensor,
    value_LKD: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Written out in float32: query i is at position L - Q + i."""
    num_queries, num_heads, _ = query_QHD.shape
    kv_len = key_LKD.shape[0]
    repeat = num_heads // key_LKD.shape[1]
    key_LHD = key_LKD.float().repeat_interleave(repeat, dim=1)
    value_LHD = value_LKD.float().repeat_interleave(repeat, dim=1)
    scores = torch.einsum("qhd,lhd->hql", query_QHD.float(), key_LHD) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    at_Q1 = torch.arange(kv_len - num_queries, kv_len, device=DEVICE)[:, None]
    at_L = torch.arange(kv_len, device=DEVICE)
    hidden_QL = at_L > at_Q1
    if options.window is not None:
        hidden_QL |= at_L <= at_Q1 - options.window
    weights = scores.masked_fill(hidden_QL, float("-inf")).softmax(dim=-1)
    return torch.einsum("hql,lhd->qhd", weights, value_LHD)


# ---- rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "with_norms"),
    [
        (Heads(4, 4, 100), False),
        (Heads(6, 2, 64), True),
        (Heads(3, 3, 40), False),
        (Heads(4, 1, 40), True),
    ],
)
def test_rotation_is_transformers_and_lands_in_the_cache(
    heads: Heads, with_norms: bool, dtype: torch.dtype, layout: str
) -> None:
    H, K, D = heads.num_heads, heads.num_kv_heads, heads.head_dim
    num_tokens = 3
    qkv_TX = drawn(num_tokens, (H + 2 * K) * D, dtype=dtype)
    before_TX = qkv_TX.clone()
    angles_TD = torch.rand(num_tokens, D // 2).repeat(1, 2).to(DEVICE) * 6
    cos_TD, sin_TD = angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)
    query_D, key_D = drawn(D, dtype=dtype, seed=1), drawn(D, dtype=dtype, seed=2)
    key_cache, value_cache = cache_pair(heads, 5, layout, dtype)
    slots = [3 * PAGE_SIZE + 15, 4 * PAGE_SIZE, PAGE_SIZE + 1]
    norms = HeadNorms(query_D, key_D, 1e-6) if with_norms else None
    actual = rotate_and_store(
        qkv_TX, cos_TD, sin_TD, key_cache, value_cache,
        slot_mapping_T=torch.tensor(slots, device=DEVICE), norms=norms,
    )  # fmt: skip

    query_THD = before_TX[:, : H * D].view(num_tokens, H, D)
    key_TKD = before_TX[:, H * D : (H + K) * D].view(num_tokens, K, D)
    value_TKD = before_TX[:, (H + K) * D :].view(num_tokens, K, D)
    if with_norms:
        module = Qwen3RMSNorm(D, eps=1e-6).to(DEVICE, dtype)
        module.weight.data = query_D
        query_THD = module(query_THD)
        module.weight.data = key_D
        key_TKD = module(key_TKD)
    turned = apply_rotary_pos_emb(
        query_THD[None], key_TKD[None], cos_TD[None], sin_TD[None], unsqueeze_dim=2
    )
    query_THD, key_TKD = turned[0][0], turned[1][0]
    for result, expected in zip(actual, (query_THD, key_TKD, value_TKD), strict=True):
        assert_near(result, expected.detach(), ROUNDING[dtype])
    assert torch.equal(qkv_TX, before_TX)
    for cache, rows in ((key_cache, actual[1]), (value_cache, actual[2])):
        for token, slot in enumerate(slots):
            assert torch.equal(cache[slot // PAGE_SIZE, slot % PAGE_SIZE], rows[token])
        assert int((cache != 0).flatten(2).any(dim=2).sum()) == num_tokens  # and nothing else


@pytest.mark.parametrize("head_dim", [100, 60, 20])  # 60: the padding exceeds a block of halves
def test_padding_of_rows_that_are_written_becomes_zeros(head_dim: int) -> None:
    heads = Heads(4, 2, head_dim)
    caches = cache_pair(heads, 3, "head-major-padded", torch.float32, fill=POISON)
    angles_TD = torch.rand(2, head_dim, device=DEVICE)
    slots_T = torch.tensor([PAGE_SIZE - 1, 2 * PAGE_SIZE], device=DEVICE)
    rotate_and_store(
        drawn(2, 8 * head_dim, dtype=torch.float32), angles_TD, angles_TD, *caches,
        slot_mapping_T=slots_T,
    )  # fmt: skip
    for cache in caches:
        row = cache.stride(1)
        rows = cache.as_strided((3, PAGE_SIZE, 2, row), cache.stride())
        written = (rows != POISON).any(dim=3)
        assert written.flatten(0, 1)[slots_T].all()
        assert int(written.sum()) == 2 * 2
        assert (rows[written][:, head_dim:] == 0.0).all()
        assert row > head_dim


# ---- attention -----------------------------------------------------------------------------------

SHAPES = [Heads(2, 2, 100), Heads(8, 2, 64), Heads(2, 1, 80), Heads(3, 3, 96), Heads(4, 2, 160)]
OPTIONS = [
    AttentionOptions(0.1),
    AttentionOptions(0.1, window=20),
    AttentionOptions(0.3, softcap=2.0),
    AttentionOptions(0.1, window=70, softcap=5.0),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_decode_attention_of_every_shape(heads: Heads, pieces: int, layout: str) -> None:
    check_decode(heads, layout, torch.float32, OPTIONS[0], DecodeTuning(32, pieces=pieces))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pieces", [None, 1, 4])
def test_decode_attention_with_every_option(
    options: AttentionOptions, pieces: int | None, dtype: torch.dtype
) -> None:
    check_decode(Heads(4, 2, 100), "head-major", dtype, options, DecodeTuning(32, pieces=pieces))


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_the_last_program_of_a_row_joins_its_pieces(
    heads: Heads, options: AttentionOptions
) -> None:
    tuning = DecodeTuning(32, pieces=3)
    for _ in range(2):  # the counters are back at zero afterwards
        check_decode(heads, "head-major", torch.float32, options, tuning)


@pytest.mark.parametrize("processors", [16, 40, 132, 300])
def test_no_row_of_more_streams_than_counters_is_cut(processors: int) -> None:
    for max_kv_len in (1, 640, 131072):
        assert num_pieces(MAX_COUNTERS + 1, max_kv_len, 32, processors) == 1


def check_decode(
    heads: Heads, layout: str, dtype: torch.dtype, options: AttentionOptions, tuning: DecodeTuning
) -> None:
    kv_lens = [1, 0, 131, 32, 50, 33]
    held = filled(heads, kv_lens, layout, dtype)
    query_BHD = drawn(len(kv_lens), heads.num_heads, heads.head_dim, dtype=dtype)
    wide_BHX = torch.cat([query_BHD, query_BHD], dim=1)[:, : heads.num_heads]  # strided rows
    actual_BHD = paged_decode_attention(
        wide_BHX, held.key_cache, held.value_cache, held.page_table_BP, held.kv_lens_B,
        max_kv_len=200, options=options, tuning=tuning,
    )  # fmt: skip
    assert torch.equal(actual_BHD[1], torch.zeros_like(actual_BHD[1]))
    for row, (key_LKD, value_LKD) in enumerate(zip(held.keys, held.values, strict=True)):
        if kv_lens[row]:
            expected = plain_attention(query_BHD[row : row + 1], key_LKD, value_LKD, options)
            assert_near(actual_BHD[row : row + 1], expected, TOLERANCE[dtype])


def test_pieces_fill_the_gpu_and_no_more() -> None:
    for num_streams, measured_best in ((8, 10), (32, 10), (128, 4), (512, 1), (2048, 1), (8192, 1)):
        assert num_pieces(num_streams, 640, 64, 132) == measured_best
    assert num_pieces(8, 16, 64, 132) == 1
    assert num_pieces(8, 100_000, 64, 132) > 30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prefill_attention_of_every_shape(heads: Heads, layout: str) -> None:
    check_prefill(heads, layout, torch.float32, OPTIONS[0])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_attention_with_every_option(options: AttentionOptions, dtype: torch.dtype) -> None:
    check_prefill(Heads(4, 2, 100), "head-major", dtype, options)


def check_prefill(heads: Heads, layout: str, dtype: torch.dtype, options: AttentionOptions) -> None:
    # a fresh prompt; a chunk behind cached tokens; one token; a chunk as long as a block
    query_lens, kv_lens = [40, 21, 1, 16], [40, 110, 37, 16]
    held = filled(heads, kv_lens, layout, dtype)
    starts = [0, 40, 61, 62, 78]
    query_THD = drawn(starts[-1], heads.num_heads, heads.head_dim, dtype=dtype)
    actual_THD = paged_prefill_attention(
        query_THD, held.key_cache, held.value_cache, held.page_table_BP, held.kv_lens_B,
        chunks=Chunks(torch.tensor(starts, dtype=torch.int32, device=DEVICE), max(query_lens)),
        options=options, tuning=PrefillTuning(16, 32, 4, 1),
    )  # fmt: skip
    for index, (key_LKD, value_LKD) in enumerate(zip(held.keys, held.values, strict=True)):
        rows = slice(starts[index], starts[index + 1])
        expected = plain_attention(query_THD[rows], key_LKD, value_LKD, options)
        assert_near(actual_THD[rows], expected, TOLERANCE[dtype])


# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("num_rows", [1, 7, 32])
@pytest.mark.parametrize(("num_out", "num_in"), [(128, 256), (96, 200)])
@pytest.mark.parametrize("pieces", [1, 3])
def test_small_linear_is_linear(
    num_rows: int, num_out: int, num_in: int, pieces: int, dtype: torch.dtype
) -> None:
    tuning = LinearTuning(block_out=64, block_in=64, pieces=pieces)
    hidden_TH = drawn(num_rows, num_in, dtype=dtype)
    weight_OH, bias_O = drawn(num_out, num_in, dtype=dtype), drawn(num_out, dtype=dtype)
    plain = linear(hidden_TH.float(), weight_OH.float())
    for _ in range(2):  # the counters are back at zero afterwards
        actual = small_linear(hidden_TH, weight_OH, tuning=tuning)
        assert_near(actual, plain, TOLERANCE[dtype])
    actual = small_linear(hidden_TH, weight_OH, bias_O, tuning=tuning)
    assert_near(actual, plain + bias_O.float(), TOLERANCE[dtype])


def test_small_linear_is_cut_and_chosen_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr("mpipipe.models.kernels.linear.has_async_copy", lambda _: True)
    monkeypatch.setattr("mpipipe.models.kernels.linear.num_processors", lambda _: 132)
    for clear in (default_tuning.cache_clear, prefers_small_linear.cache_clear):
        clear()
    cuts = {
        (3200, 8640): (4, 4), (9600, 3200): (1, 4), (3200, 3200): (1, 6), (4096, 14336): (2, 6),
        (6144, 4096): (1, 6), (4096, 4096): (1, 6), (32000, 3200): (1, 4),
    }  # fmt: skip
    for (num_out, num_in), (pieces, stages) in cuts.items():
        tuning = default_tuning(num_out, num_in, hopper)
        assert (tuning.pieces, tuning.num_stages) == (pieces, stages), (num_out, num_in)
        assert prefers_small_linear(32, num_out, num_in, hopper)
        assert not prefers_small_linear(33, num_out, num_in, hopper)
    assert not prefers_small_linear(1, 17280, 3200, hopper)
    assert prefers_small_linear(1, 28672, 4096, hopper)
    assert not prefers_small_linear(1, 4096, 4096, torch.device("cpu"))
    for clear in (default_tuning.cache_clear, prefers_small_linear.cache_clear):
        clear()


# ---- probe ---------------------------------------------------------------------------------------


def test_probe_says_why_not() -> None:
    works, reason = probe.available()
    assert works == (reason == "")
    assert works or not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")


@pytest.mark.parametrize("num_rows", [1, 5, 130])
def test_advancing_rows_is_what_plain_torch_does(num_rows: int) -> None:
    from mpipipe.models.operations import torch_operations

    generator = torch.Generator().manual_seed(num_rows)
    kv_len_B = torch.randint(1, 60, (num_rows,), generator=generator).int()
    active_B = torch.ones(num_rows, dtype=torch.int32)
    kv_len_B[-1], active_B[-1] = 0, 0  # a row without a sequence
    pages_BP = torch.randint(0, 90, (num_rows, 4), generator=generator).int()
    request_rows_B = torch.randperm(num_rows, generator=generator)
    last_token_N = torch.randint(-1, 50, (num_rows + 1,), generator=generator)
    tensors = [t.to(DEVICE) for t in (kv_len_B, active_B, pages_BP, request_rows_B, last_token_N)]
    mine, plain = tensors[0].clone(), tensors[0].clone()
    found = advance_rows(mine, *tensors[1:], page_size=16)
    expected = torch_operations().advance_rows(plain, *tensors[1:], page_size=16)
    assert torch.equal(mine, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_ids", [97, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_ids_are_the_lowest_of_the_largest_and_minus_one_where_it_is_not_finite(
    num_ids: int, dtype: torch.dtype
) -> None:
    from mpipipe.models.operations import torch_operations

    generator = torch.Generator().manual_seed(num_ids)
    logits_SV = torch.randn(8, num_ids, generator=generator)
    logits_SV[0, num_ids - 1] = logits_SV[0, 13] = 9.0
    logits_SV[1, 3] = float("nan")
    logits_SV[2, num_ids // 2] = float("inf")
    logits_SV[3] = float("-inf")
    logits_SV[4, :-1] = float("-inf")
    logits_SV = logits_SV.to(dtype).to(DEVICE)
    found_S = greedy_ids(logits_SV)
    assert found_S[:5].tolist() == [13, -1, -1, -1, num_ids - 1]
    assert torch.equal(found_S, torch_operations().greedy_ids(logits_SV))


def test_kernels_read_nothing_before_they_await_their_inputs() -> None:
    """Not even weights: those of a streamed layer stand where a copy before the kernel put them."""
    waiting = 0
    for path in Path(probe.__file__).parent.glob("*.py"):
        for kernel in ast.walk(ast.parse(path.read_text())):
            if not isinstance(kernel, ast.FunctionDef) or kernel.name == "await_inputs":
                continue
            lines = [ast.unparse(statement) for statement in kernel.body]
            if "await_inputs(EARLY)" in lines:
                before = "\n".join(lines[: lines.index("await_inputs(EARLY)")])
                assert "load" not in before, f"{path.name}: {kernel.name}"
                waiting += 1
    assert waiting >= 10
