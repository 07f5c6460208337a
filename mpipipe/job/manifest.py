"""`manifest.json`: what is needed to know, and to repeat, a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe._version import __version__
from mpipipe.checkpoint.fingerprint import model_fingerprint
from mpipipe.config.load import config_hash, to_dict
from mpipipe.config.prompt_file import prompts_hash
from mpipipe.run_folder.resume import DTYPE
from mpipipe.topology.packages import package_versions
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig
    from mpipipe.job.acquire import Claim
    from mpipipe.planning.inputs import ModelFacts
    from mpipipe.runtime.session import Session

__all__ = ["build_manifest", "completions_basis"]

_PACKAGES = ("torch", "transformers", "mpi4py", "msgpack", "structlog", "safetensors", "tokenizers")
_PROMPTS = "the SHA-256 of the prompts"


def completions_basis(loaded: LoadedConfig, model: ModelFacts, dtype: str) -> dict[str, Any]:
    """What decides the completions of a run: an attempt may only go on where all of it is the same.

    `dtype` is what `auto` has become: a job may be requeued onto GPUs of another kind. Not in it:
    ranks, stages, sizes. They change the time that a run takes, not what it says.

    Raises:
        CheckpointError, ConfigError: a file of the model, or the prompts, cannot be read.
    """
    config = to_dict(loaded.config)
    for section, key in (("prompts", "path"), ("model", "path"), ("model", "tokenizer_path")):
        del config[section][key]  # the content counts
    basis = {
        f"{section}.{key}": value
        for section in ("model", "prompts", "generation")
        for key, value in config[section].items()
    }
    return {
        **basis,
        DTYPE: dtype,
        "memory.max_context_tokens": config["memory"]["max_context_tokens"],
        _PROMPTS: _prompts_hash(loaded),
        **model_fingerprint(
            model.folder,
            model.tokenizer_folder,
            has_weights=loaded.config.model.weights != "random",
            has_code=loaded.config.model.trust_remote_code,
        ),
    }


def build_manifest(
    session: Session,
    loaded: LoadedConfig,
    claimed: Claim,
) -> dict[str, Any]:
    """The manifest of a run in the claimed folder that is about to generate (head).

    `basis` is that of the claim: the files may have been edited since they were read. `config` is
    the resolved configuration, as a file that can be run again: `model.path` absolute, every `auto`
    replaced by what the plan holds; `plan.resolved` gives the reasons.
    """
    plan = session.plan
    attempt = _attempt(session, len(claimed.earlier.kept_ids))
    return {
        "mpipipe": __version__,
        "started": attempt["started"],
        "attempts": [*claimed.earlier.attempts, attempt],
        "basis": dict(claimed.basis),
        "config": _resolved_config(session, loaded, claimed.folder),
        "plan": json.loads(plan.to_json()),
        "hashes": {
            "config": config_hash(loaded.config),
            "plan": plan.content_hash(),
            "prompts": claimed.basis[_PROMPTS],
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
            **package_versions(_PACKAGES),
        },
    }


def _attempt(session: Session, num_kept: int) -> dict[str, Any]:
    job = read_job(os.environ)
    return {
        "mpipipe": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "job": job.label if job is not None else None,
        "hosts": [hello.host for hello in session.hellos],
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


def _prompts_hash(loaded: LoadedConfig) -> str:
    if loaded.config.prompts.path:
        return prompts_hash(Path(loaded.config.prompts.path))
    text = json.dumps(loaded.inline_prompts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
