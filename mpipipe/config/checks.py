"""Ranges and choices of the settings: one sentence per violation.

`binding.py` checks types; `planning` checks what depends on the model or the ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from mpipipe.config.binding import choices_by_setting, nearest
from mpipipe.config.schema import AUTO, Config, GenerationConfig
from mpipipe.errors import ConfigError
from mpipipe.sampling_options import OPTION_NAMES
from mpipipe.types import SamplingParams

__all__ = ["check", "check_sampling", "default_sampling"]

_POSITIVE_OR_AUTO = (
    "pipeline.replicas",
    "pipeline.num_stages",
    "pipeline.num_slots",
    "pipeline.max_sequences_per_slot",
    "pipeline.max_tokens_per_step",
    "pipeline.threads_per_rank",
    "memory.device_bytes",
    "memory.kv_cache_bytes",
    "memory.num_kv_pages",
    "memory.max_context_tokens",
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _is_split(value: Any) -> bool:
    return value == AUTO or (
        isinstance(value, tuple) and value != () and all(map(_is_count, value))
    )


def _is_span(value: Any) -> bool:
    return len(value) == 2 and 0 <= value[0] <= value[1]


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *(
        (name, lambda v: v == AUTO or _is_count(v), 'a whole number from 1 on, or "auto"')
        for name in _POSITIVE_OR_AUTO
    ),
    ("pipeline.split", _is_split, 'a list of layer counts from 1 on, e.g. [14, 16], or "auto"'),
    ("pipeline.lookahead", lambda v: v in {0, 1, 2, 3, AUTO}, '0, 1, 2, 3 or "auto"'),
    (
        "pipeline.num_speculative_tokens",
        lambda v: v == AUTO or (isinstance(v, int) and 0 <= v <= 63),
        'a whole number from 0 (none) to 63, or "auto"',
    ),
    ("memory.gpu_memory_fraction", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("pipeline.handshake_timeout_s", lambda v: 0 < v < math.inf, "seconds, above 0"),
    (
        "pipeline.heartbeat_timeout_s",
        lambda v: v == 0 or 1 <= v < math.inf,
        "seconds from 1 on, or 0 for none",
    ),
    (
        "memory.host_bytes",
        lambda v: v == AUTO or (isinstance(v, int) and v >= 0),
        'a size such as "8GiB", 0 for none, or "auto"',
    ),
    ("pipeline.tensor_parallel", _is_count, "a whole number from 1 on"),
    (
        "memory.kv_host_bytes",
        lambda v: v == AUTO or (isinstance(v, int) and v >= 0),
        'a size such as "8GiB", 0 for none, or "auto"',
    ),
    ("memory.page_size_tokens", _is_count, "a whole number from 1 on"),
    ("prompts.limit", lambda v: v >= 0, "0 (all) or the number of prompts to take"),
    (
        "name",
        lambda v: v.strip() != "" and not set("/\\\0\n") & set(v),
        "a short name without slashes: it becomes a folder name",
    ),
    ("output.dir", lambda v: v != "", 'a folder, or "auto"'),
    ("output.resume", lambda v: v in (True, False, AUTO), 'true, false or "auto"'),
    ("profile.steps", _is_span, "the first and the last step, from 0 on, e.g. [16, 31]"),
)


_FLOATS = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.type == "float")


def check(config: Config) -> None:
    """Check every value that can be judged without model and ranks.

    Raises:
        ConfigError: names the setting, its value and what is allowed.
    """
    for name, choices in choices_by_setting().items():
        value = attrgetter(name)(config)
        if value not in choices:
            guess = nearest(value, choices)
            hint = f'; did you mean "{guess}"?' if guess else ""
            allowed = ", ".join(f'"{choice}"' for choice in choices)
            raise ConfigError(f'{name} = "{value}" is not known: it must be one of {allowed}{hint}')
    for name, holds, allowed in _RULES:
        value = attrgetter(name)(config)
        if not holds(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{name} = {shown!r} is out of range: it must be {allowed}")
    if config.output.resume is True and config.output.overwrite:
        raise ConfigError(
            "output.resume = true and output.overwrite = true contradict each other: to go on with "
            "the earlier run, or to replace it? Set one of them"
        )
    default_sampling(config.generation)


def default_sampling(generation: GenerationConfig) -> SamplingParams:
    """The sampling settings of a prompt that overrides nothing; `seed` is still the run's seed.

    Raises:
        ConfigError: a value out of range.
    """
    try:
        sampling = SamplingParams(**{name: getattr(generation, name) for name in OPTION_NAMES})
        check_sampling(sampling)
    except ValueError as error:
        raise ConfigError(f"generation.{error}") from None
    return sampling


def check_sampling(sampling: SamplingParams) -> None:
    """Check what `SamplingParams` does not check itself.

    Raises:
        ValueError: a sentence that starts with the field.
    """
    for name in _FLOATS:
        if not math.isfinite(value := getattr(sampling, name)):
            raise ValueError(f"{name} = {value} is out of range: it must be finite")
    if sampling.seed < 0:
        raise ValueError(f"seed = {sampling.seed} is out of range: it must be 0 or more")
    if "" in sampling.stop:
        raise ValueError(
            "stop holds an empty text, which would end every completion at once: remove it"
        )
    if any(token < 0 for token in sampling.stop_token_ids):
        ids = list(sampling.stop_token_ids)
        raise ValueError(f"stop_token_ids = {ids} holds a negative id: remove it")
