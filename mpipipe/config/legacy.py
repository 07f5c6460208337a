"""`exp_config.json` and `ds_config.json`: the older experiment style, read by a table.

A JSON file is in that style when it has at least one flat key of the table `TARGETS` and no
sections (no value is an object), or objects of the older style. `load.py` merges and checks.
Invariant: nothing is dropped silently: a key is mapped, named in a warning, or an error. Of a
`ds_config.json` stage count, dtype and batch size are compared with the plan; it sets nothing.

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

| old object | its keys |
|---|---|
| `model` | `name`, `name_or_path`: `model.path`; `dtype`, `precision`; `tokenizer` |
| `pipeline` | `stages`, `size`: the stages; `micro_batches`; `micro_batch_size`: `batch_size` |
| `sampling`, `generation` | `max_tokens`: `max_new_tokens`; `stop`: `stop_strings`; … |
| `nodes` | `count`, `hosts`: `nodes`; `gpus_per_node`, `tasks_per_node`: `gpus_per_node` |
| `prompts` | `file`: `prompt_file`; `texts`: the prompts themselves |
| `output`, `outputs` | `dir`, `path`, `folder`, `file`: `output.dir` |
| `tokenizer` | `name`, `path`: `model.tokenizer_path` |

Keys of today inside these objects stay what they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe.config.binding import merge, nearest, sections, settings, short
from mpipipe.config.files import expand_path, parse_table, read_text
from mpipipe.errors import ConfigError

__all__ = [
    "TARGETS",
    "ConfigLayer",
    "DeepSpeedExpectations",
    "InlinePrompt",
    "check_against_plan",
    "convert",
    "is_legacy",
]

InlinePrompt = str | Mapping[str, Any]  # a text, or an object as on a line of a prompt file

_FILTERS = ("temperature", "top_k", "top_p", "min_p")  # without effect when greedy
_SAME_IN_GENERATION = (*_FILTERS, "repetition_penalty", "seed")
# Setting of today, or a key that is read below → its old names; with a dot: inside an object, of
# which `sampling` may be called `generation`, and `output` `outputs`.
_OLD_NAMES = {
    "model.path": """
        model_path model_name_or_path model
        model.name model.path model.name_or_path model.model_path model.model_name_or_path""",
    "model.tokenizer_path": """
        tokenizer_path tokenizer_name tokenizer.name tokenizer.path
        model.tokenizer model.tokenizer_path model.tokenizer_name""",
    "model.dtype": "torch_dtype dtype model.dtype model.torch_dtype model.precision",
    "model.trust_remote_code": "trust_remote_code model.trust_remote_code",
    "prompts.path": """
        prompts prompt_file prompts_file prompts_path
        prompts.file prompts.path prompts.texts prompts.list prompts.prompts""",
    "output.dir": """
        outputs output_dir output_path
        output.dir output.path output.folder output.file output.output_dir""",
    "pipeline.num_stages": """
        pipeline_parallel_size pipeline_size num_stages world_size
        pipeline.stages pipeline.size pipeline.num_stages pipeline.pipeline_parallel_size""",
    "pipeline.num_slots": """
        micro_batches pipeline.micro_batches pipeline.num_micro_batches pipeline.microbatches
        pipeline.num_microbatches pipeline.chunks""",
    "pipeline.max_sequences_per_slot": """
        batch_size pipeline.batch_size pipeline.micro_batch_size""",
    "generation.max_new_tokens": """
        max_new_tokens generation_length gen_length max_length
        sampling.max_new_tokens sampling.max_tokens sampling.max_length""",
    "generation.stop": "stop_strings sampling.stop_strings sampling.stop",
    **{f"generation.{name}": f"{name} sampling.{name}" for name in _SAME_IN_GENERATION},
    "name": "name experiment_name run_name",
    "do_sample": "do_sample sampling.do_sample",
    "num_beams": "num_beams sampling.num_beams",
    "num_return_sequences": "num_return_sequences sampling.num_return_sequences sampling.n",
    "nodes": "nodes nodes.count nodes.num_nodes nodes.nodes nodes.hosts",
    "gpus_per_node": "gpus_per_node nodes.gpus_per_node nodes.ranks_per_node nodes.tasks_per_node",
    "local_files_only": "local_files_only model.local_files_only",
    "deepspeed_config": "deepspeed_config ds_config",
    "device_map": "device_map model.device_map",
    "low_cpu_mem_usage": "low_cpu_mem_usage",
    "use_cache": "use_cache",
}
TARGETS = {
    name.replace(object_name, other_name): target
    for target, names in _OLD_NAMES.items()
    for name in names.split()
    for object_name, other_name in (("", ""), ("sampling.", "generation."), ("output.", "outputs."))
}
_OLD_OBJECTS = {name.partition(".")[0] for name in TARGETS if "." in name}
_PROMPT_LISTS = ("prompts", "prompts.texts", "prompts.list", "prompts.prompts")
_ONLY_ONE = ("num_return_sequences", "num_beams")
_DECIDED_BY_PLAN = ("device_map", "low_cpu_mem_usage", "use_cache")
_MOST_RANKS = 1 << 20
_DEFAULT_TOP_K = 50  # what transformers samples with when nothing else is said
_FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".log")
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


@dataclass(frozen=True, slots=True)
class ConfigLayer:
    """What one configuration file says, in today's words."""

    path: Path
    values: dict[str, Any]  # section -> setting -> value
    inline_prompts: tuple[InlinePrompt, ...] = ()
    warnings: tuple[str, ...] = ()
    deepspeed: DeepSpeedExpectations | None = None
    base: Path | None = None  # the file that it extends


