"""Under which circumstances a figure was measured: devices, plan, versions, date."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__

if TYPE_CHECKING:
    from mpipipe.runtime.session import Session

__all__ = ["circumstances", "package_versions"]

_PACKAGES = ("torch", "triton", "transformers", "mpi4py", "flashinfer-python")


def circumstances(session: Session) -> dict[str, Any]:
    """What a benchmark's record says beside its figures (head)."""
    plan = session.plan
    statistics = session.statistics()
    return {
        "model": Path(plan.model_path).name,
        "devices": [hello.gpu_name or plan.device for hello in session.hellos],
        "plan": {
            "split": [stage.num_layers for stage in plan.stages],
            "dtype": plan.dtype,
            "num_slots": plan.num_slots,
            "max_sequences_per_slot": plan.max_sequences_per_slot,
            "max_tokens_per_step": plan.max_tokens_per_step,
            "num_kv_pages": plan.num_kv_pages,
            "page_size_tokens": plan.page_size_tokens,
            "transport": plan.transport,
            "attention": plan.attention,
            "laps_ahead": plan.laps_ahead,
            "prefill": plan.prefill,
            "cuda_graphs": plan.cuda_graphs,
            "weights": plan.weights,
            "hash": plan.content_hash(),
        },
        "num_preemptions": statistics.num_preemptions if statistics is not None else 0,
        "versions": {
            "mpipipe": __version__,
            "mpi": session.ranks.mpi_library or None,
            **package_versions(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that speed depends on; None: not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
