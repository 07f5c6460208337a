"""The sampler without host synchronisation takes the tokens that `tests.oracles.sampler` takes."""

from __future__ import annotations

import pytest
import torch

from mpipipe.planning.step_limits import HISTORY_BYTES
from mpipipe.sampling_options import OPTIONS, SamplingNeeds
from mpipipe.stage import device_sampler
from mpipipe.stage.device_logprobs import logprobs_of, select_logprobs
from mpipipe.stage.device_sampler import COLUMNS, SamplingColumns, sample_on_device
from mpipipe.stage.token_history import TokenHistory
from mpipipe.types import SamplingParams
from tests.contract.sampler_cases import Batch, columns_on, expected, put_on, random_batch
from tests.oracles.sampler import SampleRow, penalise_counts, penalise_repetition

CPU = torch.device("cpu")
GREEDY = SamplingNeeds.NOTHING
SEEN, COUNTS = SamplingNeeds.SEEN, SamplingNeeds.COUNTS
BOTH = SamplingNeeds.HISTORY
ALL = SamplingNeeds.DRAWING | BOTH
VOCABULARIES = [7, 211, 255, 256, 257, 1024, 5000]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def columns_of(*settings: SamplingParams, vocabulary: int) -> SamplingColumns:
    return columns_on(CPU, settings, vocabulary, range(len(settings)))


def history_of(
    num_request_rows: int, vocabulary: int, device: torch.device = CPU, needs: SamplingNeeds = BOTH
) -> TokenHistory:
    history = TokenHistory(num_request_rows, vocabulary, device)
    history.make(needs)
    return history


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
    assert device.needs == SamplingNeeds.DRAW
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
    history = history_of(3, 1000)
    ids_S = sample_on_device(logits_SV, columns, positions(3), needs, history)
    assert ids_S.dtype == torch.int64
    assert ids_S.tolist() == [17, 999, 0]


def test_greedy_rows_need_no_draw_whatever_their_filters() -> None:
    assert SamplingParams(top_k=5, top_p=0.1, min_p=0.2).needs == GREEDY
    assert SamplingParams(temperature=1e-9, top_k=5).needs == GREEDY
    drawing = SamplingParams(temperature=0.5)
    assert drawing.needs == SamplingNeeds.DRAW
    for change in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}):
        needs = drawing.replace(**change).needs
        assert needs == SamplingNeeds.DRAWING
    assert SamplingParams(repetition_penalty=0.9).needs == SEEN
    for change in ({"frequency_penalty": -0.1}, {"presence_penalty": 2}):
        assert SamplingParams(**change).needs == COUNTS
        assert drawing.replace(**change).needs == SamplingNeeds.DRAW | COUNTS
    assert SamplingParams(seed=5).needs == GREEDY


def test_the_device_has_a_column_for_every_option_that_an_operation_reads() -> None:
    assert COLUMNS.keys() == {name for name, option in OPTIONS.items() if option.needs}


def test_no_rows_give_no_ids() -> None:
    columns = columns_of(vocabulary=50)
    empty_0V = torch.empty(0, 50)
    ids_S = sample_on_device(empty_0V, columns, positions(0), ALL, history_of(1, 50))
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
    columns = columns_on(meta, [SamplingParams()] * 6, vocabulary, range(6))
    logits_SV = torch.empty(6, vocabulary, dtype=torch.bfloat16, device=meta)
    history = history_of(6, vocabulary, meta)
    position_S = torch.empty(6, dtype=torch.int64, device=meta)
    for needs in (GREEDY, SamplingNeeds.DRAW, ALL):
        ids_S = sample_on_device(logits_SV, columns, position_S, needs, history)
        assert (ids_S.shape, ids_S.dtype) == ((6,), torch.int64)
        history.add(needs, columns.request_rows_S, ids_S)
        chosen_S, top_ids_SK, top_values_SK = select_logprobs(logits_SV, ids_S, 4)
        assert (chosen_S.shape, top_ids_SK.shape, top_values_SK.shape) == ((6,), (6, 4), (6, 4))


# ---- what the penalties remember -----------------------------------------------------------------


def penalised_by_the_oracle(batch: Batch) -> torch.Tensor:
    logits_SV = batch.logits_SV.clone()
    for logits_V, row in zip(logits_SV, batch.rows, strict=True):
        setting = row.sampling
        penalise_repetition(logits_V, row.seen_ids, setting.repetition_penalty)
        penalise_counts(
            logits_V, row.output_ids, setting.frequency_penalty, setting.presence_penalty
        )
    return logits_SV


def test_scores_are_penalised_as_the_oracle_does_bit_for_bit() -> None:
    for seed in range(20):
        batch = random_batch(seed, 12, 90, share_off=0.3)
        device = put_on(CPU, batch)
        ours = device_sampler._penalised(batch.logits_SV, device.columns, BOTH, device.history)
        assert torch.equal(ours, penalised_by_the_oracle(batch))


