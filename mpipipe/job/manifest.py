"""`manifest.json`: what is needed to know, and to repeat, a run.

Written by the head once it has the run folder, before anything is loaded; completed when the plan
is known, before the first prompt. `mpipipe/logs/FILES.md` documents its fields.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mpipipe._version import __version__
from mpipipe.config.load import config_hash, to_dict
from mpipipe.config.schema import AUTO
from mpipipe.metrics.identity import SCHEMA
from mpipipe.plain_values import from_json, to_json
from mpipipe.run_folder.files import write_json
from mpipipe.run_folder.fingerprint import PROMPTS
from mpipipe.run_folder.history import kept_counts
from mpipipe.runtime.ranks import in_phase
from mpipipe.topology.environment import recorded_environment
from mpipipe.topology.node import NodeRecord, read_node
from mpipipe.topology.packages import package_versions
from mpipipe.topology.slurm import read_job
from mpipipe.topology.source import source_commit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.job.acquire import Acquired
    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.planning.resources import RankResources
    from mpipipe.runtime.session import Session
    from mpipipe.runtime.startup import Joined
    from mpipipe.topology.launcher import LaunchInfo

__all__ = ["Surroundings", "complete_manifest", "first_manifest", "record_start"]

T = TypeVar("T")
_Seen = tuple[bytes, dict[str, Any] | None, list[dict[str, Any]] | None]  # node, git, findings
_PACKAGES = ("torch", "transformers", "mpi4py", "msgpack", "structlog", "safetensors", "tokenizers")
_GATHER_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where an attempt runs, as the head has learnt it."""

    resources: tuple[RankResources, ...]  # by rank
    nodes: tuple[NodeRecord, ...]  # in the order of their first ranks
    launch: LaunchInfo
    mpi_library: str
    git: dict[str, Any] | None
    environment: dict[str, str]
    findings: list[dict[str, Any]] | None  # the doctor's, about the head's node
    argv: Sequence[str]
    started_s: float  # of the head's process, on its monotonic clock
    started_unix_s: float  # the same moment


async def record_start(
    joined: Joined[list[PromptLine]],
    acquired: Acquired,
    examine: Callable[[int], list[dict[str, Any]]] | None,
    warn: Callable[[str], object],
) -> dict[str, Any]:
    """Gather where this attempt runs, and write the first manifest; returns it on the head.

    Args:
        joined: the ranks.
        acquired: the run folder.
        examine: the doctor's cheap checks of this node, given how many ranks it has.
        warn: told in a sentence what cannot be recorded.

    Raises:
        AgreedError: it cannot be written.
    """
    ranks, hosts = joined.ranks, [rank.host for rank in joined.resources]
    host = hosts[ranks.mesh.rank]
    speaks = hosts.index(host) == ranks.mesh.rank  # one rank for its host

    def look() -> _Seen:
        checks = partial(examine, hosts.count(host)) if examine is not None else lambda: None
        return _look(speaks=speaks, is_head=ranks.is_head, examine=checks, warn=warn)

    node, git, findings = await in_phase(ranks, "node", look)
    parts = await ranks.mesh.gather("node", node, _GATHER_DEADLINE_S)

    def write() -> dict[str, Any]:
        if parts is None:
            return {}
        now_s, now_unix_s = ranks.clock.now_s(), time.time()
        surroundings = Surroundings(
            resources=joined.resources,
            nodes=tuple(from_json(NodeRecord, part) for part in parts if part),
            launch=ranks.info,
            mpi_library=ranks.mpi_library,
            git=git,
            environment=recorded_environment(os.environ),
            findings=findings,
            argv=tuple(sys.argv),
            started_s=ranks.boot.started_s,
            started_unix_s=now_unix_s - (now_s - ranks.boot.started_s),
        )
        manifest = first_manifest(joined.loaded, acquired, surroundings)
        write_json(acquired.folder / "manifest.json", manifest)
        return manifest

    return await in_phase(ranks, "manifest", write)


def _look(
    *,
    speaks: bool,
    is_head: bool,
    examine: Callable[[], list[dict[str, Any]] | None],
    warn: Callable[[str], object],
) -> _Seen:
    """This node as JSON, the commit, the doctor's findings; a source that fails is left out."""
    failed: list[str] = []

    def asked(what: str, source: Callable[[], T]) -> T | None:
        try:
            return source()
        except Exception as error:  # noqa: BLE001 - drivers, git and checks of a node may do anything
            failed.append(f"{what} ({type(error).__name__}: {error})")
            return None

    node = asked("the node", lambda: to_json(read_node())) if speaks else None
    git = asked("the commit", source_commit) if is_head else None
    findings = asked("the doctor's findings", examine) if is_head else None
    if failed:
        warn(
            f"manifest.json does not tell {', '.join(failed)}; completions are not touched by that"
        )
    return (node or "").encode(), git, findings


