"""`manifest.json`: what is needed to know, and to repeat, a run."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__
from mpipipe.config.load import config_hash, to_dict

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig
    from mpipipe.runtime.session import Session

__all__ = ["build_manifest"]

_PACKAGES = ("torch", "transformers", "mpi4py", "msgpack", "structlog", "safetensors", "tokenizers")


def build_manifest(
    session: Session, loaded: LoadedConfig, folder: Path, prompt_path: Path | None
) -> dict[str, Any]:
    """The manifest of a run in `folder` that is about to generate (head).

    `config` is the resolved configuration, as a file that can be run again: `model.path` absolute,
    every `auto` replaced by what the plan holds; `plan.resolved` gives the reasons.
    """
    plan = session.plan
    return {
        "mpipipe": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": _resolved_config(session, loaded, folder),
        "plan": json.loads(plan.to_json()),
        "hashes": {
            "config": config_hash(loaded.config),
            "plan": plan.content_hash(),
            "prompts": _prompts_hash(loaded, prompt_path),
            "model_config": _sha256(Path(plan.model_path) / "config.json"),
        },
        "hosts": [
            {
                "rank": hello.rank,
                "host": hello.host,
                "pid": hello.pid,
                "num_cores": hello.num_cores,
                "memory_available_bytes": hello.memory_available_bytes,
                "launcher": hello.launcher,
            }
            for hello in session.hellos
        ],
        "inline_prompts": list(loaded.inline_prompts),  # of an exp_config.json
        "versions": {
            "python": platform.python_version(),
            "mpi": session.ranks.mpi_library or None,
            **{name: _version(name) for name in _PACKAGES},
        },
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


def _prompts_hash(loaded: LoadedConfig, prompt_path: Path | None) -> str:
    if prompt_path is not None:
        return _sha256(prompt_path)
    text = json.dumps(loaded.inline_prompts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
