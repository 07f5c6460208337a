"""Steps through one stage for the suites of its forms, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpipipe.kv_cache.layout import (
    BatchLayout,
    SequenceLens,
    build_layout,
    decode_layout,
    to_device,
)
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.adapter import StageModel

STEP_PAGE_SIZE = 4
NUM_STEP_PAGES = 12
SPARE_PAGE = NUM_STEP_PAGES
MAX_KV_LEN = 20  # a bound: page_table_BP of `decode_step` is wider than what is used
_PAGES = {0: (7, 2, 9, 4, 0), 1: (1, 8, 3, 5, 6)}  # two sequences of up to 20 tokens
# Two fresh prompts; a decode beside a chunk; one decode and then a chunk of its neighbour alone.
RAGGED_STEPS = (
    ((0, 5, 5), (1, 3, 3)),
    ((0, 1, 6), (1, 6, 9)),
    ((0, 1, 7), (1, 1, 10)),
    ((1, 3, 13),),
)


def step_cache(
    stage: StageModel, *, num_kv_heads: int, head_dim: int, device: str = "cpu"
) -> PagedKVCache:
    """Head-major pages for the two sequences, and the spare page."""
    return PagedKVCache.allocate(
        num_layers=stage.plan.num_layers,
        num_pages=NUM_STEP_PAGES + 1,
        page_size=STEP_PAGE_SIZE,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=stage.dtype,
        device=torch.device(device),
        head_major=True,
    )


def varlen_layout(step: Sequence[tuple[int, int, int]], device: str = "cpu") -> BatchLayout:
    """The layout of a step of (sequence, query_len, kv_len)."""
    entries: list[tuple[SequenceLens, tuple[int, ...]]] = []
    row = 0
    for sequence_id, query_len, kv_len in step:
        entries.append((SequenceLens(sequence_id, row, query_len, kv_len), _PAGES[sequence_id]))
        row += query_len
    return to_device(build_layout(entries, STEP_PAGE_SIZE), lambda tensor: tensor.to(device))


def tensor_layout(lens: Sequence[int], device: str = "cpu") -> BatchLayout:
    """A decode step of sequences 0, 1 with `lens` cached tokens, and empty rows behind them."""
    empty = (SPARE_PAGE,) * len(_PAGES[0])
    table = [_PAGES.get(row, empty) for row in range(len(lens))]
    return decode_layout(
        torch.tensor(table, dtype=torch.int32, device=device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        page_size=STEP_PAGE_SIZE,
        max_kv_len=MAX_KV_LEN,
    )


def stage_inputs(stage: StageModel, num_rows: int, seed: int) -> torch.Tensor:
    """Ids on the first stage, else hidden states that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    if stage.plan.has_embedding:
        ids_T = torch.randint(0, stage.vocab_size, (num_rows,), generator=generator)
        return ids_T.to(stage.device)
    hidden_TH = torch.randn(num_rows, stage.hidden_size, generator=generator).bfloat16()
    return hidden_TH.to(stage.device, stage.dtype)


def run_varlen(stage: StageModel) -> list[torch.Tensor]:
    """`RAGGED_STEPS`, then two decode steps; hidden states or logits of all rows, on the CPU."""
    device = str(stage.device)
    outputs = []
    for seed, step in enumerate(RAGGED_STEPS):
        layout = varlen_layout(step, device)
        rows_S = torch.arange(layout.num_tokens, device=stage.device)
        inputs = stage_inputs(stage, layout.num_tokens, seed)
        outputs.append(stage.forward(inputs, layout, rows_S).cpu())
    for seed, lens in ((10, (8, 14)), (11, (9, 15))):
        layout = varlen_layout([(row, 1, kv_len) for row, kv_len in enumerate(lens)], device)
        outputs.append(stage.forward_decode(stage_inputs(stage, 2, seed), layout).cpu())
    return outputs


def run_tensor_decodes(stage: StageModel) -> list[torch.Tensor]:
    """The decode steps of `run_varlen`, after its other steps, from tensors alone.

    With an empty row behind the two sequences, whose output is left out.
    """
    outputs = []
    for seed, lens in ((10, (8, 14)), (11, (9, 15))):
        inputs = stage_inputs(stage, 2, seed)
        inputs = torch.cat((inputs, torch.zeros_like(inputs[:1])))
        layout = tensor_layout((*lens, 0), str(stage.device))
        output = stage.forward_decode(inputs, layout)
        assert bool(torch.isfinite(output).all())
        outputs.append(output[:2].cpu())
    return outputs
