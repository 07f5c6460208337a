"""What a run left in its folder, as far as it is there: a killed run leaves torn lines and gaps.

Nothing here fails because a file lacks; what is missing is None or empty. Whether the run went well
is judged from its exit code (`outcome`), not from these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.plain_values import json_object

__all__ = ["RankSamples", "RunFiles", "read_run_files"]


@dataclass(frozen=True, slots=True)
class RankSamples:
    """The time series of one rank."""

    rank: int
    host: str
    num_cores: int | None  # of its host, for all
    samples: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The parts of a run folder that a record is made of."""

    manifest: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    error: str  # that ended the run; empty: none is told
    error_kind: str
    generating_s: float | None  # when generating began, on the head's own clock
    ranks: tuple[RankSamples, ...]
    lengths: tuple[tuple[int, int], ...]  # (prompt tokens, output tokens) of each completion
    tokens_hash: str | None  # of ids and token ids; None: none, or some are no completions
    num_failed: int  # completions that are error records
    gpu_names: tuple[str, ...]  # of the ranks that have one

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of each rank, in their order."""
        return tuple(_hosts(self.manifest).values())


def read_run_files(folder: Path) -> RunFiles:
    """What is in the run folder `folder`; there may be nothing."""
    manifest = _object(folder / "manifest.json") or {}
    events = _lines(folder / "rank_0.log")
    status = _object(folder / "status.json") or {}
    completions = _lines(folder / "completions.jsonl")
    failed = [line for line in completions if line.get("error") is not None]
    ended = _first(reversed(events), "ended early")
    begun = _first(events, "generating")
    return RunFiles(
        manifest=manifest,
        metrics=_object(folder / "metrics.json"),
        error=str(status.get("error") or ended.get("error") or ""),
        error_kind=str(ended.get("kind") or ""),
        generating_s=_number(begun.get("t_s")),
        ranks=tuple(
            RankSamples(rank, host, _cores(manifest, host), tuple(samples))
            for rank, host in _hosts(manifest).items()
            if (samples := _lines(folder / f"samples_rank_{rank}.jsonl"))
        ),
        lengths=tuple(
            (int(line["num_prompt_tokens"]), int(line["num_output_tokens"]))
            for line in completions
            if line not in failed and "num_prompt_tokens" in line and "num_output_tokens" in line
        ),
        tokens_hash=_tokens_hash(completions),
        num_failed=len(failed),
        gpu_names=_gpu_names(events),
    )


def _first(events: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((event for event in events if event.get("event") == name), {})


def _tokens_hash(completions: Sequence[Mapping[str, Any]]) -> str | None:
    """Of the ids of all tokens by the prompts' ids: the order of the file does not count.

    None: there is no completion, or a line has no tokens, as an error record has none.
    """
    if not completions or not all(
        isinstance(line.get("token_ids"), list) and line.get("error") is None
        for line in completions
    ):
        return None
    tokens = sorted((str(line.get("id")), line["token_ids"]) for line in completions)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _hosts(manifest: Mapping[str, Any]) -> dict[int, str]:
    hosts = manifest.get("hosts")
    rows = [row for row in hosts if isinstance(row, dict)] if isinstance(hosts, list) else []
    return {int(row["rank"]): str(row["host"]) for row in rows if {"rank", "host"} <= row.keys()}


def _cores(manifest: Mapping[str, Any], host: str) -> int | None:
    nodes = manifest.get("nodes")
    for node in nodes if isinstance(nodes, list) else []:
        if isinstance(node, dict) and node.get("host") == host:
            cores = node.get("num_cores")
            return cores if isinstance(cores, int) else None
    return None


def _gpu_names(events: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """As each rank has told in the handshake."""
    resources = _first(events, "handshake").get("resources")
    gpus = [rank.get("gpu") or {} for rank in resources] if isinstance(resources, list) else []
    return tuple(str(gpu["name"]) for gpu in gpus if gpu.get("name"))


def _object(path: Path) -> dict[str, Any] | None:
    try:
        return json_object(path.read_bytes())
    except OSError:
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a torn line is left out."""
    try:
        # Not str.splitlines: a text may hold U+2028, which it takes for the end of a line.
        with path.open("rb") as file:
            return [value for line in file if (value := json_object(line)) is not None]
    except OSError:
        return []


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]
