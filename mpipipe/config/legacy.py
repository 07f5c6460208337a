"""`exp_config.json` and `ds_config.json`: the older experiment style, read by a table.

A JSON file is in that style when it has at least one key of the table `TARGETS` and no sections (no
value is an object), or objects of the older style (`legacy_nested.py`). `load.py` merges and
checks. Invariant: nothing is dropped silently: a key is mapped, named in a warning, or an error.

| old key | becomes |
|---|---|
| `model_path`, `model_name_or_path`, `model` | `model.path` |
| `tokenizer_path`, `tokenizer_name` | `model.tokenizer_path` |
| `torch_dtype`, `dtype` | `model.dtype` (`torch.float16`, `fp16`, `half` … understood) |
| `trust_remote_code` | `model.trust_remote_code` |
| `prompts`: list | the prompts themselves |
| `prompts`: text; `prompt_file`, `prompts_file`, `prompts_path` | `prompts.path` |
| `outputs`, `output_dir`, `output_path` | `output.dir`; a file name loses its suffix |
| `max_new_tokens`, `generation_length`, `gen_length` | `generation.max_new_tokens` |
| `max_length` | `generation.max_new_tokens`, with a warning: here the prompt does not count |
| `do_sample` | false: greedy; true: `temperature` (1 if absent), `top_k` (50 if absent) |
| `do_sample` absent | greedy if a filter is given; else the model's own settings decide |
| `temperature`, `top_k`, `top_p`, `min_p` | the same under `generation`, if `do_sample` |
| `repetition_penalty`, `seed`, `stop_strings` | `generation`'s; `stop_strings` is `stop` |
| `pipeline_parallel_size`, `pipeline_size`, `num_stages`, `world_size` | `pipeline.num_stages` |
| `batch_size` | `pipeline.max_sequences_per_slot` |
| `micro_batches` | `pipeline.num_slots` |
| `nodes` (a number, or a list of hosts), `gpus_per_node` | their product: `pipeline.num_stages` |
| `name`, `experiment_name`, `run_name` | `name` |
| `num_return_sequences`, `num_beams` | must be 1 |
| `local_files_only` | nothing is ever downloaded; false gets a warning |
| `deepspeed_config`, `ds_config` | the file to read instead of `ds_config.json` beside it |
| `device_map`, `low_cpu_mem_usage`, `use_cache` | a warning: decided by the plan |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.config.binding import merge, nearest, settings, short
from mpipipe.config.deepspeed import DeepSpeedExpectations, dtype_name, read_expectations
from mpipipe.config.files import expand_path
from mpipipe.config.legacy_nested import KEYS, FlatConfig, flatten, is_nested
from mpipipe.errors import ConfigError

__all__ = [
    "DeepSpeedExpectations",
    "InlinePrompt",
    "LegacyConfig",
    "convert",
    "is_legacy",
]

InlinePrompt = str | Mapping[str, Any]  # a text, or an object as on a line of a prompt file

_OLD_NAMES = {  # setting of today → its old keys
    "model.path": ("model_path", "model_name_or_path", "model"),
    "model.tokenizer_path": ("tokenizer_path", "tokenizer_name"),
    "model.dtype": ("torch_dtype", "dtype"),
    "model.trust_remote_code": ("trust_remote_code",),
    "prompts.path": ("prompts", "prompt_file", "prompts_file", "prompts_path"),
    "output.dir": ("outputs", "output_dir", "output_path"),
    "generation.max_new_tokens": (
        "max_new_tokens",
        "generation_length",
        "gen_length",
        "max_length",
    ),
    "generation.temperature": ("temperature",),
    "generation.top_k": ("top_k",),
    "generation.top_p": ("top_p",),
    "generation.min_p": ("min_p",),
    "generation.repetition_penalty": ("repetition_penalty",),
    "generation.seed": ("seed",),
    "generation.stop": ("stop_strings",),
    "pipeline.num_stages": ("pipeline_parallel_size", "pipeline_size", "num_stages", "world_size"),
    "pipeline.num_slots": ("micro_batches",),
    "pipeline.max_sequences_per_slot": ("batch_size",),
    "name": ("name", "experiment_name", "run_name"),
}
TARGETS = {old: setting for setting, names in _OLD_NAMES.items() for old in names}
_ONLY_ONE = ("num_return_sequences", "num_beams")
_DS_KEYS = ("deepspeed_config", "ds_config")
_DECIDED_BY_PLAN = ("device_map", "low_cpu_mem_usage", "use_cache")
_NODES, _PER_NODE = "nodes", "gpus_per_node"
_SPECIAL = (
    "do_sample",
    "local_files_only",
    *_ONLY_ONE,
    *_DS_KEYS,
    *_DECIDED_BY_PLAN,
    _NODES,
    _PER_NODE,
)
_FILTERS = ("temperature", "top_k", "top_p", "min_p")  # without effect when greedy
_MOST_RANKS = 1 << 20
_DEFAULT_TOP_K = 50  # what transformers samples with when nothing else is said
_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".log")


@dataclass(frozen=True, slots=True)
class LegacyConfig:
    """An old experiment file in today's words."""

    values: dict[str, Any]  # section -> setting -> value
    inline_prompts: tuple[InlinePrompt, ...]
    warnings: tuple[str, ...]
    deepspeed: DeepSpeedExpectations | None