def first_manifest(loaded: LoadedConfig, acquired: Acquired, where: Surroundings) -> dict[str, Any]:
    """What is known before the plan (head).

    `config` is as asked for, `plan` that of the attempt before. `basis` is there only when an
    earlier attempt had begun to generate: what ended while it booted may go on with other settings.
    A run that has nothing left to do adds itself to what its last attempt has told.
    """
    attempt, earlier = _attempt(acquired, where), acquired.earlier
    attempts = [*earlier.attempts, attempt]
    if acquired.done_code is not None and acquired.is_resumed:
        return {**earlier.manifest, "schema": SCHEMA, "run": acquired.run, "attempts": attempts}
    return {
        "mpipipe": __version__,
        "schema": SCHEMA,
        "run": acquired.run,
        "started": attempt["started"],
        "argv": list(where.argv),
        "git": where.git,
        "attempts": attempts,
        "basis": dict(acquired.fingerprint) if acquired.is_resumed else None,
        "config": to_dict(loaded.config),
        "plan": earlier.manifest.get("plan"),
        "hashes": {
            "config": config_hash(loaded.config),
            "plan": None,
            "prompts": acquired.fingerprint[PROMPTS],
        },
        "hosts": [_host(rank) for rank in where.resources],
        "nodes": [asdict(node) for node in where.nodes],
        "launch": _launch(where),
        "environment": where.environment,
        "doctor": where.findings,
        "inline_prompts": list(loaded.inline_prompts),  # of an exp_config.json
        "versions": {
            "python": platform.python_version(),
            "mpi": where.mpi_library or None,
            **package_versions(_PACKAGES),
        },
    }


def _host(rank: RankResources) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "pid": rank.pid,
        "num_cores": rank.num_cores,
        "memory_available_bytes": rank.memory_available_bytes,
        "launcher": rank.launcher,
    }


def _launch(where: Surroundings) -> dict[str, Any]:
    return {
        "num_nodes": len({rank.host for rank in where.resources}),
        "num_ranks": len(where.resources),
        "launcher": where.launch.launcher.value,
        "mpi": where.launch.detail or None,  # srun's --mpi
    }


def complete_manifest(
    first: dict[str, Any], session: Session, loaded: LoadedConfig, acquired: Acquired
) -> dict[str, Any]:
    """The manifest of a run that is about to generate (head).

    `basis` is as the run acquired its folder: the files may have been edited since. `config` is
    the resolved configuration, as a file that can be run again: `model.path` absolute, every `auto`
    replaced by what the plan holds; `plan.resolved` gives the reasons.
    """
    plan = session.plan
    return {
        **first,
        "basis": dict(acquired.fingerprint),
        "config": _resolved_config(session, loaded, acquired.folder),
        "plan": json.loads(plan.to_json()),
        "replicas": [_replica(one) for one in session.plans],
        "hashes": {**first["hashes"], "plan": plan.content_hash()},
    }


def _attempt(acquired: Acquired, where: Surroundings) -> dict[str, Any]:
    job = read_job(os.environ)
    started = datetime.fromtimestamp(where.started_unix_s, UTC)
    return {
        "attempt": acquired.attempt,
        "mpipipe": __version__,
        "started": started.isoformat(timespec="seconds"),
        "unix_s": where.started_unix_s,
        "t_s": where.started_s,
        "job": job.label if job is not None else None,
        "hosts": [rank.host for rank in where.resources],
        **kept_counts(acquired.earlier.records),
    }


def _replica(plan: PipelinePlan) -> dict[str, Any]:
    """Where a replica is, and what its own plan decides."""
    return {
        "replica": plan.replica,
        "ranks": list(plan.ranks),
        "split": [stage.num_layers for stage in plan.stages],
        "num_kv_pages": plan.num_kv_pages,
        "plan": plan.content_hash(),
    }


def _resolved_config(session: Session, loaded: LoadedConfig, folder: Path) -> dict[str, Any]:
    plan = session.plan
    config: dict[str, Any] = to_dict(loaded.config)
    config["model"] |= {"path": plan.model_path, "dtype": plan.dtype}
    splits = {tuple(stage.num_layers for stage in one.stages) for one in session.plans}
    config["pipeline"] |= {
        "replicas": plan.num_replicas,
        "num_stages": plan.num_stages if len(set(map(len, splits))) == 1 else AUTO,
        "tensor_parallel": plan.tensor_parallel,
        "split": list(splits.pop()) if len(splits) == 1 else AUTO,
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
