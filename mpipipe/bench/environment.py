"""In which environment a figure was measured: devices, plan, versions, date."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__
from mpipipe.topology.packages import package_versions

if TYPE_CHECKING:
    from mpipipe.runtime.session import Session

__all__ = ["SPEED_PACKAGES", "environment"]

SPEED_PACKAGES = ("torch", "triton", "transformers", "mpi4py", "flashinfer-python")
# Fields of the plan, by their names.
_PLANNED = (
    "dtype", "num_replicas", "num_slots", "max_sequences_per_slot", "max_tokens_per_step",
    "num_kv_pages", "num_host_pages", "page_size_tokens", "max_sharing_tokens",
    "read_prefixes_once", "transport",
    "attention", "lookahead", "prefill", "weights",
)  # fmt: skip


def environment(session: Session) -> dict[str, Any]:
    """What a benchmark's record says beside its figures (head)."""
    plan = session.plan
    return {
        "model": Path(plan.model_path).name,
        "devices": [rank_resources.gpu.name or plan.device for rank_resources in session.resources],
        "plan": {
            "split": [stage.num_layers for stage in plan.stages],
            **{name: getattr(plan, name) for name in _PLANNED},
            "cuda_graphs": session.load.capture_s is not None,  # in fact, not as planned
            "hash": plan.content_hash(),
        },
        "num_preemptions": session.num_preemptions,
        "num_saved": session.num_saved,
        "drafts": asdict(session.drafts),
        "num_shared_tokens": session.num_shared_tokens,
        "versions": {
            "mpipipe": __version__,
            "mpi": session.ranks.mpi_library or None,
            **package_versions(SPEED_PACKAGES),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
