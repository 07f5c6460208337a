"""What decides the completions of a run: an attempt goes on only where all of it is the same.

The manifest keeps it under `basis`. `resume` compares it with an earlier one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.checkpoint.fingerprint import model_fingerprint
from mpipipe.config.load import to_dict
from mpipipe.config.prompt_file import prompts_hash

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig
    from mpipipe.planning.model_facts import ModelFacts

__all__ = ["DTYPE", "PROMPTS", "completions_fingerprint"]

DTYPE = "model.dtype"  # the one that was computed in, never "auto"
PROMPTS = "the SHA-256 of the prompts"


def completions_fingerprint(loaded: LoadedConfig, model: ModelFacts, dtype: str) -> dict[str, Any]:
    """What decides the completions of a run: an attempt may only go on where all of it is the same.

    `dtype` is what `auto` has become: a job may be requeued onto GPUs of another kind. Not in it:
    ranks, stages, sizes. They change the time that a run takes, not what it says.

    Raises:
        CheckpointError, ConfigError: a file of the model, or the prompts, cannot be read.
    """
    config = to_dict(loaded.config)
    for section, key in (("prompts", "path"), ("model", "path"), ("model", "tokenizer_path")):
        del config[section][key]  # the content counts
    settings = {
        f"{section}.{key}": value
        for section in ("model", "prompts", "generation")
        for key, value in config[section].items()
    }
    return {
        **settings,
        DTYPE: dtype,
        "memory.max_context_tokens": config["memory"]["max_context_tokens"],
        PROMPTS: _prompts_hash(loaded),
        **model_fingerprint(
            model.folder,
            model.tokenizer_folder,
            has_weights=loaded.config.model.weights != "random",
            has_code=loaded.config.model.trust_remote_code,
        ),
    }


def _prompts_hash(loaded: LoadedConfig) -> str:
    if loaded.config.prompts.path:
        return prompts_hash(Path(loaded.config.prompts.path))
    text = json.dumps(loaded.inline_prompts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
