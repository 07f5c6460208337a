"""The launch-ahead engine on one GPU, in this process: its tokens, and that it waits for nothing.

In float32 and with weights whose logits lie far apart (`tiny_models`, 0.3), so that tokens are
equal whatever the order of a sum: those of graphs, of the same work without graphs, of the varlen
path, and of transformers on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    RequestOpened,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.metrics.accounting import StageAccount
from mpipipe.stage.engine import StageEngine
from mpipipe.stage.launched import LaunchedStep
from mpipipe.stage.timeline import StepEvents, StreamTimeline
from mpipipe.types import Request, SamplingParams
from tests.contract.engine_pipeline import (
    EnginePipeline,
    ForetellingDrafter,
    engine_plan,
    make_requests,
)
from tests.contract.tiny_models import TinyModel
from tests.gpu.waiting import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("own_stream"),
]
MODES = {"graphs": "replayed", "eager": "tensors", "varlen": "varlen"}
FAMILIES = ["llama", "llama-head_dim-100", "opt", "qwen3"]
LENGTHS = (5, 11, 3, 18, 7, 1, 26, 4)
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


def on_gpu(model: TinyModel, num_stages: int, name: str, **shape: int) -> EnginePipeline:
    """All stages on the current GPU, prepared."""
    plan = engine_plan(
        num_stages,
        graphs=name == "graphs",
        hidden_size=model.reference.config.hidden_size,
        **shape,  # type: ignore[arg-type]
    )
    device = f"cuda:{torch.cuda.current_device()}"
    return EnginePipeline(model, plan, MODES[name], MonotonicClock(), device).prepare()


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    family: str, name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny(family)
    requests = make_requests(LENGTHS, lambda n: GREEDY.replace(max_new_tokens=9 + n % 3))
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    for num_stages in (1, 2):
        pipeline = on_gpu(model, num_stages, name)
        assert (pipeline.engines[0].graph_runner.num_graphs > 0) == (name == "graphs")
        for seed in range(2):
            found = pipeline.generate(requests, seed=seed)
            assert [list(outcome.token_ids) for outcome in found] == wanted


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("max_sequences", [3, 1])
def test_drafts_change_no_token(
    max_sequences: int, name: str, tiny: Callable[[str], TinyModel]
) -> None:
    model = tiny("llama-head_dim-100")
    requests = make_requests(LENGTHS, lambda n: GREEDY.replace(max_new_tokens=18 + n % 3))
    wanted = [model.greedy(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    for num_stages in (1, 2):
        pipeline = on_gpu(model, num_stages, name, max_sequences=max_sequences, drafted_rows=8)
        num_graphs = [engine.graph_runner.num_graphs for engine in pipeline.engines]
        for seed in range(3):
            drafter = ForetellingDrafter(wanted, seed)
            found = pipeline.generate(requests, seed=seed, drafter=drafter)
            assert [list(outcome.token_ids) for outcome in found] == wanted
            assert 0 < pipeline.drafts.num_accepted < pipeline.drafts.num_drafted
        assert [engine.graph_runner.num_graphs for engine in pipeline.engines] == num_graphs


def sampled(number: int) -> SamplingParams:
    options: list[dict[str, float]] = [
        {"temperature": 0.9},
        {},
        {"temperature": 1.5, "top_k": 20},
        {"repetition_penalty": 2.0},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.05, "repetition_penalty": 0.5},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"temperature": 0.7, "frequency_penalty": 0.25, "repetition_penalty": 2.0},
    ]
    chosen: dict[str, float] = options[number % len(options)]
    return SamplingParams(
        **chosen,  # type: ignore[arg-type]
        max_new_tokens=14,
        seed=100 + number,
        ignore_eos=True,
        num_logprobs=(-1, 3)[number % 2],
    )


def sampled_requests() -> list[Request]:
    return make_requests((*LENGTHS, *LENGTHS), sampled)


@pytest.mark.parametrize("num_pages", [60, 16])
def test_graphs_sample_what_the_same_work_samples_without_them(
    num_pages: int, tiny: Callable[[str], TinyModel]
) -> None:
    """Every option is captured in the middle of the run; with few pages there is preemption."""
    model, requests = tiny("llama-head_dim-100"), sampled_requests()
    eager = on_gpu(model, 2, "eager", num_pages=num_pages)
    wanted = eager.generate(requests, seed=3)
    assert (eager.num_preemptions > 0) == (num_pages == 16)
    graphs = on_gpu(model, 2, "graphs", num_pages=num_pages)
    num_at_boot = [engine.graph_runner.num_graphs for engine in graphs.engines]
    for _ in range(2):
        found = graphs.generate(requests, seed=3)
        assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
        for ours, theirs in zip(found, wanted, strict=True):
            for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert (mine is None) == (other is None)
                if mine is not None and other is not None:
                    assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
    num_captured = [engine.graph_runner.num_graphs for engine in graphs.engines]
    assert num_captured[0] == num_at_boot[0]
    assert num_captured[1] > num_at_boot[1]


# ---- no wait -------------------------------------------------------------------------------------


class Steady:
    """A batch of one slot, driven by hand: as the worker does, with events and downloads."""

    def __init__(self, pipeline: EnginePipeline) -> None:
        self.engines, self.stream = pipeline.engines, pipeline.stream
        self.account = StageAccount(0)
        self.timeline = StreamTimeline(self.stream, self.account, MonotonicClock())
        self.timeline.begin(MonotonicClock().now_s())
        self.rows: list[int] = []
        self.lengths: dict[int, int] = {}
        self.step = 0
        self.next_page = 0
        self.downloads: list[torch.Tensor] = []

    def page(self) -> int:
        self.next_page += 1
        return self.next_page - 1

    def prompt(self, *sequence_ids: int) -> None:
        """A step of prompts of five tokens: two pages each."""
        entries = []
        for sequence_id in sequence_ids:
            for engine in self.engines:
                engine.open(RequestOpened(sequence_id, (5, 6, 7, 8, 9), GREEDY))
            pages = (self.page(), self.page())
            entries.append(ScheduledSequence(sequence_id, 0, 5, pages, True))
            self.lengths[sequence_id] = 5
        self.run(StepScheduled(self.step, 0, tuple(entries), False))

    def decode(self, *, left: tuple[int, ...] = (), joined: tuple[int, ...] = ()) -> None:
        for row in reversed(left):
            del self.rows[row]
        self.rows.extend(joined)
        needing = [n for n, s in enumerate(self.rows) if self.lengths[s] % 4 == 0]
        pages = tuple(self.page() for _ in needing)
        for sequence_id in self.rows:
            self.lengths[sequence_id] += 1
        self.run(
            DecodeScheduled(self.step, 0, len(self.rows), left, joined, tuple(needing), pages, True)
        )

    def run(self, step: StepScheduled | DecodeScheduled) -> None:
        taken_up = self.stream.record_event()
        first = launched = self.launch(self.engines[0], step, None)
        for engine in self.engines[1:]:
            buffer_TH = engine.hidden_buffer(step)
            launched = self.launch(engine, step, buffer_TH.copy_(launched.result))
        if len(self.engines) > 1:
            with torch.inference_mode():
                ids_S = launched.result
                if isinstance(step, DecodeScheduled):
                    ids_S = self.engines[0].ids_buffer(len(first.request_rows_S)).copy_(ids_S)
                self.engines[0].take_ids(first.request_rows_S, ids_S)
        self.downloads.append(self.stream.download(launched.result)[: step.num_sampled])
        there = self.stream.record_event()
        self.timeline.add(StepEvents(step, taken_up, taken_up, there, self.stream.record_event()))
        self.timeline.collect()
        self.step += 1

    @staticmethod
    def launch(
        engine: StageEngine, step: StepScheduled | DecodeScheduled, hidden: torch.Tensor | None
    ) -> LaunchedStep:
        if isinstance(step, DecodeScheduled):
            return engine.decode(step, hidden)
        return engine.prefill(step, hidden)


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("name", ["graphs", "eager"])
def test_steady_decode_steps_wait_for_nothing(
    name: str, num_stages: int, tiny: Callable[[str], TinyModel]
) -> None:
    steady = Steady(on_gpu(tiny("llama"), num_stages, name, max_sequences=8, num_slots=1))
    steady.prompt(*range(4))
    steady.prompt(*range(4, 7))
    steady.decode(joined=(0, 1, 2, 3))
    steady.decode()
    slow = torch.ones(4096, 4096, device="cuda")
    for _ in range(40):  # tens of milliseconds: a call that waits for the stream would be seen to
        slow = slow @ slow.clamp(max=1e-3)
    with no_synchronisation():
        for _ in range(5):  # a page for every row among them
            steady.decode()
        steady.decode(joined=(4, 5))
        steady.decode(left=(1,))
        steady.decode(left=(0, 2), joined=(6,))
        for _ in range(5):
            steady.decode()
    steady.stream.drain()
    steady.timeline.collect()
    assert steady.account.snapshot().num_steps == steady.step
    assert all(int(ids_S.min()) >= 0 for ids_S in steady.downloads)
    # The same prompt, so the same tokens, whichever came first.
    assert len(set(steady.downloads[2].tolist())) == 1


def test_prompt_steps_wait_for_nothing(tiny: Callable[[str], TinyModel]) -> None:
    steady = Steady(on_gpu(tiny("llama"), 1, "graphs", max_sequences=8, num_slots=1))
    steady.prompt(0, 1)
    steady.decode(joined=(0, 1))
    with no_synchronisation():
        steady.prompt(2, 3)
        steady.decode(joined=(2, 3))
        steady.prompt(4)
    steady.stream.drain()
    assert all(int(ids_S.min()) >= 0 for ids_S in steady.downloads)