def is_legacy(raw: Mapping[str, Any]) -> bool:
    """True when the keys are those of an `exp_config.json`."""
    known = set(TARGETS) - {"name"} | set(_SPECIAL)
    objects = {key for key, value in raw.items() if isinstance(value, dict) and key != "device_map"}
    has_old_key = any(key in known for key in raw if key not in objects)
    sections = {name.partition(".")[0] for name in settings()}
    return is_nested(raw) or (has_old_key and (not objects or bool(objects - sections)))


def convert(raw: Mapping[str, Any], path: Path) -> LegacyConfig:
    """`raw`, read from `path`, by the table above.

    Raises:
        ConfigError: unknown keys, two keys that disagree, or a value that has no meaning here.
    """
    warnings: list[str] = []
    flat = flatten(raw)
    _check_keys(flat, path)
    inline, mapped = _mapped(flat, path, warnings)
    values = {target: value for target, (_, value) in mapped.items()}
    values = _nodes(values, flat.values, path, warnings)
    # A file with an object `sampling` says do_sample only if it means it.
    as_said = "do_sample" not in flat.values and isinstance(raw.get("sampling"), dict)
    if not as_said:
        values = _sampling(values, flat.values, path, warnings)
    _check_special(flat.values, path, warnings)
    nested: dict[str, Any] = flat.of_today
    for target, value in values.items():
        section, _, name = target.rpartition(".")
        nested = merge(nested, {section: {name: value}} if section else {name: value})
    return LegacyConfig(nested, inline, tuple(warnings), _deepspeed(flat.values, path))


def _mapped(
    flat: FlatConfig, path: Path, warnings: list[str]
) -> tuple[tuple[InlinePrompt, ...], dict[str, tuple[str, Any]]]:
    """The prompts that the file holds, and target → (old key as written, value)."""
    inline: tuple[InlinePrompt, ...] = ()
    mapped: dict[str, tuple[str, Any]] = {}
    for key, old in flat.values.items():
        if key not in TARGETS:
            continue
        if key == "prompts" and isinstance(old, list):
            inline = _inline_prompts(old, path)
            continue
        target, name = TARGETS[key], flat.names[key]
        value = _converted(key, name, old, path, warnings)
        if target in mapped and mapped[target][1] != value:
            raise _differ(mapped[target][0], name, target, path)
        mapped[target] = (name, value)
    if inline and "prompts.path" in mapped:
        first = mapped["prompts.path"][0]
        raise ConfigError(f"{path}: 'prompts' and {first!r} both give prompts: remove one of them")
    return inline, mapped


def _differ(first: str, second: str, target: str, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: {first!r} and {second!r} both mean {target} but differ: remove one of them"
    )


def _check_keys(flat: FlatConfig, path: Path) -> None:
    for first, second in flat.clashes:
        raise _differ(first, second, "the same", path)
    known = (*TARGETS, *_SPECIAL)
    unknown = [*(key for key in flat.values if key not in known), *flat.unknown]
    if not unknown:
        return
    told = [_unknown_key(key) for key in unknown]
    rest = "" if all("did you mean" in one for one in told) else f"; it may have {', '.join(known)}"
    raise ConfigError(
        f"{path}: unknown key{'s' if len(told) > 1 else ''} in an exp_config file: "
        + "; ".join(told)
        + rest
    )


def _unknown_key(key: str) -> str:
    """The key with what it would be now, if that can be guessed."""
    dotted = {
        f"{section}.{name}": old for section, keys in KEYS.items() for name, old in keys.items()
    }
    now = {**{name: name for name in settings()}, **TARGETS, **dict.fromkeys(_SPECIAL, "")}
    now |= {name: TARGETS.get(old, "") for name, old in dotted.items()}
    guess = nearest(key, now)
    if not guess:
        return f'"{key:.60}" has no counterpart: remove it'
    means = f" (now {now[guess]})" if now[guess] not in ("", guess) else ""
    return f'"{key:.60}", did you mean "{guess}"?{means}'


def _inline_prompts(prompts: list[Any], path: Path) -> tuple[InlinePrompt, ...]:
    if not prompts:
        raise ConfigError(f"{path}: 'prompts' is empty: give at least one prompt")
    for position, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, (str, dict)):
            raise ConfigError(
                f"{path}: prompt {position} of 'prompts' is {short(prompt)}: it must be a text"
            )
    return tuple(prompts)