def test_penalties_follow_the_formula_of_the_openai_api() -> None:
    setting = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    row = SampleRow(setting, 9, seen_ids=(0, 1, 1, 2, 2, 2, 3), output_ids=(2, 2, 2, 3))
    batch = Batch(torch.tensor([[4.0, 4.0, 4.0, -4.0, 0.0]]), (row,))
    wanted = [4.0, 4.0, 4.0 - 3 * 0.5 - 0.25, -4.0 - 0.5 - 0.25, 0.0]  # prompts do not count
    device = put_on(CPU, batch)
    ours = device_sampler._penalised(batch.logits_SV, device.columns, COUNTS, device.history)
    assert ours.tolist() == [wanted]
    assert penalised_by_the_oracle(batch).tolist() == [wanted]
    assert device.sample().tolist() == [0]


def nonzero(rows_SV: torch.Tensor) -> list[dict[int, int]]:
    return [{i: int(n) for i, n in enumerate(row) if n} for row in rows_SV.tolist()]


def test_sampled_ids_are_remembered_and_a_missing_one_is_not() -> None:
    history = history_of(4, 10)
    history.open(2, (1, 1, 12, -1, 5, 5, 5), 2, BOTH)
    request_rows_S = torch.tensor([2, 0, 3])
    for _ in range(2):
        history.add(BOTH, request_rows_S, torch.tensor([9, -1, 0]))
    every_S = torch.arange(4)
    seen = [{}, {}, {1: 1, 5: 1, 9: 1}, {0: 1}]
    assert nonzero(history.rows_of(SEEN, every_S)) == seen
    assert nonzero(history.rows_of(COUNTS, every_S)) == [{}, {}, {5: 2, 9: 2}, {0: 2}]


def test_only_what_is_needed_is_allocated_and_changed() -> None:
    history = TokenHistory(2, 5, CPU)
    request_rows_S, ids_S = torch.tensor([0]), torch.tensor([3])
    history.open(0, (1, 2), 1, SamplingNeeds.DRAWING)
    history.add(SamplingNeeds.DRAWING, request_rows_S, ids_S)
    assert history.rows(request_rows_S) == {}
    history.open(0, (1, 2), 1, COUNTS)
    assert history.rows(request_rows_S).keys() == {COUNTS}
    history.open(0, (1, 2), 1, SEEN)
    history.add(SEEN, request_rows_S, ids_S)
    assert nonzero(history.rows_of(COUNTS, request_rows_S)) == [{2: 1}]
    assert nonzero(history.rows_of(SEEN, request_rows_S)) == [{1: 1, 2: 1, 3: 1}]


def test_the_tables_have_the_size_that_the_plan_reserves() -> None:
    history = history_of(3, 7)
    for need, table in history._tables.items():
        assert table.nbytes == 3 * (7 + 1) * HISTORY_BYTES[need]
    assert history._tables.keys() == HISTORY_BYTES.keys()


def test_rows_that_share_a_request_row_may_be_added_together() -> None:
    history = history_of(2, 5)
    history.add(BOTH, torch.tensor([1, 1, 1, 1]), torch.tensor([-1, 4, 0, 4]))
    both_S = torch.tensor([0, 1])
    assert nonzero(history.rows_of(SEEN, both_S)) == [{}, {0: 1, 4: 1}]
    assert nonzero(history.rows_of(COUNTS, both_S)) == [{}, {0: 1, 4: 2}]


def test_a_request_row_forgets_its_last_owner() -> None:
    history, request_rows_S = history_of(2, 5), torch.tensor([0])
    history.open(0, (1, 2), 2, BOTH)
    history.add(BOTH, request_rows_S, torch.tensor([4]))
    history.open(0, range(3, 4), 1, BOTH)
    assert nonzero(history.rows_of(SEEN, request_rows_S)) == [{3: 1}]
    assert nonzero(history.rows_of(COUNTS, request_rows_S)) == [{3: 1}]
    history.open(0, (), 0, BOTH)
    assert not any(rows.any() for rows in history.rows(request_rows_S).values())


def test_a_trial_run_can_be_undone() -> None:
    history, request_rows_S = history_of(3, 6), torch.tensor([1, 2])
    history.open(1, (5,), 1, BOTH)
    before = history.rows(request_rows_S)
    history.add(BOTH, request_rows_S, torch.tensor([0, 3]))
    assert not any(torch.equal(history.rows(request_rows_S)[need], before[need]) for need in before)
    history.put_rows(request_rows_S, before)
    assert all(torch.equal(history.rows(request_rows_S)[need], before[need]) for need in before)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"repetition_penalty": 2.0}, [1, 2, 1, 1]),
        ({"presence_penalty": 1.5}, [1, 2, 1, 1]),
        ({"frequency_penalty": 0.75}, [1, 1, 2, 1]),
        ({"frequency_penalty": -1.0}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_remembered_tokens_change_the_next_greedy_choice(
    options: dict[str, float], wanted: list[int]
) -> None:
    logits_SV = torch.tensor([[1.0, 3.0, 2.0]])
    setting = SamplingParams(**options)  # type: ignore[arg-type]
    columns = columns_of(setting, vocabulary=3)
    history = history_of(1, 3)
    taken = []
    for _ in wanted:
        ids_S = sample_on_device(logits_SV, columns, positions(1), setting.needs, history)
        history.add(setting.needs, columns.request_rows_S, ids_S)
        taken.append(ids_S.item())
    assert taken == wanted


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
