"""`generation_config.json`: how its authors want a model to generate, as transformers reads it.

`generate()` without arguments takes its settings from this file; without the file, from settings of
the same names in `config.json`. Here they become defaults of ours, and what we do not apply is
named. What the user has set wins (`planning.model_facts`); `spec` reads eos ids.

Invariant: no content of the file raises anything; what cannot be used is named like the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpipipe.checkpoint.families import read_rotary
from mpipipe.sampling_options import OPTIONS

__all__ = ["GenerationDefaults", "ModelSetting", "read_generation_defaults"]

_FILE = "generation_config.json"
_TOP_K = 50  # of transformers, where a model samples and its file does not say


@dataclass(frozen=True, slots=True)
class ModelSetting:
    """One setting of a model's file."""

    name: str  # applied: a field of `GenerationConfig`; else as the file has it
    value: Any  # applied: a number; else text for people
    reason: str


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a model's file sets, as far as it differs from our own defaults."""

    applied: tuple[ModelSetting, ...] = ()
    not_applied: tuple[ModelSetting, ...] = ()


# What we can do, as transformers' files have it, and what transformers accepts.
_APPLICABLE = {
    "repetition_penalty": "a number above 0",
    "top_k": "a whole number from 0 to 2147483647",
    "top_p": "a number above 0 and at most 1",
    "min_p": "a number from 0 to below 1",
}

_ABSENT: tuple[Any, ...] = (None, [], {}, False, 0)
# Why it is not applied → what we cannot do, or do otherwise.
_NOT_HERE = {
    "there is no beam search here": """
        num_beams num_beam_groups diversity_penalty constraints force_words_ids""",
    "a prompt has one completion here": "num_return_sequences",
    "there is no contrastive search here": "penalty_alpha",
    "layers are not contrasted here": "dola_layers",
    "there is no guidance here": "guidance_scale",
    "repeated n-grams are not banned here": "no_repeat_ngram_size encoder_no_repeat_ngram_size",
    "prompts have no penalty of their own here": "encoder_repetition_penalty",
    "tokens are not banned here": "bad_words_ids suppress_tokens begin_suppress_tokens",
    "tokens have no bias here": "sequence_bias",
    "no token is forced here": "forced_bos_token_id forced_eos_token_id",
    "the end is not made likelier here": "exponential_decay_length_penalty",
    "completions have no least length here": "min_length min_new_tokens",
    "generation.max_new_tokens decides": "max_length max_new_tokens",
    "time ends no completion here": "max_time",
    "generation.stop decides": "stop_strings",
    "this filter is not there": "typical_p epsilon_cutoff eta_cutoff top_h",
    "there are no watermarks here": "watermarking_config",
    "prompts are not changed here": "token_healing",
}
_REASON_OF = {name: reason for reason, names in _NOT_HERE.items() for name in names.split()}
# Values that change nothing either, beside those that mean "absent".
_NEUTRAL = dict.fromkeys(
    ("num_beams", "num_beam_groups", "num_return_sequences", "guidance_scale", "typical_p"), 1
) | {"encoder_repetition_penalty": 1, "max_length": 20}

# What changes no completion of a decoder: ids that the tokenizer knows, caches, outputs, drafts.
_WITHOUT_EFFECT = frozenset(
    """
    bos_token_id eos_token_id pad_token_id decoder_start_token_id do_sample temperature
    use_cache cache_implementation cache_config max_cache_len prefill_chunk_size low_memory
    return_dict_in_generate output_attentions output_hidden_states output_scores output_logits
    early_stopping length_penalty renormalize_logits remove_invalid_values
    use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type prompt_lookup_num_tokens max_matching_ngram_size
    compile_config disable_compile continuous_batching_config
    transformers_version _from_model_config _commit_hash trust_remote_code
    """.split()  # noqa: SIM905 - a list of them would take a screen
)


def read_generation_defaults(
    generation: Mapping[str, object] | None, config: Mapping[str, object]
) -> GenerationDefaults:
    """The defaults of `generation_config.json`, or of `config.json` where there is none.

    Args:
        generation: the content of the former; None: there is no such file.
        config: the content of the latter.
    """
    source, where = (config, "config.json") if generation is None else (generation, _FILE)
    applied: list[ModelSetting] = []
    ignored: list[ModelSetting] = []
    samples = _samples(source, where, applied, ignored)
    for name, wanted in _APPLICABLE.items():
        option = OPTIONS[name]
        value = source.get(name)
        if value is None:
            if name == "top_k" and samples:
                reason = f"transformers' own default for a model that samples ({where})"
                applied.append(ModelSetting(name, _TOP_K, reason))
            continue
        number = _number(value)
        broken = name == "top_k" and number is not None and not number.is_integer()
        if number is None or broken or not option.allows(number):
            ignored.append(ModelSetting(name, _text(value), f"not applied: it is not {wanted}"))
        elif number != option.default:
            when = "" if name == "repetition_penalty" else ", for prompts that sample"
            number = int(number) if name == "top_k" else number
            applied.append(ModelSetting(name, number, f"{where} of the model{when}"))
    for name, why in _REASON_OF.items():
        value = source.get(name)
        if value not in (*_ABSENT, _NEUTRAL.get(name)):
            ignored.append(ModelSetting(name, _text(value), f"not applied: {why}"))
    if source.get("use_cache") is False and _moves_keys(config):
        why = "not applied: keys are kept here, as their tokens first saw the rotary embedding"
        ignored.append(ModelSetting("use_cache", _text(False), why))
    if generation is not None:
        known = _WITHOUT_EFFECT | set(_APPLICABLE) | set(_REASON_OF)
        ignored += [
            ModelSetting(name, _text(value), "not applied: transformers has no such setting")
            for name, value in generation.items()
            if name not in known and value not in _ABSENT
        ]
    return GenerationDefaults(tuple(applied), tuple(ignored))


def _moves_keys(config: Mapping[str, object]) -> bool:
    """Whether transformers without a cache computes other keys for a token than with one.

    A family that starts over does so with one, too.
    """
    rotary = read_rotary(config)
    return rotary.max_equal_tokens is not None and not rotary.restart_tokens


def _samples(
    source: Mapping[str, object],
    where: str,
    applied: list[ModelSetting],
    ignored: list[ModelSetting],
) -> bool:
    """Whether the model samples by default, with its temperature noted."""
    asked = source.get("do_sample")
    if asked is not None and not isinstance(asked, bool):
        reason = "not applied: it is neither true nor false"
        ignored.append(ModelSetting("do_sample", _text(asked), reason))
        return False
    if not asked:
        return False
    value = source.get("temperature")
    number = 1.0 if value is None else _number(value)
    if number is None or number <= 0:
        reason = "not applied, nor is do_sample: it is not a number above 0"
        ignored.append(ModelSetting("temperature", _text(value), reason))
        return False
    applied.append(ModelSetting("temperature", number, f"do_sample is true in {where}"))
    return True


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(value: object) -> str:
    """The value as its file has it, shortened."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."
