"""The sampler on a GPU: the oracle's tokens, in a graph, without synchronisation; its times."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import pytest
import torch

from mpipipe.sampling_options import SamplingNeeds
from mpipipe.stage.device_logprobs import logprobs_of, select_logprobs
from mpipipe.stage.token_history import TokenHistory
from mpipipe.types import SamplingParams
from tests.contract.sampler_cases import Batch, OnDevice, expected, put_on, random_batch
from tests.gpu.waiting import no_synchronisation
from tests.oracles.sampler import SampleRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# torch divides by a number of the host on a GPU by multiplying with its reciprocal, and by a tensor
# properly: oracle and sampler agree to the bit for powers of two only.
EXACT_PENALTIES = (0.5, 2.0, 8.0)
NEEDS = {
    "greedy": SamplingNeeds.NOTHING,
    "draw": SamplingNeeds.DRAW,
    "filters": SamplingNeeds.DRAWING,
    "all": SamplingNeeds.DRAWING | SamplingNeeds.HISTORY,
}


@pytest.fixture(name="cuda")
def _cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def captured(work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """`work` as a graph, and the tensor that a replay fills."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


# ---- equality with the oracle --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [211, 1024, 5000, 32_000])
def test_batches_that_use_every_option_get_the_oracles_tokens(
    cuda: torch.device, vocabulary: int, dtype: torch.dtype
) -> None:
    for seed in range(6):
        batch = random_batch(
            seed, 40, vocabulary, dtype=dtype, penalties=EXACT_PENALTIES, share_off=0.0
        )
        # top_k off in some row would split the oracle's batch, and so might its sums' rounding.
        rows = tuple(
            SampleRow(
                row.sampling.replace(
                    top_k=min(row.sampling.top_k, vocabulary - 1),
                    temperature=max(row.sampling.temperature, 1e-3),
                ),
                row.position,
                row.seen_ids,
                row.output_ids,
            )
            for row in batch.rows
        )
        batch = Batch(batch.logits_SV, rows)
        assert put_on(cuda, batch).sample().tolist() == expected(batch, cuda)[0]


@pytest.mark.parametrize("vocabulary", [211, 5000])
def test_mixed_batches_get_the_oracles_tokens(cuda: torch.device, vocabulary: int) -> None:
    """Save where a float32 running sum, whose rounding depends on the batch, decides on top-p."""
    num_rows = num_different = 0
    for seed in range(20):
        batch = random_batch(seed, 40, vocabulary, penalties=EXACT_PENALTIES)
        ids, oracle_ids = put_on(cuda, batch).sample().tolist(), expected(batch, cuda)[0]
        different = [row for row in range(40) if ids[row] != oracle_ids[row]]
        assert all(batch.rows[row].sampling.top_p < 1 for row in different)
        num_rows += 40
        num_different += len(different)
    assert num_different <= num_rows // 50


def test_draws_and_greedy_choices_are_those_of_the_cpu(cuda: torch.device) -> None:
    setting = SamplingParams(temperature=0.8)
    batch = random_batch(1, 200, 5000)
    rows = tuple(
        SampleRow(setting.replace(seed=i, temperature=0.8 * (i % 3 > 0)), position=7 * i)
        for i in range(200)
    )
    batch = Batch(batch.logits_SV, rows)
    ids = put_on(cuda, batch).sample().tolist()
    oracle_ids = expected(batch, torch.device("cpu"))[0]
    different = sum(a != b for a, b in zip(ids, oracle_ids, strict=True))
    assert different <= 1, "exp may differ in its last bit, which hardly ever moves a draw"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 128_256])
def test_greedy_takes_the_lowest_id_of_equals(
    cuda: torch.device, dtype: torch.dtype, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    # Many equal maxima in places that any split of the row among threads separates.
    logits_SV = torch.randint(0, 3, (64, vocabulary), generator=generator).to(dtype)
    logits_SV[0] = 0
    logits_SV[1] = float("-inf")
    logits_SV[1, vocabulary - 1] = -7
    first_S = (logits_SV == logits_SV.amax(-1, keepdim=True)).int().argmax(-1)
    ids_S = logits_SV.to(cuda).max(dim=-1).indices
    assert ids_S.tolist() == first_S.tolist()
    rows = (SampleRow(SamplingParams(), 1),) * 64
    assert put_on(cuda, Batch(logits_SV, rows)).sample().tolist() == first_S.tolist()


@pytest.mark.parametrize("vocabulary", [211, 5000])
def test_logprobs_equal_the_oracles(cuda: torch.device, vocabulary: int) -> None:
    for seed in range(5):
        batch = random_batch(seed, 30, vocabulary, penalties=EXACT_PENALTIES)
        ids, logprobs = expected(batch, cuda)
        ids_S, logits_SV = torch.tensor(ids, device=cuda), batch.logits_SV.to(cuda)
        with no_synchronisation():
            selected = select_logprobs(logits_SV, ids_S, max(batch.num_logprobs))
        host = [tensor.cpu() for tensor in (ids_S, *selected)]
        ours = logprobs_of(host[0], host[1], host[2], host[3], batch.num_logprobs)
        for one, other in zip(ours, logprobs, strict=True):
            assert (one is None) == (other is None)
            if one is None or other is None:
                continue
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, rel=1e-5, abs=1e-6)
            assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]


