"""A transformers model as its users would open it: one device, or layers spread over all GPUs.

For comparison only. `device_map = "auto"` is accelerate's: every GPU holds some layers and they
compute one after the other. Random weights are drawn on the device and never touch a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpipipe.errors import ConfigError, EnvironmentSetupError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BaselinePlace", "open_baseline"]

_DEVICES = ("cpu", "cuda")
_DEVICE_MAPS = ("none", "auto")


@dataclass(frozen=True, slots=True)
class BaselinePlace:
    """Where the model runs."""

    device: str = "cpu"
    device_map: str = "none"  # "auto": layers over all visible GPUs
    num_threads: int = 1

    def check(self) -> None:
        """Raises ConfigError unless the words are known and fit together."""
        for option, value, allowed in (
            ("--device", self.device, _DEVICES),
            ("--device-map", self.device_map, _DEVICE_MAPS),
        ):
            if value not in allowed:
                raise ConfigError(f"{option} {value} is not known: use {' or '.join(allowed)}")
        if self.device_map == "auto" and self.device != "cuda":
            raise ConfigError("--device-map auto spreads layers over GPUs: add --device cuda")

    @property
    def text(self) -> str:
        """For people."""
        if self.device_map == "auto":
            return "device_map over all GPUs"
        return "one GPU" if self.device == "cuda" else f"CPU, {self.num_threads} threads"


def open_baseline(folder: Path, dtype: str, place: BaselinePlace, *, random: bool) -> Any:
    """The model in `folder`, ready to generate.

    Args:
        folder: the model folder; with `random` a `config.json` is enough.
        dtype: "float32", "bfloat16" or "float16".
        place: where it runs.
        random: draw the weights instead of reading them.

    Raises:
        ConfigError: `place` makes no sense.
        EnvironmentSetupError: no GPU, or accelerate is needed and not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place.check()
    torch.set_num_threads(place.num_threads)
    if place.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentSetupError(
            "--device cuda: torch sees no GPU here; start on a machine with one, or leave it out"
        )
    kind = getattr(torch, dtype)
    if random:
        return _random_model(folder, kind, place)
    if place.device_map == "auto":
        _require_accelerate()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, device_map="auto"
        )
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    return model.to(place.device).eval()


def _random_model(folder: Path, dtype: Any, place: BaselinePlace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if place.device_map == "none":
        return model
    # As from_pretrained(device_map="auto") decides, for a model that is there already.
    _require_accelerate()
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules  # what transformers itself passes on
    names = sorted(whole) if whole else None
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=names)
    spread = infer_auto_device_map(
        model, max_memory=memory, dtype=dtype, no_split_module_classes=names
    )
    return dispatch_model(model, device_map=spread)


def _require_accelerate() -> None:
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise EnvironmentSetupError(
            "--device-map auto needs the package accelerate, which is not installed: "
            "`pip install accelerate`"
        )
