"""`manifest.json`: what is needed to know, and to repeat, a run."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__
from mpipipe.config.load import config_hash, to_dict
from mpipipe.run_folder.fingerprint import PROMPTS
from mpipipe.topology.packages import package_versions
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.job.acquire import Acquired
    from mpipipe.runtime.session import Session

__all__ = ["SCHEMA", "build_manifest"]

SCHEMA = 1  # of the files of a run: fields are added within it, never renamed

_PACKAGES = ("torch", "transformers", "mpi4py", "msgpack", "structlog", "safetensors", "tokenizers")


def build_manifest(
    session: Session,
    loaded: LoadedConfig,
    acquired: Acquired,
) -> dict[str, Any]:
    """The manifest of a run in the acquired folder that is about to generate (head).

    `basis` is as the run acquired its folder: the files may have been edited since. `config` is
    the resolved configuration, as a file that can be run again: `model.path` absolute, every `auto`
    replaced by what the plan holds; `plan.resolved` gives the reasons.
    """
    plan = session.plan
    attempt = _attempt(session, len(acquired.earlier.kept_ids))
    return {
        "mpipipe": __version__,
        "schema": SCHEMA,
        "run": acquired.run,
        "started": attempt["started"],
        "attempts": [*acquired.earlier.attempts, attempt],
        "basis": dict(acquired.fingerprint),
        "config": _resolved_config(session, loaded, acquired.folder),
        "plan": json.loads(plan.to_json()),
        "hashes": {
            "config": config_hash(loaded.config),
            "plan": plan.content_hash(),
            "prompts": acquired.fingerprint[PROMPTS],
        },
        "hosts": [
            {
                "rank": rank_resources.rank,
                "host": rank_resources.host,
                "pid": rank_resources.pid,
                "num_cores": rank_resources.num_cores,
                "memory_available_bytes": rank_resources.memory_available_bytes,
                "launcher": rank_resources.launcher,
            }
            for rank_resources in session.resources
        ],
        "inline_prompts": list(loaded.inline_prompts),  # of an exp_config.json
        "versions": {
            "python": platform.python_version(),
            "mpi": session.ranks.mpi_library or None,
            **package_versions(_PACKAGES),
        },
    }


def _attempt(session: Session, num_kept: int) -> dict[str, Any]:
    job = read_job(os.environ)
    return {
        "mpipipe": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": job.label if job is not None else None,
        "hosts": [rank_resources.host for rank_resources in session.resources],
        "num_kept": num_kept,
    }


def _resolved_config(session: Session, loaded: LoadedConfig, folder: Path) -> dict[str, Any]:
    plan = session.plan
    config: dict[str, Any] = to_dict(loaded.config)
    config["model"] |= {"path": plan.model_path, "dtype": plan.dtype}
    config["pipeline"] |= {
        "num_stages": plan.num_stages,
        "split": [stage.num_layers for stage in plan.stages],
        "num_slots": plan.num_slots,
        "max_sequences_per_slot": plan.max_sequences_per_slot,
        "max_tokens_per_step": plan.max_tokens_per_step,
        "device": plan.device,
        "attention": plan.attention,
        "threads_per_rank": plan.threads_per_rank,
    }
    config["memory"] |= {
        "num_kv_pages": plan.num_kv_pages,  # decides; kv_cache_bytes stays as asked for
        "max_context_tokens": plan.max_context_tokens,
    }
    config["output"]["dir"] = str(folder)
    return config
