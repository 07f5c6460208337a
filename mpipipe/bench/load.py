"""How fast a stage is read from its files, against a plain sequential read of the same bytes.

One process, the stage that it would have among `num_stages` ranks of this host. The plain reads
take one thread and know nothing of tensors: one keeps the bytes, as a load onto a CPU must, the
other drops them, as a disk test does. Loads and plain reads take turns, each from the same state of
the page cache: all of the bytes in it, or none, for which only the model's own files are let go of.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import PlanError
from mpipipe.models.adapter import build_stage_model
from mpipipe.models.attention.select import make_backend
from mpipipe.topology.host import peak_rss_bytes
from mpipipe.topology.usage import read_usage
from mpipipe.weights.filling import PIECE_BYTES
from mpipipe.weights.loader import load_stage, open_tensors
from mpipipe.weights.names import resolve_names
from mpipipe.weights.prequantized import QuantizedSource
from mpipipe.weights.readers import Extent

if TYPE_CHECKING:
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.weights.loader import LoadReport

__all__ = ["LoadBench"]


@dataclass(frozen=True, slots=True)
class _Timed:
    """One read of the stage's bytes."""

    seconds: float
    read_bytes: int  # that the kernel has counted, from storage or page cache
    num_reads: int
    storage_bytes: int
    peak_bytes: int | None  # of host memory, more than before; None: the kernel does not tell
    report: LoadReport | None  # of a load


