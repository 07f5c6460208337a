"""Sampling: transformers' filters, draws by seed and position only, log-probabilities."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from typing import cast

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mpipipe.errors import NumericsError
from mpipipe.stage.random_draws import (
    draw_token_ids,
    seed_key,
    uniforms,
)
from mpipipe.types import SamplingParams
from tests.oracles.random_draws import keys_tensor, uniform_reference
from tests.oracles.sampler import SampleRow, filtered_scores, penalise_repetition, sample

VOCABULARY = 211
SEEDS = [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**64), 2**200 + 3, -(2**200)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_logits(rows: int, vocabulary: int = VOCABULARY, *, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * 3


def transformers_scores(
    logits_1V: torch.Tensor, setting: SamplingParams, seen_ids: tuple[int, ...] = ()
) -> torch.Tensor:
    """What `generate` would draw from: its own classes in its own order."""
    processors = LogitsProcessorList()
    if setting.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(setting.repetition_penalty)))
    if setting.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(setting.temperature)))
    if setting.top_k:
        processors.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        processors.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p:
        processors.append(MinPLogitsWarper(setting.min_p))
    ids = cast("torch.LongTensor", torch.tensor([seen_ids], dtype=torch.int64))
    scores: torch.Tensor = processors(ids, cast("torch.FloatTensor", logits_1V))
    return scores


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=1),
    SamplingParams(temperature=0.3, top_k=50),
    SamplingParams(temperature=1.0, top_k=VOCABULARY - 1),
    SamplingParams(temperature=1.0, top_k=VOCABULARY),
    SamplingParams(temperature=1.0, top_k=10 * VOCABULARY),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=0.9, top_p=0.5),
    SamplingParams(temperature=2.0, top_p=0.95),
    SamplingParams(temperature=1.0, top_p=0.999999),
    SamplingParams(temperature=1.0, min_p=0.05),
    SamplingParams(temperature=1.0, min_p=1e-9),
    SamplingParams(temperature=1.0, min_p=0.999999),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=50.0, top_p=0.3, min_p=0.5),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}")
def test_filters_equal_transformers_bit_for_bit(setting: SamplingParams) -> None:
    for logits_1V in random_logits(20).unsqueeze(1):
        expected = transformers_scores(logits_1V, setting)
        assert torch.equal(filtered_scores(logits_1V, [setting]), expected)


def test_a_mixed_batch_is_filtered_as_each_row_alone() -> None:
    logits_SV = random_logits(len(SETTINGS))
    together = filtered_scores(logits_SV, SETTINGS)
    for index, setting in enumerate(SETTINGS):
        assert torch.equal(
            together[index], filtered_scores(logits_SV[index : index + 1], [setting])[0]
        )


def test_filters_equal_transformers_on_a_real_vocabulary_size() -> None:
    logits_SV = random_logits(2, 49_152)
    setting = SamplingParams(temperature=0.8, top_k=500, top_p=0.95, min_p=0.001)
    assert torch.equal(
        filtered_scores(logits_SV, [setting] * 2), transformers_scores(logits_SV, setting)
    )


def test_ties_with_the_kth_stay_as_in_transformers() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    setting = SamplingParams(temperature=1.0, top_k=2)
    scores = filtered_scores(logits, [setting])
    assert torch.equal(scores, transformers_scores(logits, setting))
    assert scores.isfinite().tolist() == [[True, True, True, True, False]]


def test_ties_at_the_border_of_top_p_keep_as_many_tokens_as_transformers() -> None:
    logits = torch.randint(0, 4, (8, 500), generator=torch.Generator().manual_seed(3)).float()
    for top_p in (0.1, 0.5, 0.9):
        setting = SamplingParams(temperature=1.0, top_p=top_p)
        ours, theirs = filtered_scores(logits, [setting] * 8), transformers_scores(logits, setting)
        assert torch.equal(ours.sort().values, theirs.sort().values)


def test_equal_logits_under_top_p_lose_the_lowest_ids_first() -> None:
    scores = filtered_scores(torch.zeros(1, 4), [SamplingParams(temperature=1.0, top_p=0.5)])
    assert scores.isfinite().tolist() == [[False, False, True, True]]


def test_ties_are_cut_by_id_in_a_large_vocabulary_too() -> None:
    # 50,000 logits of few values: torch's default sort is not stable here.
    logits = torch.randint(0, 5, (1, 50_000), generator=torch.Generator().manual_seed(2)).float()
    scores = filtered_scores(logits, [SamplingParams(temperature=1.0, top_p=0.9)])
    smallest_kept = scores[scores.isfinite()].min()
    tied = scores[logits == smallest_kept].isfinite()
    assert 0 < int(tied.sum()) < tied.numel()
    assert bool(tied[-int(tied.sum()) :].all()), "the highest ids of the tied ones are kept"


def test_a_token_exactly_at_the_min_p_threshold_stays_as_in_transformers() -> None:
    logits = torch.tensor([[math.log(2.0), 0.0, -1.0]])
    probabilities = logits.softmax(-1)[0]
    assert probabilities[1] == 0.5 * probabilities[0], "else this tests nothing"
    setting = SamplingParams(temperature=1.0, min_p=0.5)
    scores = filtered_scores(logits, [setting])
    assert torch.equal(scores, transformers_scores(logits, setting))
    assert scores.isfinite().tolist() == [[True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 8.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    setting = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=penalty)
    for index, logits_1V in enumerate(random_logits(10).unsqueeze(1)):
        seen = (3, 3, 7, 100 + index, VOCABULARY - 1, 3)
        penalised = logits_1V.clone()
        penalise_repetition(penalised[0], seen, penalty)
        expected = transformers_scores(logits_1V, setting, seen)
        assert torch.equal(filtered_scores(penalised, [setting]), expected)


def test_penalty_ignores_ids_that_the_head_cannot_produce() -> None:
    logits = random_logits(1)
    penalised = logits.clone()
    penalise_repetition(penalised[0], torch.tensor([VOCABULARY, VOCABULARY + 5]), 2.0)
    assert torch.equal(penalised, logits)


def test_penalty_changes_a_greedy_choice_and_only_of_its_row() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    before = logits.clone()
    rows = [
        SampleRow(SamplingParams(repetition_penalty=2.0), position=4, seen_ids=(1,)),
        SampleRow(SamplingParams(), position=4, seen_ids=(1,)),
    ]
    assert sample(logits, rows).token_ids_S.tolist() == [2, 1]
    assert torch.equal(logits, before), "the caller's logits are not touched"


# ---- greedy --------------------------------------------------------------------------------------


def test_greedy_is_argmax_with_ties_to_the_lowest_id() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [17, 400, 999]] = 1.0
    logits[1, 999] = 1.0
    sampled = sample(logits, [SampleRow(SamplingParams(), position=1)] * 3)
    assert sampled.token_ids_S.dtype == torch.int64
    assert sampled.token_ids_S.tolist() == [17, 999, 0]
    assert sampled.logprobs is None


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = random_logits(4)
    for temperature in (1e-300, 1e-45, 1e-7, 1e-6):
        rows = [SampleRow(SamplingParams(temperature=temperature), position=1)] * 4
        assert torch.equal(sample(logits, rows).token_ids_S, logits.argmax(-1))


def test_no_rows_give_no_ids() -> None:
    assert sample(torch.empty(0, VOCABULARY), []).token_ids_S.shape == (0,)


# ---- draws ---------------------------------------------------------------------------------------


def test_uniforms_on_tensors_equal_the_integer_reference() -> None:
    positions = [0, 1, 2, 3, 1000, 2**31, 2**40]
    for seed in SEEDS:
        keys = keys_tensor([seed] * len(positions), torch.device("cpu"))
        drawn = uniforms(keys, torch.tensor(positions)).tolist()
        assert drawn == [uniform_reference(seed, position) for position in positions]
        assert all(0 <= u < 1 for u in drawn)


def test_the_bits_are_splitmix64s() -> None:
    # First outputs of splitmix64 from state 1234567, widely published as a check of the algorithm.
    state = torch.tensor([1234567])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for number, bits in enumerate(expected):
        assert uniforms(state, torch.tensor([number])).item() == (bits >> 11) / 2**53


def test_all_bits_of_a_seed_count() -> None:
    neighbours = [*SEEDS, *(2**bit for bit in range(1, 180)), *(-(2**bit) for bit in range(1, 180))]
    assert len({seed_key(seed) for seed in neighbours}) == len(set(neighbours))


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    num_bins, num_draws = 64, 20_000
    numbers = torch.arange(num_draws)
    by_position = uniforms(keys_tensor([42], torch.device("cpu")).expand(num_draws), numbers)
    by_seed = uniforms(
        keys_tensor(list(range(num_draws)), torch.device("cpu")), torch.full_like(numbers, 9)
    )
    for drawn in (by_position, by_seed):
        counts = torch.histc(drawn, bins=num_bins, min=0, max=1)
        expected = num_draws / num_bins
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 120, "63 degrees of freedom: 1 in 50,000"
    lag_products = (by_position[1:] - 0.5) * (by_position[:-1] - 0.5)
    assert abs(lag_products.mean().item()) * 12 < 5 / math.sqrt(num_draws)


def test_a_draw_lies_inside_its_interval_and_never_on_an_excluded_token() -> None:
    minus_inf = float("-inf")
    scores = torch.tensor([[minus_inf, 0.0, minus_inf, math.log(3.0), minus_inf]])
    for u, expected in ((0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3), (1.0, 3)):
        drawn = draw_token_ids(scores, torch.tensor([u], dtype=torch.float64))
        assert drawn.tolist() == [expected], u


def test_a_long_tail_is_summed_in_double_precision() -> None:
    scores = torch.full((1, 200_000), math.log(1e-8))
    scores[0, 0] = 0.0
    cumulated = list(itertools.accumulate(scores.exp()[0].tolist()))
    for u in (0.1, 0.9985, 0.999, 0.9995):
        expected = bisect.bisect_right(cumulated, u * cumulated[-1])
        drawn = draw_token_ids(scores, torch.tensor([u], dtype=torch.float64)).item()
        assert abs(drawn - expected) <= 1, u


def test_drawn_frequencies_follow_the_filtered_distribution() -> None:
    num_draws = 20_000
    setting = SamplingParams(temperature=1.2, top_k=30, top_p=0.95, min_p=0.01, seed=11)
    logits_1V = random_logits(1)
    expected_V = transformers_scores(logits_1V, setting).softmax(-1)[0] * num_draws
    batch = 500
    counts: Counter[int] = Counter()
    for start in range(0, num_draws, batch):
        rows = [SampleRow(setting, position=start + offset) for offset in range(batch)]
        counts.update(sample(logits_1V.expand(batch, -1), rows).token_ids_S.tolist())
    kept = expected_V.nonzero().squeeze(-1).tolist()
    assert set(counts) <= set(kept)
    chi_square = sum((counts[i] - expected_V[i].item()) ** 2 / expected_V[i].item() for i in kept)
    degrees = len(kept) - 1
    assert degrees >= 10
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def mixed_rows(count: int) -> list[SampleRow]:
    settings = [SamplingParams(), *SETTINGS]
    return [
        SampleRow(
            settings[index % len(settings)].replace(
                seed=SEEDS[index % len(SEEDS)],
                repetition_penalty=1.0 + 0.1 * (index % 3),
                num_logprobs=index % 4 - 1,
            ),
            position=index * 7,
            seen_ids=tuple(range(index % 5)),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5_003])
def test_a_rows_result_is_the_same_alone_and_in_any_batch(vocabulary: int) -> None:
    count = 2 * len(SETTINGS)
    logits_SV = random_logits(count, vocabulary)
    rows = mixed_rows(count)
    alone = [sample(logits_SV[i : i + 1], rows[i : i + 1]) for i in range(count)]
    ids = [one.token_ids_S.item() for one in alone]
    logprobs = [one.logprobs[0] if one.logprobs else None for one in alone]
    assert len(set(ids)) > count // 2
    for size in (2, 3, 8, 17, count):
        for start in range(0, count, size):
            part = slice(start, start + size)
            sampled = sample(logits_SV[part], rows[part])
            assert sampled.token_ids_S.tolist() == ids[part]
            assert sampled.logprobs == tuple(logprobs[part])
    backwards = sample(logits_SV.flip(0), rows[::-1])
    assert backwards.token_ids_S.tolist() == ids[::-1]


def test_seed_and_position_decide_the_draw_and_nothing_else() -> None:
    logits = random_logits(1).expand(200, -1)
    by_position = [SampleRow(SamplingParams(temperature=1.0, seed=3), p) for p in range(200)]
    first, again = sample(logits, by_position), sample(logits, by_position)
    assert torch.equal(first.token_ids_S, again.token_ids_S)
    assert len(set(first.token_ids_S.tolist())) > 10
    by_seed = [SampleRow(SamplingParams(temperature=1.0, seed=s), 5) for s in range(200)]
    assert len(set(sample(logits, by_seed).token_ids_S.tolist())) > 10


def test_rounding_noise_in_the_logits_hardly_ever_changes_a_draw() -> None:
    # Two nearly equal likely tokens: noise that swaps their order must not swap the draws.
    logits = torch.full((400, 50), -20.0)
    logits[:, 10] = 1.0
    logits[:, 30] = 1.0
    noisy = logits.clone()
    logits[:, 10] += 1e-6
    noisy[:, 30] += 1e-6
    rows = [SampleRow(SamplingParams(temperature=1.0, seed=1), p) for p in range(400)]
    assert torch.equal(sample(logits, rows).token_ids_S, sample(noisy, rows).token_ids_S)


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(3)
    setting = SamplingParams(
        temperature=0.5, top_k=2, repetition_penalty=1.5, num_logprobs=4, seed=8
    )
    rows = [
        SampleRow(setting, 9, seen_ids=(1, 2)),
        SampleRow(setting.replace(num_logprobs=-1), 9, seen_ids=(1, 2)),
        SampleRow(setting.replace(num_logprobs=0), 9, seen_ids=(1, 2)),
    ]
    sampled = sample(logits, rows)
    assert sampled.logprobs is not None
    chosen, none, bare = sampled.logprobs
    raw = logits.log_softmax(-1)
    assert none is None
    assert bare is not None
    assert bare.top == ()
    assert chosen is not None
    assert chosen.token_id == sampled.token_ids_S[0].item()
    assert chosen.logprob == raw[0, chosen.token_id].item()
    best = raw[0].topk(4)
    assert chosen.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_equal_logprobs_are_listed_by_lowest_id() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 250] = 1.0
    sampled = sample(logits, [SampleRow(SamplingParams(num_logprobs=3), 1)])
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] is not None
    assert [token_id for token_id, _ in sampled.logprobs[0].top] == [250, 0, 1]


def test_more_logprobs_than_tokens_give_all_tokens() -> None:
    sampled = sample(torch.zeros(1, 3), [SampleRow(SamplingParams(num_logprobs=20), 1)])
    assert sampled.logprobs is not None
    assert sampled.logprobs[0] is not None
    assert len(sampled.logprobs[0].top) == 3


# ---- broken logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_stop_the_run_with_the_likely_cause(
    setting: SamplingParams, broken: float
) -> None:
    logits = random_logits(3)
    logits[1, 77] = broken
    with pytest.raises(NumericsError, match=r"token 41 .*1 of 3.*float16.*model\.dtype"):
        sample(logits, [SampleRow(setting, position=40 + row) for row in range(3)])


def test_a_row_with_no_possible_token_is_an_error_but_excluded_tokens_are_not() -> None:
    logits = torch.full((1, 10), float("-inf"))
    rows = [SampleRow(SamplingParams(temperature=1.0), 1)]
    with pytest.raises(NumericsError, match="-inf"):
        sample(logits, rows)
    logits[0, 6] = -2.0
    assert sample(logits, rows).token_ids_S.tolist() == [6]


def test_settings_that_overflow_still_draw_a_token() -> None:
    logits = torch.tensor([[3e38, 1.0, -3e38]])
    row = SampleRow(SamplingParams(temperature=1e-3, repetition_penalty=1e-4), 1, seen_ids=(1,))
    assert sample(logits, [row]).token_ids_S.tolist() == [0]