def is_legacy(raw: Mapping[str, Any]) -> bool:
    """True when the keys are those of an `exp_config.json`."""
    objects = {key for key, value in raw.items() if isinstance(value, dict) and key != "device_map"}
    has_old_object = any(
        key in _OLD_OBJECTS - sections().keys()
        or any(name in TARGETS and name not in settings() for name, _ in _names({key: raw[key]}))
        for key in objects
    )
    has_old_key = any(key in TARGETS and key != "name" for key in raw.keys() - objects)
    return has_old_object or (has_old_key and (not objects or bool(objects - sections().keys())))


def _names(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of `raw`; what an object holds is `object.key`."""
    for name, value in raw.items():
        if not isinstance(value, dict) or name == "device_map":
            yield name, value
        elif not value and name not in _OLD_OBJECTS and name not in sections():
            yield name, value  # to be told as unknown
        else:
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())


def convert(raw: Mapping[str, Any], path: Path) -> ConfigLayer:
    """`raw`, read from `path`, by the table above.

    Raises:
        ConfigError: unknown keys, two keys that disagree, or a value that has no meaning here.
    """
    warnings: list[str] = []
    values, inline = _by_target(raw, path, warnings)
    settled = _nodes(values, path, warnings)
    # A file with an object `sampling` says do_sample only if it means it.
    if "do_sample" in values or not isinstance(raw.get("sampling"), dict):
        settled = _sampling(settled, path, warnings)
    _check_special(values, path, warnings)
    nested: dict[str, Any] = {}
    for target, value in settled.items():
        section, _, name = target.rpartition(".")
        if target in settings():
            nested = merge(nested, {section: {name: value}} if section else {name: value})
    return ConfigLayer(path, nested, inline, tuple(warnings), _deepspeed(values, path))


def _by_target(
    raw: Mapping[str, Any], path: Path, warnings: list[str]
) -> tuple[dict[str, Any], tuple[InlinePrompt, ...]]:
    """Target → value, and the prompts that the file holds."""
    found: dict[str, tuple[str, Any]] = {}  # target → its name as written, and the value
    unknown = []
    for name, old in _names(raw):
        target = TARGETS.get(name) or (name if name in settings() else None)
        if target is None:
            unknown.append(name)
            continue
        value = _converted(target, name, old, path, warnings)
        first = found.setdefault(target, (name, value))
        if first[1] != value:
            raise ConfigError(
                f"{path}: {first[0]!r} and {name!r} both mean {target} but differ: remove one of "
                "them"
            )
    _check_known(unknown, path)
    values = {target: value for target, (_, value) in found.items()}
    name, prompts = found.get("prompts.path", ("", None))
    if name not in _PROMPT_LISTS or not isinstance(prompts, list):
        return values, ()
    del values["prompts.path"]
    return values, _inline_prompts(prompts, path)


def _check_known(unknown: Sequence[str], path: Path) -> None:
    if not unknown:
        return
    told = [_unknown_key(key) for key in unknown]
    flat = [name for name in TARGETS if "." not in name]
    rest = "" if all("did you mean" in one for one in told) else f"; it may have {', '.join(flat)}"
    raise ConfigError(
        f"{path}: unknown key{'s' if len(told) > 1 else ''} in an exp_config file: "
        + "; ".join(told)
        + rest
    )


def _unknown_key(key: str) -> str:
    """The key with what it would be now, if that can be guessed."""
    guess = nearest(key, (*settings(), *TARGETS))
    if not guess:
        return f'"{key:.60}" has no counterpart: remove it'
    now = TARGETS.get(guess, guess)
    means = f" (now {now})" if now in settings() and now != guess else ""
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


def _converted(target: str, name: str, value: Any, path: Path, warnings: list[str]) -> Any:
    """The value of the old key `name` as its setting of today takes it."""
    if name.endswith("max_length"):
        warnings.append(
            f"{path}: {name} = {short(value)} is taken as the number of new tokens; the prompt "
            "does not count (write max_new_tokens)"
        )
    match target:
        case "model.dtype":
            return _dtype_name(value, f"{path}: {name}")
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


def _nodes(values: dict[str, Any], path: Path, warnings: list[str]) -> dict[str, Any]:
    """`values` with the ranks that the file's nodes make, one stage each."""
    if "nodes" not in values and "gpus_per_node" not in values:
        return values
    nodes, per_node = values.get("nodes", 1), values.get("gpus_per_node", 1)
    nodes = len(nodes) if isinstance(nodes, list) else nodes
    for key, count in (("nodes", nodes), ("gpus_per_node", per_node)):
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


def _sampling(values: dict[str, Any], path: Path, warnings: list[str]) -> dict[str, Any]:
    """`values` with `do_sample` applied, as transformers understands it."""
    if _flag(values, "do_sample", False, path):
        return {"generation.temperature": 1.0, "generation.top_k": _DEFAULT_TOP_K, **values}
    unused = [name for name in _FILTERS if f"generation.{name}" in values]
    if unused and values.get("generation.temperature") != 0:
        why = "do_sample is false" if "do_sample" in values else "do_sample is absent"
        warnings.append(
            f"{path}: {why}, so decoding is greedy and {', '.join(unused)} has no effect; "
            'add "do_sample": true to sample'
        )
    kept = {name: v for name, v in values.items() if name.rpartition(".")[2] not in _FILTERS}
    # What is said here, by the file or by the warning, wins over the model's own do_sample.
    said = "do_sample" in values or bool(unused)
    return {**kept, "generation.temperature": 0.0} if said else kept


def _flag(values: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{path}: {key} = {short(value)} must be true or false")
    return value


def _check_special(values: Mapping[str, Any], path: Path, warnings: list[str]) -> None:
    if not _flag(values, "local_files_only", True, path):
        warnings.append(
            f"{path}: local_files_only is false, but nothing is ever downloaded: "
            "the model folder must be complete"
        )
    for key in _ONLY_ONE:
        if values.get(key, 1) != 1:
            raise ConfigError(
                f"{path}: {key} = {short(values[key])} is not supported: it must be 1"
            )
    warnings.extend(
        f"{path}: {key} has no effect: the plan places layers and caches"
        for key in _DECIDED_BY_PLAN
        if key in values
    )


def _deepspeed(values: Mapping[str, Any], path: Path) -> DeepSpeedExpectations | None:
    beside = path.parent / "ds_config.json"
    if "deepspeed_config" not in values:
        return _read_expectations(beside) if os.path.exists(beside) else None
    named = values["deepspeed_config"]
    if not isinstance(named, str):
        raise ConfigError(f"{path}: deepspeed_config = {short(named)} must be the path of a file")
    given = Path(expand_path(named, "deepspeed_config"))
    beside = path.parent / given
    return _read_expectations(
        beside if not os.path.exists(given) and os.path.exists(beside) else given
    )


# ---- ds_config.json ------------------------------------------------------------------------------


def _dtype_name(value: object, source: str) -> str:
    """Today's name of a dtype in any of its old spellings.

    Raises:
        ConfigError: no such dtype; `source` names where it was found.
    """
    word = value.removeprefix("torch.").lower() if isinstance(value, str) else ""
    if word not in _DTYPES:
        raise ConfigError(f"{source} = {value!r} is no dtype: use float32, bfloat16 or float16")
    return _DTYPES[word]


def _read_expectations(path: Path) -> DeepSpeedExpectations:
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
    return _dtype_name(raw["dtype"], f"{path}: dtype")


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
