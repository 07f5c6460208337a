"""Batches of mixed sampling settings, and the oracle's answer to them: used on CPU and on a GPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.device_sampler import (
    COLUMNS,
    SamplingColumns,
    column_entries,
    sample_on_device,
)
from mpipipe.stage.token_history import TokenHistory
from mpipipe.types import SamplingParams, TokenLogprobs
from tests.oracles.sampler import SampleRow, sample

MINUS_INF = float("-inf")


@dataclass(frozen=True)
class Batch:
    """Logits, and what is asked of each row."""

    logits_SV: torch.Tensor
    rows: tuple[SampleRow, ...]

    @property
    def needs(self) -> SamplingNeeds:
        needs = SamplingNeeds.NOTHING
        for row in self.rows:
            needs |= row.sampling.needs
        return needs

    @property
    def num_logprobs(self) -> list[int]:
        return [row.sampling.num_logprobs for row in self.rows]

    def part(self, indices: list[int]) -> Batch:
        return Batch(self.logits_SV[indices], tuple(self.rows[index] for index in indices))


def random_settings(
    rng: random.Random, vocabulary: int, penalties: tuple[float, ...], share_off: float
) -> SamplingParams:
    """Options off in that share of all cases, else with extremes among their values.

    `penalties`: what a repetition penalty may be.
    """

    def maybe(off: float, values: list[float]) -> float:
        return off if rng.random() < share_off else rng.choice(values)

    return SamplingParams(
        temperature=maybe(1.0, [0.0, 1e-7, 1e-6, 0.05, 0.7, 1.3, 50.0, 1e30, 1e39]),
        top_k=int(maybe(0, [1, 2, 5, vocabulary - 1, vocabulary, 3 * vocabulary])),
        top_p=maybe(1.0, [1e-9, 0.1, 0.5, 0.9, 0.999999]),
        min_p=maybe(0.0, [1e-9, 0.05, 0.5, 0.999999]),
        repetition_penalty=maybe(1.0, list(penalties)),
        frequency_penalty=maybe(0.0, [-2.0, -0.3, 1e-9, 0.1, 0.7, 2.0]),
        presence_penalty=maybe(0.0, [-2.0, -0.7, 1e-9, 0.3, 1.1, 2.0]),
        seed=rng.choice([0, -1, 3, 2**63, 2**200]),
        num_logprobs=rng.choice([-1, 0, 1, 3, 20]),
    )


def random_logits(
    rng: random.Random, num_rows: int, vocabulary: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of many kinds: smooth, of few values (ties), mostly -inf, all equal."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits_SV = torch.randn(num_rows, vocabulary, generator=generator) * rng.choice([0.1, 3, 30])
    for logits_V in logits_SV:
        match rng.randrange(5):
            case 0:
                logits_V.round_()
            case 1:
                out_V = torch.rand(vocabulary, generator=generator) < rng.choice([0.1, 0.95])
                out_V[rng.randrange(vocabulary)] = False
                logits_V.masked_fill_(out_V, MINUS_INF)
            case 2:
                logits_V.fill_(rng.choice([-1.0, 0.0, 2.5]))
            case _:
                pass
    return logits_SV.to(dtype)


def random_batch(
    seed: int,
    num_rows: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    penalties: tuple[float, ...] = (0.5, 1.1, 1.3, 8.0),
    share_off: float = 0.5,
) -> Batch:
    rng = random.Random(seed)

    def random_row() -> SampleRow:
        settings = random_settings(rng, vocabulary, penalties, share_off)
        # Ids of a padded embedding may occur in a prompt; the head cannot produce them.
        prompt = tuple(rng.randrange(vocabulary + 3) for _ in range(rng.randrange(40)))
        few = rng.sample(range(vocabulary), min(vocabulary, rng.randrange(1, 9)))
        output = tuple(rng.choice(few) for _ in range(rng.choice([0, 1, 7, 60])))
        return SampleRow(
            settings,
            position=rng.randrange(5000),
            seen_ids=prompt + output,
            output_ids=output,
        )

    rows = tuple(random_row() for _ in range(num_rows))
    return Batch(random_logits(rng, num_rows, vocabulary, dtype), rows)


def columns_on(
    device: torch.device,
    settings: Sequence[SamplingParams],
    vocabulary: int,
    request_rows: Sequence[int],
) -> SamplingColumns:
    """The columns of some rows, uploaded."""
    entries = [column_entries(setting, vocabulary) for setting in settings]
    columns = {
        name: torch.from_numpy(np.array([row[name] for row in entries], column.dtype)).to(device)
        for name, column in COLUMNS.items()
    }
    return SamplingColumns(columns, torch.tensor(request_rows, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class OnDevice:
    """A batch as the stage holds it."""

    logits_SV: torch.Tensor
    columns: SamplingColumns
    positions_S: torch.Tensor
    needs: SamplingNeeds
    history: TokenHistory

    def sample(self, needs: SamplingNeeds | None = None) -> torch.Tensor:
        needs = self.needs if needs is None else needs
        return sample_on_device(self.logits_SV, self.columns, self.positions_S, needs, self.history)


def put_on(device: torch.device, batch: Batch) -> OnDevice:
    """Upload a batch; its request rows are in the reverse order of its rows."""
    num_rows, vocabulary = batch.logits_SV.shape
    request_rows = list(range(num_rows - 1, -1, -1))
    history = TokenHistory(num_rows, vocabulary, device)
    for request_row, row in zip(request_rows, batch.rows, strict=True):
        assert isinstance(row.seen_ids, tuple)
        history.open(request_row, row.seen_ids, len(row.output_ids), SamplingNeeds.HISTORY)
    return OnDevice(
        batch.logits_SV.to(device),
        columns_on(device, [row.sampling for row in batch.rows], vocabulary, request_rows),
        torch.tensor([row.position for row in batch.rows], device=device),
        batch.needs,
        history,
    )


def expected(
    batch: Batch, device: torch.device
) -> tuple[list[int], tuple[TokenLogprobs | None, ...]]:
    """What the oracle samples, on the same device."""
    sampled = sample(batch.logits_SV.to(device).float(), batch.rows)
    return sampled.token_ids_S.tolist(), sampled.logprobs or (None,) * len(batch.rows)
