"""What the head spends on bookkeeping for a long prompt file, and how fast a resume reads it.

    python -m tests.benchmarks.head [--prompts 100000] [--tokens 128] [--lookahead 1] [--model DIR]

The head's own code from the prompt file to the merged completions, over memory channels; the stage
is a stub that answers every step at once. With the tokenizer of a model folder prompts are
tokenised and completions detokenised; without one there is no torch and no tokenizer. All that it
takes is bookkeeping. Not run by CI: it is measured, not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mpipipe.cli.run_view import TerminalView
from mpipipe.cli.terminal import Terminal
from mpipipe.clock import MonotonicClock
from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.config.prompts import PromptLine, read_prompts
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    GenerationBegan,
    GenerationEnded,
    RequestClosed,
    RequestOpened,
    SessionEnded,
    StepSampled,
    StepScheduled,
)
from mpipipe.job import generating
from mpipipe.job.acquire import Acquired, acquire_folder
from mpipipe.job.job import Job, Marks
from mpipipe.job.recording import recording
from mpipipe.job.supervision import open_rank_page
from mpipipe.metrics.log import NullLog, open_log
from mpipipe.planning.layout import Place
from mpipipe.planning.model_facts import ModelFacts
from mpipipe.progress import new_event_loop
from mpipipe.run_folder.fingerprint import completions_fingerprint
from mpipipe.run_folder.status_file import ProgressFile, RunState
from mpipipe.runtime.ranks import Ranks, open_ranks
from mpipipe.runtime.requests import PreparedPrompts, prepare
from mpipipe.runtime.session import Session
from mpipipe.types import Request
from tests.unit.test_plan import make_plan

if TYPE_CHECKING:
    from mpipipe.models.tokenizer_base import Tokenizer

_NUM_LEFT = 10  # prompts that the resume has still to do
_TOKEN_ID = 1007
_TOKENS_PER_S = 17_695  # of the fastest run so far: 128 each, two H100


def open_tokenizer(folder: Path | None) -> Tokenizer | None:
    """That of a model folder."""
    if folder is None:
        return None
    from mpipipe.models import tokenizer  # imports transformers

    return tokenizer.open_tokenizer(folder)


@contextmanager
def measured(what: str, num_prompts: int) -> Iterator[None]:
    """Print wall clock and CPU seconds of the block."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    each_us, per_s = cpu_s / num_prompts * 1e6, num_prompts / wall_s
    print(
        f"{what:<34}{wall_s:7.2f} s {cpu_s:7.2f} s CPU {each_us:8.1f} us/prompt "
        f"{per_s:9,.0f} prompts/s {resident_bytes() >> 20:6,} MiB",
        flush=True,
    )


def resident_bytes() -> int:
    """What this process occupies now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class StubStage:
    """The only stage: gives every step back at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.opened_s: list[float] = []  # when each sequence began, in CPU seconds of the process
        self._mesh = ranks.mesh
        self._mailbox = ranks.mesh.mailbox(
            RequestOpened,
            StepScheduled,
            DecodeScheduled,
            RequestClosed,
            GenerationBegan,
            GenerationEnded,
            SessionEnded,
        )

    async def settle(self) -> None:
        """All is known of its steps."""

    async def serve(self, began: Callable[[], object]) -> bool:
        """As a stage does."""
        while True:
            _, message = await self._mailbox.get()
            match message:
                case RequestOpened():
                    self.opened_s.append(time.process_time())
                case StepScheduled() | DecodeScheduled():
                    token_ids = (_TOKEN_ID,) * message.num_sampled
                    self._mesh.send(self._mesh.rank, StepSampled(message.step, token_ids))
                    await asyncio.sleep(0)
                case GenerationEnded():
                    return True
                case _:
                    pass


