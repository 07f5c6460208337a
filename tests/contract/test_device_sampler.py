"""The sampler without host synchronisation takes the tokens that `stage.sampler` takes."""

from __future__ import annotations

import pytest
import torch

from mpipipe.stage import device_sampler
from mpipipe.stage.device_logprobs import logprobs_of, select_logprobs
from mpipipe.stage.device_sampler import (
    SamplingColumns,
    SamplingNeeds,
    SeenTokens,
    sample_on_device,
    sampling_fields,
)
from mpipipe.stage.logits_filters import penalise_repetition
from mpipipe.stage.sampler import SampleRow
from mpipipe.types import SamplingParams
from tests.contract.sampler_cases import Batch, columns_on, expected, put_on, random_batch

CPU = torch.device("cpu")
GREEDY = SamplingNeeds()
ALL = SamplingNeeds(draw=True, filters=True, penalty=True)
VOCABULARIES = [7, 211, 255, 256, 257, 1024, 5000]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def columns_of(*settings: SamplingParams, vocabulary: int) -> SamplingColumns:
    fields = [sampling_fields(setting, vocabulary) for setting in settings]
    return columns_on(CPU, fields, list(range(len(settings))))


def positions(num_rows: int) -> torch.Tensor:
    return torch.arange(1, num_rows + 1)


# ---- equality with the oracle --------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mix_of_settings_gives_the_oracles_tokens(
    vocabulary: int, dtype: torch.dtype
) -> None:
    drawn_from = set()
    for seed in range(12):
        batch = random_batch(seed, 24, vocabulary, dtype=dtype)
        ids = put_on(CPU, batch).sample().tolist()
        assert ids == expected(batch, CPU)[0]
        drawn_from |= set(ids)
    assert len(drawn_from) > min(vocabulary // 2, 50), "else this tests next to nothing"


@pytest.mark.parametrize("vocabulary", [211, 5000])
def test_the_same_holds_for_rows_that_fill_several_chunks(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sampler, "CHUNK_ELEMENTS", 5 * vocabulary + 3)
    batch = random_batch(77, 23, vocabulary)
    device = put_on(CPU, batch)
    ids_S = device.sample()
    assert (ids_S.tolist(), logprobs_on_device(batch, ids_S)) == expected(batch, CPU)


def test_operations_that_no_row_needs_change_nothing() -> None:
    for seed in range(20):
        batch = random_batch(seed, 6, 300)
        device = put_on(CPU, batch)
        assert torch.equal(device.sample(), device.sample(ALL))


def test_neutral_values_leave_a_drawn_row_as_it_is_beside_rows_with_filters() -> None:
    plain = SamplingParams(temperature=1.0)
    batch = random_batch(5, 64, 2000)
    rows = tuple(SampleRow(plain.replace(seed=i), i) for i in range(64))
    device = put_on(CPU, Batch(batch.logits_SV, rows))
    assert device.needs == SamplingNeeds(draw=True)
    assert torch.equal(device.sample(), device.sample(ALL))


def test_logits_are_not_modified() -> None:
    batch = random_batch(3, 24, 300)
    device = put_on(CPU, batch)
    before = device.logits_SV.clone()
    ids_S = device.sample(ALL)
    select_logprobs(device.logits_SV, ids_S, 5)
    assert torch.equal(device.logits_SV, before)


def test_rows_do_not_depend_on_each_other() -> None:
    batch = random_batch(11, 40, 1500)
    ids = put_on(CPU, batch).sample().tolist()
    order = [(7 * index + 3) % 40 for index in range(40)]
    shuffled = put_on(CPU, batch.part(order)).sample().tolist()
    assert shuffled == [ids[index] for index in order]
    assert [put_on(CPU, batch.part([index])).sample().item() for index in range(40)] == ids


def test_a_very_large_vocabulary_with_ties_is_filtered_as_the_oracle_does() -> None:
    logits_SV = torch.randint(0, 5, (8, 50_000), generator=torch.Generator().manual_seed(2))
    settings = SamplingParams(temperature=1.0, top_k=30_000, top_p=0.9, min_p=0.01)
    rows = tuple(SampleRow(settings.replace(seed=i), i) for i in range(8))
    batch = Batch(logits_SV.float(), rows)
    assert put_on(CPU, batch).sample().tolist() == expected(batch, CPU)[0]


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [GREEDY, ALL])
def test_greedy_takes_the_lowest_id_of_equals(dtype: torch.dtype, needs: SamplingNeeds) -> None:
    logits_SV = torch.zeros(3, 1000, dtype=dtype)
    logits_SV[0, [17, 400, 999]] = 1.0
    logits_SV[1, 999] = 1.0
    columns = columns_of(*[SamplingParams()] * 3, vocabulary=1000)
    seen = SeenTokens(3, 1000, CPU)
    ids_S = sample_on_device(logits_SV, columns, positions(3), needs, seen)
    assert ids_S.dtype == torch.int64
    assert ids_S.tolist() == [17, 999, 0]