class LoadBench:
    """Loads one stage again and again.

    Args:
        plan: of this host.
        stage: whose weights are loaded.
        trust_remote_code: run Python code found in the model folder.

    Raises:
        PlanError: there is no such stage, or its weights are random.
        CheckpointError: the model folder is not whole.
    """

    def __init__(self, plan: PipelinePlan, stage: int, *, trust_remote_code: bool = False) -> None:
        if stage >= plan.num_stages:
            raise PlanError(f"there is no stage {stage}: the plan has {plan.num_stages} stages")
        if plan.weights == "random":
            raise PlanError("random weights are not read: set model.weights=checkpoint")
        self._plan = plan
        self._stage = plan.stages[stage]
        self._device = torch.device(plan.device)
        self._trust_remote_code = trust_remote_code
        self._index = read_index(Path(plan.model_path))
        self._extents = _merged(self._wanted_extents())

    def measure(self, *, cold: bool, repeat: int) -> dict[str, Any]:
        """The record of `repeat` rounds, each from the same state of the page cache."""
        torch.set_num_threads(self._plan.threads_per_rank)
        timed: dict[str, list[_Timed]] = {"load": [], "keep": [], "drop": []}
        for number in range(repeat):
            for name in list(timed) if number % 2 else reversed(timed):
                read = self._read_of(name)
                if cold:
                    _evict(self._index.files)
                else:
                    _read_and_drop(self._extents)
                timed[name].append(_time(read))
        return self._record(timed, state="cold" if cold else "warm")

    def _read_of(self, name: str) -> Callable[[], LoadReport | None]:
        if name == "load":
            model = self._model()
            return lambda: self._load(model)
        return lambda: (_read_and_keep if name == "keep" else _read_and_drop)(self._extents)

    def _model(self) -> StageModel:
        return build_stage_model(
            self._index.folder,
            self._stage,
            dtype=getattr(torch, self._plan.dtype),
            backend=make_backend(self._plan.attention),
            max_sequence_tokens=self._plan.max_sequence_tokens,
            trust_remote_code=self._trust_remote_code,
            quantize=self._plan.quantize,
        )

    def _load(self, model: StageModel) -> LoadReport:
        report = load_stage(
            model.module,
            model.wanted_names(),
            self._index,
            all_names=model.all_names,
            tied=model.tied,
            to_canonical=model.names.canonical,
            dtype=model.dtype,
            device=self._device,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return report

    def _wanted_extents(self) -> list[Extent]:
        """Where the stage's tensors lie."""
        model, source = self._model(), open_tensors(self._index)
        names = resolve_names(model.all_names, source.names(), model.tied, model.names.canonical)
        wanted = set(model.wanted_names().values()) & names.parts.keys()
        parts = {part.source for name in wanted for part in names.parts[name]}
        if isinstance(source, QuantizedSource):
            parts |= {scale for name in parts if (scale := source.scale_of(name)) is not None}
        extents = [source.stored(name).extent for name in parts]
        source.close()
        return [extent for extent in extents if extent is not None]

    def _record(self, timed: dict[str, list[_Timed]], *, state: str) -> dict[str, Any]:
        num_bytes = sum(extent.num_bytes for extent in self._extents)
        last = timed["load"][-1]
        assert last.report is not None, "it was a load"
        peaks = [one.peak_bytes for one in timed["load"] if one.peak_bytes is not None]
        seconds = {name: [one.seconds for one in found] for name, found in timed.items()}
        return {
            "model": Path(self._plan.model_path).name,
            "stage": self._stage.stage,
            "num_stages": self._plan.num_stages,
            "device": self._plan.device,
            "dtype": self._plan.dtype,
            "state": state,
            "bytes": num_bytes,
            **{f"{name}_s": median(found) for name, found in seconds.items()},
            **{f"all_{name}_s": found for name, found in seconds.items()},
            "convert_s": median(one.report.convert_s for one in timed["load"] if one.report),
            "read_ratio": last.read_bytes / num_bytes,
            "num_reads": last.num_reads,
            "storage_bytes": last.storage_bytes,
            "parameter_bytes": last.report.parameter_bytes,
            "peak_bytes": max(peaks, default=None),
            "warnings": list(last.report.warnings),
        }


def _merged(extents: Sequence[Extent]) -> list[Extent]:
    """In the order of the files; neighbours are one, and what two tensors share is there once."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda e: (e.path, e.offset)):
        if merged and merged[-1].path == extent.path:
            last, end = merged[-1], merged[-1].offset + merged[-1].num_bytes
            if extent.offset <= end:
                longest = max(end, extent.offset + extent.num_bytes)
                merged[-1] = Extent(last.path, last.offset, longest - last.offset)
                continue
        merged.append(extent)
    return merged


def _time(read: Callable[[], LoadReport | None]) -> _Timed:
    gc.collect()
    before, rss_bytes = read_usage(), _forget_peak()
    began_s = time.perf_counter()
    report = read()
    seconds = time.perf_counter() - began_s
    after = read_usage()
    return _Timed(
        seconds,
        read_bytes=(after.read_call_bytes or 0) - (before.read_call_bytes or 0),
        num_reads=(after.num_read_calls or 0) - (before.num_read_calls or 0),
        storage_bytes=(after.io_read_bytes or 0) - (before.io_read_bytes or 0),
        peak_bytes=None if rss_bytes is None else peak_rss_bytes() - rss_bytes,
        report=report,
    )


def _forget_peak() -> int | None:
    """Let the peak of memory begin anew, at what is in use now; None: not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak_rss_bytes()


def _evict(files: Sequence[Path]) -> None:
    """Let go of the files' pages; a file that is mapped elsewhere keeps them."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_and_drop(extents: Sequence[Extent]) -> None:
    """Through one buffer."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    for extent in extents:
        with extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            left = extent.num_bytes
            while left:
                left -= file.readinto(buffer[:left]) or 0


def _read_and_keep(extents: Sequence[Extent]) -> None:
    """Into memory that holds it all afterwards."""
    kept = torch.empty(sum(extent.num_bytes for extent in extents), dtype=torch.uint8)
    view = kept.numpy().data
    for extent in extents:
        with extent.path.open("rb", buffering=0) as file:
            file.seek(extent.offset)
            end = len(view) - extent.num_bytes
            while len(view) > end:
                view = view[file.readinto(view[: min(PIECE_BYTES, len(view) - end)]) or 0 :]
