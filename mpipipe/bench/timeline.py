"""Looks into a generate call: the last steps of every rank on one clock, and a GPU profile.

`metrics.trace` has the form of the trace. All ranks call every function here together.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

from mpipipe.errors import OutputError
from mpipipe.metrics.accounting import StepRecord
from mpipipe.metrics.trace import decode_records, last_steady, trace_document
from mpipipe.plain_values import from_json, to_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mpipipe.runtime.ranks import Ranks
    from mpipipe.runtime.session import Session

__all__ = ["profiling", "write_profile", "write_trace"]

_DEADLINE_S = 120.0
# Steps are counted, not announced: telling a profile of every one would cost the run that has none.
# A decode step takes 1-30 ms, so a profile begins and ends within a few steps of where it should.
_POLL_S = 0.005
# Steps that pass before the profile begins: the first ones after prefill are no steady state.
_NUM_SKIPPED_STEPS = 8


async def write_trace(session: Session, path: Path, num_steps: int, *, since_s: float) -> None:
    """Gather the last `num_steps` steady steps of every rank; the head writes them to `path`.

    Steps that began before `since_s` on this rank's clock are left out.

    Raises:
        OutputError: the file cannot be written.
    """
    await session.clocks.compare()
    offsets_s = {offset.rank: offset.ahead_s for offset in session.clocks.offsets}
    recent = [record for record in session.recent_steps() if record.start_s >= since_s]
    chosen = last_steady(recent, num_steps)
    payload = to_json(chosen).encode()
    parts = await session.ranks.mesh.gather("trace", payload, _DEADLINE_S)
    if parts is None:
        return
    records = {rank: from_json(list[StepRecord], part) for rank, part in enumerate(parts)}
    names = {
        rank: f"stage {stage.stage}, rank {rank} on {stage.host}"
        for plan in session.plans
        for stage in plan.stages
        for rank in stage.ranks
    }
    _write(path, trace_document(records, names=names, offsets_s=offsets_s))


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"the trace cannot be written to {path} ({error.strerror}): choose another --trace file"
        ) from error


@asynccontextmanager
async def profiling(
    ranks: Ranks, session: Session, num_steps: int
) -> AsyncIterator[torch.profiler.profile]:
    """Profile `num_steps` decode steps of this rank in the generate call made inside.

    Only the GPU's kernels where there is a GPU: recording the CPU's calls too would slow it down.
    """
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    profile = torch.profiler.profile(activities=[activity])
    watching = ranks.tasks.create_task(_watch(session, profile, num_steps), name="profile")
    try:
        yield profile
    finally:
        watching.cancel()
        await asyncio.wait([watching])


async def _watch(session: Session, profile: torch.profiler.profile, num_steps: int) -> None:
    """Start the profile once decoding is under way, stop it `num_steps` later or when cancelled."""
    started_s = session.ranks.clock.now_s()

    async def until(num_decodes: int) -> None:
        while True:
            recent = decode_records(session.recent_steps())
            if sum(record.start_s > started_s for record in recent) >= num_decodes:
                return
            await asyncio.sleep(_POLL_S)

    await until(_NUM_SKIPPED_STEPS)
    profile.start()
    try:
        await until(_NUM_SKIPPED_STEPS + num_steps)
    finally:
        profile.stop()


def write_profile(profile: torch.profiler.profile, path: Path, rank: int) -> None:
    """Write this rank's profile beside `path`: NAME.rank_R.json, and its kernels by time as .txt.

    Nothing is written when no profile was taken, as the job was too short.

    Raises:
        OutputError: a file cannot be written.
    """
    if profile.profiler is None:
        return
    trace = path.with_suffix(f".rank_{rank}.json")
    kind = "device" if torch.cuda.is_available() else "cpu"
    table = profile.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=40)
    try:
        profile.export_chrome_trace(str(trace))
        trace.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"the profile cannot be written to {trace} ({error.strerror}): choose another "
            "--profile file"
        ) from error
