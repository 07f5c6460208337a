"""What a `ds_config.json` expects of a run, and whether the plan agrees.

Only the stage count, the dtype and the batch size matter to inference; every other key is left
alone. The file is a cross-check, never a source of settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.config.files import parse_table, read_text
from mpipipe.errors import ConfigError

__all__ = ["DeepSpeedExpectations", "check_against_plan", "dtype_name", "read_expectations"]

_OLD_DTYPES = {
    "float32": ("float32", "fp32", "float"),
    "float16": ("float16", "fp16", "half"),
    "bfloat16": ("bfloat16", "bf16"),
    "auto": ("auto",),
}
_DTYPES = {old: dtype for dtype, names in _OLD_DTYPES.items() for old in names}
_BATCH_KEYS = ("train_micro_batch_size_per_gpu", "train_batch_size")
_DS_AUTO = "auto"  # in these files: left to the launcher, so nothing is expected


@dataclass(frozen=True, slots=True)
class DeepSpeedExpectations:
    """What the file says; None: it says nothing."""

    path: Path
    num_stages: int | None = None
    dtype: str | None = None
    batch_size: int | None = None  # sequences per micro-batch


def dtype_name(value: object, source: str) -> str:
    """Today's name of a dtype in any of its old spellings.

    Raises:
        ConfigError: no such dtype; `source` names where it was found.
    """
    word = value.removeprefix("torch.").lower() if isinstance(value, str) else ""
    if word not in _DTYPES:
        raise ConfigError(f"{source} = {value!r} is no dtype: use float32, bfloat16 or float16")
    return _DTYPES[word]


def read_expectations(path: Path) -> DeepSpeedExpectations:
    """The expectations in the file at `path`.

    Raises:
        ConfigError: not readable, not JSON, or a value of the wrong kind.
    """
    raw = parse_table(read_text(path, "DeepSpeed configuration"), path)
    return DeepSpeedExpectations(
        path=path,
        num_stages=_num_stages(raw, path),
        dtype=_dtype(raw, path),
        batch_size=next((n for k in _BATCH_KEYS if (n := _count(raw, k, path)) is not None), None),
    )


def _num_stages(raw: dict[str, Any], path: Path) -> int | None:
    inner = _count(_table(raw, "pipeline", path), "stages", path)
    outer = _count(raw, "pipeline_parallel_size", path)
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(
            f"{path}: pipeline.stages = {inner} and pipeline_parallel_size = {outer} disagree: "
            "remove one of them"
        )
    return inner if inner is not None else outer


def _dtype(raw: dict[str, Any], path: Path) -> str | None:
    enabled = [
        dtype
        for key, dtype in (("fp16", "float16"), ("bf16", "bfloat16"))
        if _table(raw, key, path).get("enabled") is True
    ]
    if len(enabled) > 1:
        raise ConfigError(f"{path}: fp16 and bf16 are both enabled: switch one of them off")
    if enabled:
        return enabled[0]
    if raw.get("dtype", _DS_AUTO) == _DS_AUTO:
        return None
    return dtype_name(raw["dtype"], f"{path}: dtype")


def _table(raw: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key} = {value!r} must be an object")
    return value


def _count(raw: dict[str, Any], key: str, path: Path) -> int | None:
    value = raw.get(key, _DS_AUTO)
    if value == _DS_AUTO:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}: {key} = {value!r} must be a whole number from 1 on")
    return value


def check_against_plan(
    expected: DeepSpeedExpectations, *, num_stages: int, dtype: str, max_sequences_per_slot: int
) -> list[str]:
    """Sentences for what the plan does differently without harm: dtype and batch size.

    Raises:
        ConfigError: the stage count differs, so the file was written for another launch.
    """
    if expected.num_stages is not None and expected.num_stages != num_stages:
        raise ConfigError(
            f"{expected.path} expects {expected.num_stages} pipeline stages, the plan has "
            f"{num_stages}: start {expected.num_stages} ranks, or correct the file"
        )
    warnings = []
    if expected.dtype is not None and expected.dtype != dtype:
        warnings.append(
            f"{expected.path} expects {expected.dtype}, the plan computes in {dtype}: set "
            f"model.dtype={expected.dtype} to follow the file"
        )
    if expected.batch_size is not None and expected.batch_size != max_sequences_per_slot:
        warnings.append(
            f"{expected.path} expects micro-batches of {expected.batch_size}, the plan allows "
            f"{max_sequences_per_slot}: set pipeline.max_sequences_per_slot={expected.batch_size} "
            "to follow the file"
        )
    return warnings
