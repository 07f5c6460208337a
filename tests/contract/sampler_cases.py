"""Batches of mixed sampling settings, and the oracle's answer to them: used on CPU and on a GPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpipipe.stage.ahead.seats import COLUMN_TYPES
from mpipipe.stage.device_sampler import (
    SamplingColumns,
    SamplingFields,
    SamplingNeeds,
    SeenTokens,
    sample_on_device,
    sampling_fields,
)
from mpipipe.stage.sampler import SampleRow, sample
from mpipipe.types import SamplingParams, TokenLogprobs

MINUS_INF = float("-inf")


@dataclass(frozen=True)
class Batch:
    """Logits, and what is asked of each row."""

    logits_SV: torch.Tensor
    rows: tuple[SampleRow, ...]

    @property
    def needs(self) -> SamplingNeeds:
        needs = SamplingNeeds()
        for row in self.rows:
            needs |= SamplingNeeds.of(row.sampling)
        return needs

    @property
    def num_logprobs(self) -> list[int]:
        return [row.sampling.num_logprobs for row in self.rows]

    def part(self, indices: list[int]) -> Batch:
        return Batch(self.logits_SV[indices], tuple(self.rows[index] for index in indices))


def random_settings(
    rng: random.Random, vocabulary: int, penalties: tuple[float, ...], share_off: float
) -> SamplingParams:
    """Options off in that share of all cases, else with extremes among their values."""

    def maybe(off: float, values: list[float]) -> float:
        return off if rng.random() < share_off else rng.choice(values)

    return SamplingParams(
        temperature=maybe(1.0, [0.0, 1e-7, 1e-6, 0.05, 0.7, 1.3, 50.0, 1e30, 1e39]),
        top_k=int(maybe(0, [1, 2, 5, vocabulary - 1, vocabulary, 3 * vocabulary])),
        top_p=maybe(1.0, [1e-9, 0.1, 0.5, 0.9, 0.999999]),
        min_p=maybe(0.0, [1e-9, 0.05, 0.5, 0.999999]),
        repetition_penalty=maybe(1.0, list(penalties)),
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
    rows = tuple(
        SampleRow(
            random_settings(rng, vocabulary, penalties, share_off),
            position=rng.randrange(5000),
            # Ids of a padded embedding may occur in a prompt; the head cannot produce them.
            seen_ids=tuple(rng.randrange(vocabulary + 3) for _ in range(rng.randrange(40))),
        )
        for _ in range(num_rows)
    )
    return Batch(random_logits(rng, num_rows, vocabulary, dtype), rows)


def columns_on(
    device: torch.device, fields: Sequence[SamplingFields], seats: Sequence[int]
) -> SamplingColumns:
    """The columns of some rows, uploaded."""
    columns = {
        f"{name}_S": torch.from_numpy(np.array([row[index] for row in fields], kind)).to(device)
        for index, (name, kind) in enumerate(COLUMN_TYPES.items())
    }
    return SamplingColumns(**columns, seats_S=torch.tensor(seats, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class OnDevice:
    """A batch as the stage holds it."""

    logits_SV: torch.Tensor
    columns: SamplingColumns
    positions_S: torch.Tensor
    needs: SamplingNeeds
    seen: SeenTokens

    def sample(self, needs: SamplingNeeds | None = None) -> torch.Tensor:
        needs = self.needs if needs is None else needs
        return sample_on_device(self.logits_SV, self.columns, self.positions_S, needs, self.seen)


def put_on(device: torch.device, batch: Batch) -> OnDevice:
    """Upload a batch; its seats are in the reverse order of its rows."""
    num_rows, vocabulary = batch.logits_SV.shape
    seats = list(range(num_rows - 1, -1, -1))
    fields = [sampling_fields(row.sampling, vocabulary) for row in batch.rows]
    seen = SeenTokens(num_rows, vocabulary, device)
    for seat, row in zip(seats, batch.rows, strict=True):
        assert isinstance(row.seen_ids, tuple)
        seen.set_row(seat, row.seen_ids)
    return OnDevice(
        batch.logits_SV.to(device),
        columns_on(device, fields, seats),
        torch.tensor([row.position for row in batch.rows], device=device),
        batch.needs,
        seen,
    )


def expected(
    batch: Batch, device: torch.device
) -> tuple[list[int], tuple[TokenLogprobs | None, ...]]:
    """What the oracle samples, on the same device."""
    sampled = sample(batch.logits_SV.to(device).float(), batch.rows)
    return sampled.token_ids_S.tolist(), sampled.logprobs or (None,) * len(batch.rows)
