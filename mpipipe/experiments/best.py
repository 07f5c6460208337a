"""The configuration of the best case, as a file that builds on the experiment's own. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpipipe.config.binding import layer_overrides, merge
from mpipipe.config.load import read_words
from mpipipe.experiments.record import Matrix
from mpipipe.experiments.verdict import ExperimentVerdict

__all__ = ["best_config"]

# What the best case has found; the rest that cases set is for the measurement only.
_FOUND = (
    "replicas", "num_stages", "tensor_parallel", "num_slots", "max_sequences_per_slot"
)  # fmt: skip


def best_config(
    matrix: Matrix, verdict: ExperimentVerdict, place: Path, *, extends: Path | None
) -> str | None:
    """TOML of the best case of a batch or arrangements experiment; None: no case is valid.

    Args:
        matrix: of the experiment.
        verdict: on its records.
        place: the file that the text is for.
        extends: the experiment's configuration file; None: it began from a model.
    """
    best = verdict.best
    if best is None or best.speed is None:
        return None
    named = read_words(None, matrix.words)
    values = layer_overrides(named.settings)
    if named.prompts is not None:
        values = merge({"prompts": {"path": named.prompts}}, values)
    measured = layer_overrides(best.case.words)["pipeline"]
    values = merge(values, {"pipeline": {name: measured[name] for name in _FOUND}})
    speed = f"{best.speed.median:.1f} tokens/s ({best.speed.low:.1f} to {best.speed.high:.1f})"
    lines = [f"# Written by `mpipipe bench {matrix.experiment}`: {best.case.name} made {speed}."]
    if matrix.experiment == "batch":
        safe = verdict.largest_safe_batch or "none"
        lines.append(f"# Knee: {verdict.knee or 'not shown'}; largest batch that ran: {safe}.")
    if extends is not None:
        relative = os.path.relpath(extends.absolute(), place.absolute().parent)
        lines.append(f"extends = {_toml(relative)}")
    else:
        values = merge({"model": {"path": matrix.settings["model.path"]}}, values)
    lines += _settings(values)
    for name, section in values.items():
        if isinstance(section, dict) and section:
            lines += ["", f"[{name}]", *_settings(section)]
    return "\n".join(lines) + "\n"


def _settings(section: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} = {_toml(value)}" for key, value in section.items() if not isinstance(value, dict)
    ]


def _toml(value: Any) -> str:
    """A value of a setting: JSON's texts, numbers, truth values and lists are TOML's."""
    return json.dumps(value, ensure_ascii=False)