def test_broken_rows_get_no_id_and_disturb_no_other(cuda: torch.device) -> None:
    batch = random_batch(9, 30, 5000, dtype=torch.bfloat16)
    good = put_on(cuda, batch).sample().tolist()
    for row, broken in ((4, float("nan")), (11, float("inf"))):
        batch.logits_SV[row, 600] = broken
    batch.logits_SV[20] = float("-inf")
    ids = put_on(cuda, batch).sample().tolist()
    assert [row for row in range(30) if ids[row] == -1] == [4, 11, 20]
    assert [i for i in ids if i >= 0] == [g for row, g in enumerate(good) if row not in {4, 11, 20}]


# ---- graphs and synchronisation ------------------------------------------------------------------


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
@pytest.mark.parametrize("vocabulary", [211, 32_000])
def test_nothing_waits_for_the_gpu(
    cuda: torch.device, vocabulary: int, needs: SamplingNeeds
) -> None:
    device = put_on(cuda, random_batch(2, 20, vocabulary, dtype=torch.bfloat16))
    with no_synchronisation():
        device.history.open(3, (1, 2, vocabulary + 1), 2, needs)
        ids_S = device.sample(needs)
        device.history.add(needs, device.columns.request_rows_S, ids_S)
        select_logprobs(device.logits_SV, ids_S, 5)
    assert ids_S.min() >= 0


@pytest.mark.parametrize("num_rows", [1, 24])
@pytest.mark.parametrize("vocabulary", [211, 5000, 32_000])
def test_a_graph_replayed_on_other_batches_gives_their_tokens(
    cuda: torch.device, vocabulary: int, num_rows: int
) -> None:
    static = put_on(cuda, random_batch(0, num_rows, vocabulary, dtype=torch.bfloat16))
    graph, ids_S = captured(lambda: static.sample(NEEDS["all"]))
    for seed in range(1, 8):
        other = put_on(cuda, random_batch(seed, num_rows, vocabulary, dtype=torch.bfloat16))
        copy_batch(other, static)
        graph.replay()
        assert torch.equal(ids_S, other.sample(NEEDS["all"]))


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        (SamplingParams(repetition_penalty=2.0), [49, 48, 47, 46, 45]),
        (SamplingParams(presence_penalty=1.5), [49, 48, 49, 49, 49]),
        (SamplingParams(frequency_penalty=0.75), [49, 49, 48, 49, 48]),
        (SamplingParams(frequency_penalty=-1.0), [49, 49, 49, 49, 49]),
    ],
    ids=str,
)
def test_what_a_graph_adds_to_the_history_counts_in_its_next_replay(
    cuda: torch.device, setting: SamplingParams, wanted: list[int]
) -> None:
    batch = Batch(torch.arange(1.0, 51.0).repeat(8, 1), (SampleRow(setting, 1),) * 8)
    static, eager = put_on(cuda, batch), put_on(cuda, batch)

    def step(device: OnDevice) -> torch.Tensor:
        ids_S = device.sample()
        device.history.add(device.needs, device.columns.request_rows_S, ids_S)
        return ids_S

    untouched = static.history.rows(static.columns.request_rows_S)
    graph, ids_S = captured(lambda: step(static))
    static.history.put_rows(static.columns.request_rows_S, untouched)
    taken = []
    for _ in wanted:
        graph.replay()
        assert torch.equal(ids_S, step(eager))
        taken.append(int(ids_S[0]))
    assert taken == wanted


def test_rows_that_share_a_request_row_are_all_counted(cuda: torch.device) -> None:
    history = TokenHistory(2, 5, cuda)
    history.make(SamplingNeeds.COUNTS)
    ids_S = torch.tensor([4] * 300 + [-1] * 20 + [0] * 7, device=cuda)
    history.add(SamplingNeeds.COUNTS, torch.ones_like(ids_S), ids_S)
    counts_SV = history.rows_of(SamplingNeeds.COUNTS, torch.arange(2, device=cuda))
    assert counts_SV.tolist() == [[0] * 5, [7, 0, 0, 0, 300]]


def copy_batch(source: OnDevice, target: OnDevice) -> None:
    target.logits_SV.copy_(source.logits_SV)
    target.positions_S.copy_(source.positions_S)
    for name, column_S in source.columns.of.items():
        target.columns[name].copy_(column_S)
    request_rows_S = source.columns.request_rows_S
    target.columns.request_rows_S.copy_(request_rows_S)
    target.history.put_rows(request_rows_S, source.history.rows(request_rows_S))


# ---- time and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(16, 32_000), (256, 32_000), (256, 128_256)])
def test_time_and_memory_of_a_step(
    cuda: torch.device, num_rows: int, vocabulary: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints the figures; fails if temporaries outgrow what chunks are for."""
    setting = SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
    )
    rows = (SampleRow(setting, 1),) * num_rows
    logits_SV = torch.randn(num_rows, vocabulary, dtype=torch.bfloat16, device=cuda) * 3
    device = put_on(cuda, Batch(logits_SV, rows))
    lines = []
    for name, needs in NEEDS.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        device.sample(needs)
        peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        graph, _ = captured(lambda needs=needs: device.sample(needs))  # type: ignore[misc]
        lines.append(f"  {name:8} {milliseconds(graph):8.3f} ms  {peak_mib:7.0f} MiB")
        assert peak_mib < 1024
    with capsys.disabled():
        sys.stdout.write(f"\n{num_rows} rows of {vocabulary}, bfloat16, one graph:\n")
        sys.stdout.write("\n".join(lines) + "\n")


def milliseconds(graph: torch.cuda.CUDAGraph, *, repeats: int = 15) -> float:
    """The median time of a replay."""
    times = []
    for _ in range(repeats + 3):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return statistics.median(times[3:])