def _converted(key: str, name: str, value: Any, path: Path, warnings: list[str]) -> Any:
    """The value of the old key `key`, written as `name`, as its setting of today takes it."""
    if key == "max_length":
        warnings.append(
            f"{path}: {name} = {short(value)} is taken as the number of new tokens; the prompt "
            "does not count (write max_new_tokens)"
        )
    match TARGETS[key]:
        case "model.dtype":
            return dtype_name(value, f"{path}: {name}")
        case "output.dir" if isinstance(value, str) and value.endswith(_FILE_SUFFIXES):
            folder = str(Path(value).with_suffix(""))
            warnings.append(
                f"{path}: {name} = {short(value)} is a file; a run writes a folder: taking "
                f"{folder!r}"
            )
            return folder
        case "generation.stop" if isinstance(value, str):
            return [value]
        case "generation.top_k" if type(value) is int and value == -1:
            return 0  # off, in vLLM's files
    return value


def _nodes(
    values: dict[str, Any], raw: Mapping[str, Any], path: Path, warnings: list[str]
) -> dict[str, Any]:
    """`values` with the ranks that the file's nodes make, one stage each."""
    if _NODES not in raw and _PER_NODE not in raw:
        return values
    nodes = raw.get(_NODES, 1)
    nodes = len(nodes) if isinstance(nodes, list) else nodes
    per_node = raw.get(_PER_NODE, 1)
    for key, count in ((_NODES, nodes), (_PER_NODE, per_node)):
        if type(count) is not int or not 1 <= count <= _MOST_RANKS:
            raise ConfigError(f"{path}: {key} = {short(count)} must be a whole number from 1 on")
    ranks = nodes * per_node
    warnings.append(
        f"{path}: the nodes are the launcher's business: start {ranks} ranks, "
        f"srun -N{nodes} --ntasks-per-node={per_node}, or mpirun -n {ranks}"
    )
    stages = values.get("pipeline.num_stages", ranks)
    if stages != ranks:
        raise ConfigError(
            f"{path}: {nodes} nodes with {per_node} GPUs each make {ranks} ranks, but the pipeline "
            f"has {short(stages)} stages: one rank holds one stage; correct one of them"
        )
    return {**values, "pipeline.num_stages": ranks}


def _sampling(
    values: dict[str, Any], raw: Mapping[str, Any], path: Path, warnings: list[str]
) -> dict[str, Any]:
    """`values` with `do_sample` applied, as transformers understands it."""
    do_sample = _flag(raw, "do_sample", False, path)
    if do_sample:
        return {
            "generation.temperature": 1.0,
            "generation.top_k": _DEFAULT_TOP_K,
            **values,
        }
    unused = [name for name in _FILTERS if f"generation.{name}" in values]
    if unused and values.get("generation.temperature") != 0:
        why = "do_sample is false" if "do_sample" in raw else "do_sample is absent"
        warnings.append(
            f"{path}: {why}, so decoding is greedy and {', '.join(unused)} has no effect; "
            'add "do_sample": true to sample'
        )
    kept = {name: v for name, v in values.items() if name.rpartition(".")[2] not in _FILTERS}
    # What is said here, by the file or by the warning, wins over the model's own do_sample.
    said = "do_sample" in raw or bool(unused)
    return {**kept, "generation.temperature": 0.0} if said else kept


def _flag(raw: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} = {short(value)} must be true or false")
    return value


def _check_special(raw: Mapping[str, Any], path: Path, warnings: list[str]) -> None:
    if not _flag(raw, "local_files_only", True, path):
        warnings.append(
            f"{path}: local_files_only is false, but nothing is ever downloaded: "
            "the model folder must be complete"
        )
    for key in _ONLY_ONE:
        if raw.get(key, 1) != 1:
            raise ConfigError(f"{path}: {key} = {short(raw[key])} is not supported: it must be 1")
    warnings.extend(
        f"{path}: {key} has no effect: the plan places layers and caches"
        for key in _DECIDED_BY_PLAN
        if key in raw
    )


def _deepspeed(raw: Mapping[str, Any], path: Path) -> DeepSpeedExpectations | None:
    for key in _DS_KEYS:
        if key in raw:
            if not isinstance(raw[key], str):
                raise ConfigError(f"{path}: {key} = {short(raw[key])} must be the path of a file")
            given = Path(expand_path(raw[key], key))
            beside = path.parent / given
            is_beside = not os.path.exists(given) and os.path.exists(beside)
            return read_expectations(beside if is_beside else given)
    beside = path.parent / "ds_config.json"
    return read_expectations(beside) if os.path.exists(beside) else None