def test_greedy_rows_need_no_draw_whatever_their_filters() -> None:
    assert SamplingNeeds.of(SamplingParams(top_k=5, top_p=0.1, min_p=0.2)) == GREEDY
    assert SamplingNeeds.of(SamplingParams(temperature=1e-9, top_k=5)) == GREEDY
    drawing = SamplingParams(temperature=0.5)
    assert SamplingNeeds.of(drawing) == SamplingNeeds(draw=True)
    for change in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        needs = SamplingNeeds.of(drawing.replace(**change))
        assert needs == SamplingNeeds(draw=True, filters=True)
    penalised = SamplingNeeds.of(SamplingParams(repetition_penalty=0.9))
    assert penalised == SamplingNeeds(penalty=True)
    assert penalised | SamplingNeeds(draw=True) == SamplingNeeds(draw=True, penalty=True)
    assert len({GREEDY, SamplingNeeds(), ALL}) == 2, "needs are keys"


def test_no_rows_give_no_ids() -> None:
    columns = columns_of(vocabulary=50)
    empty_0V = torch.empty(0, 50)
    ids_S = sample_on_device(empty_0V, columns, positions(0), ALL, SeenTokens(1, 50, CPU))
    assert ids_S.shape == (0,)
    assert select_logprobs(empty_0V, ids_S, 3)[1].shape == (0, 3)


# ---- broken logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [None, ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_finite_logits_get_no_id_and_disturb_no_other(
    needs: SamplingNeeds | None, dtype: torch.dtype
) -> None:
    batch = random_batch(9, 30, 700, dtype=dtype)
    good = put_on(CPU, batch).sample().tolist()
    for row, broken in ((4, float("nan")), (11, float("inf"))):
        batch.logits_SV[row, 600] = broken
    batch.logits_SV[20] = float("-inf")
    ids = put_on(CPU, batch).sample(needs).tolist()
    assert [row for row in range(30) if ids[row] == -1] == [4, 11, 20]
    assert [i for i in ids if i >= 0] == [g for row, g in enumerate(good) if row not in {4, 11, 20}]


def test_broken_greedy_rows_get_no_id() -> None:
    logits_SV = torch.zeros(4, 9, dtype=torch.bfloat16)
    logits_SV[0, 3], logits_SV[1, 8], logits_SV[2] = float("nan"), float("inf"), float("-inf")
    columns = columns_of(*[SamplingParams()] * 4, vocabulary=9)
    assert sample_on_device(logits_SV, columns, positions(4), GREEDY).tolist() == [-1, -1, -1, 0]


# ---- nothing is asked of the device --------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [100, 3000])
def test_no_operation_reads_a_value_or_has_a_shape_that_depends_on_one(vocabulary: int) -> None:
    # Tensors on the meta device have no values: whatever asks for one raises.
    meta = torch.device("meta")
    fields = [sampling_fields(SamplingParams(), vocabulary)] * 6
    columns = columns_on(meta, fields, list(range(6)))
    logits_SV = torch.empty(6, vocabulary, dtype=torch.bfloat16, device=meta)
    seen = SeenTokens(6, vocabulary, meta)
    position_S = torch.empty(6, dtype=torch.int64, device=meta)
    for needs in (GREEDY, SamplingNeeds(draw=True), ALL):
        ids_S = sample_on_device(logits_SV, columns, position_S, needs, seen)
        assert (ids_S.shape, ids_S.dtype) == ((6,), torch.int64)
        seen.mark(columns.seats_S, ids_S)
        chosen_S, top_ids_SK, top_values_SK = select_logprobs(logits_SV, ids_S, 4)
        assert (chosen_S.shape, top_ids_SK.shape, top_values_SK.shape) == ((6,), (6, 4), (6, 4))


# ---- seen tokens ---------------------------------------------------------------------------------


