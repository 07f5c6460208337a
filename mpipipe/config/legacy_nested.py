"""`exp_config.json` with objects: `model`, `pipeline`, `sampling`, `nodes` … become flat keys.

| old object | its keys, and the flat key that each becomes |
|---|---|
| `model` | `name`, `name_or_path`: `model_path`; `dtype`, `precision`; `tokenizer` |
| `pipeline` | `stages`, `size`: `num_stages`; `micro_batches`; `micro_batch_size`: `batch_size` |
| `sampling`, `generation` | `max_tokens`: `max_new_tokens`; `stop`: `stop_strings`; … |
| `nodes` | `count`, `hosts`: `nodes`; `gpus_per_node`, `tasks_per_node`: `gpus_per_node` |
| `prompts` | `file`: `prompt_file`; `texts`: the prompts themselves |
| `output`, `outputs` | `dir`, `path`, `folder`, `file`: `output_dir` |
| `tokenizer` | `name`, `path`: `tokenizer_path` |

Keys of today inside these objects stay what they are. `legacy.py` says what flat keys mean.
Invariant: a key that has no meaning is kept, by its dotted name, to be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpipipe.config.binding import settings

__all__ = ["KEYS", "FlatConfig", "flatten", "is_nested"]

_SAMPLING = {
    "max_new_tokens": ("max_new_tokens", "max_tokens"),
    "stop_strings": ("stop_strings", "stop"),
    "num_return_sequences": ("num_return_sequences", "n"),
    **{name: (name,) for name in ("do_sample", "max_length", "temperature", "top_k", "top_p")},
    **{name: (name,) for name in ("min_p", "repetition_penalty", "seed", "num_beams")},
}
_OUTPUT: dict[str, tuple[str, ...]] = {
    "output_dir": ("dir", "path", "folder", "file", "output_dir")
}
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {  # object → flat key → its names in the object
    "model": {
        "model_path": ("name", "path", "name_or_path", "model_path", "model_name_or_path"),
        "dtype": ("dtype", "torch_dtype", "precision"),
        "tokenizer_path": ("tokenizer", "tokenizer_path", "tokenizer_name"),
        **{name: (name,) for name in ("trust_remote_code", "local_files_only", "device_map")},
    },
    "pipeline": {
        "num_stages": ("stages", "size", "num_stages", "pipeline_parallel_size"),
        "micro_batches": (
            *("micro_batches", "num_micro_batches", "microbatches", "num_microbatches"),
            "chunks",
        ),
        "batch_size": ("batch_size", "micro_batch_size"),
    },
    "sampling": _SAMPLING,
    "generation": _SAMPLING,
    "nodes": {
        "nodes": ("count", "num_nodes", "nodes", "hosts"),
        "gpus_per_node": ("gpus_per_node", "ranks_per_node", "tasks_per_node"),
    },
    "prompts": {"prompt_file": ("file", "path"), "prompts": ("texts", "list", "prompts")},
    "output": _OUTPUT,
    "outputs": _OUTPUT,
    "tokenizer": {"tokenizer_path": ("name", "path")},
}
KEYS = {
    section: {name: key for key, names in keys.items() for name in names}
    for section, keys in _NAMES.items()
}
_ONLY_OLD = ("sampling", "nodes", "outputs", "tokenizer")  # objects that are no sections of today


@dataclass(frozen=True, slots=True)
class FlatConfig:
    """An old file without its objects."""

    values: dict[str, Any] = field(default_factory=dict)  # flat old key -> value
    names: dict[str, str] = field(default_factory=dict)  # flat old key -> as it is written
    of_today: dict[str, dict[str, Any]] = field(default_factory=dict)  # section -> setting -> value
    unknown: list[str] = field(default_factory=list)  # dotted
    clashes: list[tuple[str, str]] = field(default_factory=list)  # two names of one key that differ


def is_nested(raw: Mapping[str, Any]) -> bool:
    """True when an object in `raw` is in the old style: no section of today, or with an old key."""
    return any(
        section in _ONLY_OLD
        or any(key in KEYS[section] and f"{section}.{key}" not in settings() for key in inner)
        for section, inner in raw.items()
        if isinstance(inner, dict) and section in KEYS
    )


def flatten(raw: Mapping[str, Any]) -> FlatConfig:
    """`raw` with the keys of its objects as flat keys."""
    flat = FlatConfig()
    for name, value in raw.items():
        if not isinstance(value, dict) or name == "device_map":
            _add(flat, name, name, value)
            continue
        for key, inner in value.items():
            dotted = f"{name}.{key}"
            if key in KEYS.get(name, {}):
                _add(flat, KEYS[name][key], dotted, inner)
            elif dotted in settings():
                flat.of_today.setdefault(name, {})[key] = inner
            else:
                flat.unknown.append(dotted)
        if not value and name not in KEYS and not any(s.startswith(f"{name}.") for s in settings()):
            flat.unknown.append(name)
    return flat


def _add(flat: FlatConfig, key: str, name: str, value: Any) -> None:
    if key in flat.values and flat.values[key] != value:
        flat.clashes.append((flat.names[key], name))
    flat.values[key] = value
    flat.names[key] = name