def write_prompts(path: Path, num_prompts: int) -> None:
    """A file of short prompts."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_prompts):
            text = f"Tell me about the number {i}, please, and say why it matters."
            file.write(json.dumps({"id": f"p{i}", "prompt": text}) + "\n")


def read(loaded: LoadedConfig, model: Path) -> Acquired:
    """Read the prompts and acquire the run folder, as `mpipipe run` does."""
    lines = read_prompts(Path(loaded.config.prompts.path), loaded.config.generation)
    spec: Any = None
    fingerprint = completions_fingerprint(loaded, ModelFacts(model, spec, model, loaded), "float32")
    return acquire_folder(loaded, lines, fingerprint, None)


def tokenised(
    lines: Sequence[PromptLine], tokenizer: Tokenizer | None, num_prompts: int
) -> PreparedPrompts:
    """The requests of a run; without a tokenizer 16 ids each, no two alike."""
    if tokenizer is not None:
        with measured("tokenised", num_prompts):
            return prepare(lines, tokenizer, add_special_tokens=True)
    return PreparedPrompts(
        tuple(
            Request(line.prompt_id, line.index, ids_of(line), line.sampling)
            for line in lines
            if line.sampling is not None
        )
    )


def ids_of(line: PromptLine) -> tuple[int, ...]:
    """The ids of a prompt that begins like no other."""
    return tuple(range(line.index, line.index + 16))


async def complete(
    loaded: LoadedConfig,
    acquired: Acquired,
    prepared: PreparedPrompts,
    tokenizer: Tokenizer | None,
    asked: argparse.Namespace,
) -> StubStage:
    """Generate for every prompt that is left, record, write, merge."""
    clock = MonotonicClock()
    async with open_ranks(clock) as ranks:
        gc.collect()
        gc.freeze()  # as a boot ends
        stage = StubStage(ranks)
        session = make_session(ranks, stage, tokenizer, asked.lookahead)
        identity = acquired.identity(0, Place(0, 0))
        log = open_log(acquired.folder / "rank_0.log", identity=identity, host="here")
        progress = ProgressFile(acquired.folder, ["here"])
        progress.write(RunState.LOADING)
        marks = Marks(clock.now_s())
        wanted = loaded.config.log
        with closing(log):
            page = open_rank_page()
            view = TerminalView(Terminal(), show=False)
            job = Job(ranks, loaded, acquired, identity, log, view, marks, progress, page)
            recorded = recording(
                acquired.folder, identity, wanted, session, log=log.file, on_failure=print
            )
            loop_s = time.thread_time()
            async with recorded:
                tally = await generating.complete(job, session, prepared, {})
            loop_us = (time.thread_time() - loop_s) / len(prepared.requests) * 1e6
        generated_s = marks.generated_s - marks.loaded_s
        print(
            f"  generating {len(prepared.requests) / generated_s:,.0f} prompts/s; the event loop "
            f"used {loop_us:.1f} us/prompt"
        )
        assert tally.num_completed == len(prepared.requests)
        assert tally.totals().num_output_tokens == asked.tokens * len(prepared.requests)
    return stage


def make_session(
    ranks: Ranks, stage: StubStage, tokenizer: Tokenizer | None, lookahead: int
) -> Session:
    """A session of one rank with the stub for its worker."""
    plan = make_plan()
    whole = dataclasses.replace(plan.stages[0], last_layer=30, has_head=True)
    plan = dataclasses.replace(
        plan,
        stages=(whole,),
        max_sequences_per_slot=64,
        num_kv_pages=4000,
        lookahead=lookahead,
        max_sequence_tokens=plan.max_context_tokens,
        max_sharing_tokens=plan.max_context_tokens,
    )

    def decode(ids: Sequence[int]) -> str:
        return " seven" * len(ids)

    spec = SimpleNamespace(eos_token_ids=(1,))
    boot: Any = SimpleNamespace(
        ranks=ranks, resources=(), model=SimpleNamespace(spec=spec),
        prepared=SimpleNamespace(
            tokenizer=tokenizer, decode=None if tokenizer else decode,
            workload=SimpleNamespace(shared_ratio=0.0),
        ),
        log=NullLog(), kernels=None,
    )  # fmt: skip

    async def compare() -> None:
        """There is one clock."""

    worker: Any = stage
    account: Any = SimpleNamespace(on_step=None, num_steps=0, give_up=lambda _: None)
    clocks: Any = SimpleNamespace(offsets=(), on_compared=None, compare=compare)
    nothing: Any = None
    return Session(boot, plan=plan, worker=worker, account=account, clocks=clocks, load=nothing)


def run(work: Callable[[], Any]) -> Any:
    """On the event loop that a run has."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work())


def rates(opened_s: Sequence[float]) -> tuple[float, float]:
    """Prompts begun per second of CPU in the first and in the last quarter."""
    quarter = len(opened_s) // 4
    first_s = opened_s[quarter] - opened_s[0]
    last_s = opened_s[-1] - opened_s[-1 - quarter]
    return quarter / first_s, quarter / last_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--lookahead", type=int, default=1, help="0: as on CPUs")
    parser.add_argument("--model", type=Path, help="a folder with a tokenizer; none: ids")
    asked = parser.parse_args()
    num_prompts = asked.prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", num_prompts)
        (folder / "config.json").write_text("{}")
        words = [
            f"prompts.path={folder / 'prompts.jsonl'}", f"output.dir={folder / 'run'}",
            "model.weights=random", f"generation.max_new_tokens={asked.tokens}",
            "log.progress=plain",
        ]  # fmt: skip
        loaded = load_config(None, words)
        tokenizer = open_tokenizer(asked.model)
        began_s = time.perf_counter()
        with measured("prompts read, folder acquired", num_prompts):
            acquired = read(loaded, folder)
        prepared = tokenised(acquired.lines_left, tokenizer, num_prompts)
        (folder / "run" / "manifest.json").write_text(json.dumps({"basis": acquired.fingerprint}))
        cpu_s = time.process_time()
        with measured("generated, written, merged", num_prompts):
            stage = run(lambda: complete(loaded, acquired, prepared, tokenizer, asked))
        per_s = num_prompts / (time.perf_counter() - began_s)
        print(f"  from the file to the merged file {per_s:,.0f} prompts/s")
        cpu_s = time.process_time() - cpu_s
        acquired.close()
        first, last = rates(stage.opened_s)
        share = cpu_s / num_prompts / asked.tokens * _TOKENS_PER_S
        print(f"  begun per CPU second: first quarter {first:,.0f}, last quarter {last:,.0f}")
        print(f"  share of a core at {_TOKENS_PER_S:,} tokens/s: {share:.1%}")

        journal = folder / "run" / "completions_rank_0.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-_NUM_LEFT]))
        loaded = load_config(None, [*words, "output.resume=true"])
        with measured(f"resumed, {_NUM_LEFT} left: read, acquired", num_prompts):
            acquired = read(loaded, folder)
        assert len(acquired.lines_left) == min(_NUM_LEFT, num_prompts)
        with measured("resumed: generated, merged", num_prompts):
            prepared = tokenised(acquired.lines_left, None, num_prompts)
            run(lambda: complete(loaded, acquired, prepared, tokenizer, asked))
        acquired.close()


if __name__ == "__main__":
    main()