def test_seen_tokens_penalise_as_the_oracle_does() -> None:
    for seed in range(10):
        batch = random_batch(seed, 12, 90, penalties=(1.7,))
        seen = SeenTokens(12, 90, CPU)
        for seat, row in enumerate(batch.rows):
            seen.set_row(seat, tuple(row.seen_ids))
        rows_SV = seen.rows(torch.arange(12))
        penalty_S = torch.tensor([row.sampling.repetition_penalty for row in batch.rows])
        ours = device_sampler._penalised(batch.logits_SV, rows_SV, penalty_S)
        for index, row in enumerate(batch.rows):
            penalise_repetition(
                batch.logits_SV[index], row.seen_ids, row.sampling.repetition_penalty
            )
        assert torch.equal(ours, batch.logits_SV)


def test_sampled_ids_count_as_seen_and_a_missing_one_does_not() -> None:
    seen = SeenTokens(4, 10, CPU)
    seen.set_row(2, (1, 1, 12, -1))
    seats_S = torch.tensor([2, 0, 3])
    seen.mark(seats_S, torch.tensor([9, -1, 0]))
    assert [row.nonzero().flatten().tolist() for row in seen.rows(torch.arange(4))] == [
        [],
        [],
        [1, 9],
        [0],
    ]


def test_rows_that_share_a_seat_may_be_marked_together() -> None:
    seen = SeenTokens(2, 5, CPU)
    seen.mark(torch.tensor([1, 1, 1]), torch.tensor([-1, 4, 0]))
    assert seen.rows(torch.tensor([0, 1])).tolist() == [[False] * 5, [True, *[False] * 3, True]]


def test_a_seat_forgets_its_last_owner() -> None:
    seen = SeenTokens(2, 5, CPU)
    seen.set_row(0, (1, 2))
    seen.mark(torch.tensor([0]), torch.tensor([4]))
    seen.set_row(0, range(3, 4))
    assert seen.rows(torch.tensor([0])).tolist() == [[False, False, False, True, False]]
    seen.set_row(0, ())
    assert not seen.rows(torch.tensor([0])).any()


def test_a_trial_runs_marks_can_be_undone() -> None:
    seen = SeenTokens(3, 6, CPU)
    seen.set_row(1, (5,))
    seats_S = torch.tensor([1, 2])
    before = seen.rows(seats_S)
    seen.mark(seats_S, torch.tensor([0, 3]))
    assert not torch.equal(seen.rows(seats_S), before)
    seen.put_rows(seats_S, before)
    assert torch.equal(seen.rows(seats_S), before)


def test_marked_tokens_change_the_next_greedy_choice() -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.0]])
    columns = columns_of(SamplingParams(repetition_penalty=2.0), vocabulary=3)
    seen = SeenTokens(1, 3, CPU)
    needs = SamplingNeeds(penalty=True)
    taken = []
    for _ in range(3):
        ids_S = sample_on_device(logits_SV, columns, positions(1), needs, seen)
        seen.mark(columns.seats_S, ids_S)
        taken.append(ids_S.item())
    assert taken == [1, 2, 1]


# ---- log-probabilities ---------------------------------------------------------------------------


def logprobs_on_device(batch: Batch, ids_S: torch.Tensor) -> object:
    nums = batch.num_logprobs
    selected = select_logprobs(batch.logits_SV, ids_S, max(0, *nums))
    return logprobs_of(ids_S, *selected, nums)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_equal_the_oracles_ties_included(vocabulary: int, dtype: torch.dtype) -> None:
    for seed in range(8):
        batch = random_batch(seed, 20, vocabulary, dtype=dtype)
        ids, logprobs = expected(batch, CPU)
        assert logprobs_on_device(batch, torch.tensor(ids)) == logprobs


def test_equal_logprobs_are_listed_by_lowest_id() -> None:
    logits_SV = torch.zeros(1, 300)
    logits_SV[0, 250] = 1.0
    top_ids_SK = select_logprobs(logits_SV, torch.tensor([0]), 3)[1]
    assert top_ids_SK.tolist() == [[250, 0, 1]]


def test_excluded_tokens_are_listed_last_and_by_lowest_id() -> None:
    logits_SV = torch.full((1, 6), float("-inf"))
    logits_SV[0, 4] = 0.0
    _, top_ids_SK, top_values_SK = select_logprobs(logits_SV, torch.tensor([4]), 3)
    assert top_ids_SK.tolist() == [[4, 0, 1]]
    assert top_values_SK.tolist() == [[0.0, float("-inf"), float("-inf")]]


def test_a_row_without_an_id_has_no_logprobs() -> None:
    logits_SV = torch.zeros(2, 5)
    ids_S = torch.tensor([-1, 2])
    none, one = logprobs_of(ids_S, *select_logprobs(logits_SV, ids_S, 0), (3, 0))
    assert none is None
    assert one is not None
    assert (one.token_id, one.top) == (2, ())
