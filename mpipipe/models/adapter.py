"""A stage of a transformers model: the family's own forward over layers [first, last).

The full model is built on the meta device (no memory), everything another stage holds is taken
out, and the loader fills the rest. The stage then runs transformers' own code: the base model's
forward on all stages but the last, the causal model's forward on the last one, so that what a
family does to its hidden states or logits comes with it. Attention and cache are ours
(`attention_bridge`).

Life of a stage: `build_stage_model` → `weights.loader.load_stage` replaces every name of
`wanted_names` in `module` → `finish(cache)` → `forward` per step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mpipipe.errors import UnsupportedModelError
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention_bridge import (
    ATTENTION_NAME,
    AttentionCall,
    StageBinding,
    bind,
    register,
)
from mpipipe.models.buffers import freeze_rotary, materialise_buffers
from mpipipe.models.checkpoint_names import CheckpointNames
from mpipipe.models.families import (
    ModelParts,
    check_config,
    detach_inputs,
    detach_outputs,
    locate_parts,
    refuse,
)
from mpipipe.models.fused_layer import fuse_layers
from mpipipe.models.packed_linear import pack_linears
from mpipipe.models.verification import verify_stage

if TYPE_CHECKING:
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.attention.base import AttentionBackend, AttentionOptions
    from mpipipe.planning.plan import StagePlan

__all__ = ["StageModel", "build_stage_model"]


def build_stage_model(
    folder: Path,
    stage: StagePlan,
    *,
    dtype: torch.dtype,
    backend: AttentionBackend,
    max_context_tokens: int,
    trust_remote_code: bool = False,
) -> StageModel:
    """The modules of `stage`, on the meta device, without weights.

    Args:
        folder: the model folder; its `config.json` is read.
        stage: which layers, and whether embedding and head belong to it.
        dtype: of parameters and activations.
        backend: computes attention.
        max_context_tokens: the longest sequence of the run (settles some rotary embeddings).
        trust_remote_code: run Python code found in the folder.

    Raises:
        UnsupportedModelError: the family cannot be split into stages.
    """
    model = _empty_model(folder, dtype, trust_remote_code)
    parts = locate_parts(model)
    names = CheckpointNames.of(model)
    binding = StageBinding(backend, stage.first_layer)
    bind(_cut(parts, stage), binding)
    return StageModel(
        plan=stage,
        parts=parts,
        binding=binding,
        names=names,
        dtype=dtype,
        max_context_tokens=max_context_tokens,
    )


def _empty_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The full model on the meta device, with our attention."""
    config = _read_config(folder, trust_remote_code)
    check_config(config)
    register()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=trust_remote_code,
        )
    model.eval()
    model.requires_grad_(False)
    return model


def _read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers does not know the model in {folder} ({error}): a newer transformers "
            "may, or the model brings its own code (model.trust_remote_code = true)"
        ) from error
    return config


def _cut(parts: ModelParts, stage: StagePlan) -> nn.ModuleList:
    """Take out of the full model what other stages hold; return the layers that stay."""
    first, last = stage.first_layer, stage.last_layer
    num_layers = len(parts.layers)
    assert 0 <= first < last <= num_layers, f"layers [{first}, {last}) of {num_layers}"
    layers = nn.ModuleList(list(parts.layers)[first:last])
    parts.base.layers = layers
    # The base model's forward loops over config.num_hidden_layers and looks per-layer lists up by
    # the loop's index; the layers themselves keep the full configuration and their global number.
    config = copy.deepcopy(parts.base.config)
    config.num_hidden_layers = last - first
    for name, setting in list(vars(config).items()):
        if "layer" in name and isinstance(setting, list) and len(setting) == num_layers:
            setattr(config, name, setting[first:last])
    parts.base.config = config
    if not stage.has_embedding:
        detach_inputs(parts)
    if not stage.has_head:
        detach_outputs(parts)
    return layers


class StageModel:
    """One stage, from empty modules to computing steps. Not thread-safe: one compute thread."""

    def __init__(
        self,
        *,
        plan: StagePlan,
        parts: ModelParts,
        binding: StageBinding,
        names: CheckpointNames,
        dtype: torch.dtype,
        max_context_tokens: int,
    ) -> None:
        self.plan = plan
        self.module: PreTrainedModel = parts.model
        self.names = names
        self.dtype = dtype
        self.model_type: str = parts.model.config.model_type
        self.hidden_size: int = parts.model.config.hidden_size
        self.vocab_size: int = parts.model.config.vocab_size
        self._base = parts.base
        self._layers_prefix = f"{parts.base_name}.layers."
        self._output_names = parts.output_names
        self._full_config = parts.model.config
        self._binding = binding
        self._max_context_tokens = max_context_tokens
        self._options: dict[int, AttentionOptions] = {}  # by layer, as seen in the trial steps

    @property
    def all_names(self) -> frozenset[str]:
        """The names of the full model's `state_dict`."""
        return frozenset(self.names.shells)

    @property
    def tied(self) -> dict[str, str]:
        """Full model: name → the name it shares its tensor with."""
        return self.names.tied

    def wanted_names(self) -> dict[str, str]:
        """What to load: name in `module.state_dict()` → name in the full model's.

        Both ends of a tied pair are named where a stage holds both; they are one parameter.
        """
        return {name: self._canonical(name) for name in self.module.state_dict()}

    def finish(self, cache: KVCache, *, pack: bool = True) -> None:
        """Make the loaded stage ready to compute: buffers, checks, packed weights, the cache.

        Args:
            cache: holds the stage's keys and values from now on.
            pack: lay the weights out for the CPU's matrix kernels where that is faster.

        Raises:
            UnsupportedModelError: the family fails the trial steps (`verification`).
            ConfigError: the rotary embedding cannot serve the run's context.
        """
        materialise_buffers(self.module, self._base, self._loaded_device())
        freeze_rotary(self._base, self._max_context_tokens)
        kv_shape = verify_stage(self)
        if isinstance(cache, PagedKVCache) and tuple(cache.keys[0].shape[2:]) != kv_shape:
            raise refuse(
                self.model_type,
                "caches {} heads of {} per token where its configuration says {} of {}".format(
                    *kv_shape, *cache.keys[0].shape[2:]
                ),
            )
        if pack:
            fuse_layers(self._base.layers, self._binding, self._options)
            pack_linears(self.module)
        self._binding.cache = cache

    @torch.inference_mode()
    def forward(
        self, inputs: torch.Tensor, layout: BatchLayout, sample_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Run one step through the stage.

        Args:
            inputs: ids int64 [T] on the first stage, hidden states [T, hidden] elsewhere.
            layout: the step.
            sample_rows: int64 [S], the rows whose logits are wanted; used on the last stage.

        Returns:
            Hidden states [T, hidden]; on the last stage logits float32 [S, vocabulary].
        """
        if not self.plan.has_head:
            return self.run_base(inputs, layout)
        if sample_rows is None or not sample_rows.numel():
            self.run_base(inputs, layout)  # for the keys and values only
            return torch.empty(0, self.vocab_size)
        self._binding.layout = layout
        output = self.module(
            **self._arguments(inputs, layout), logits_to_keep=sample_rows, use_cache=False
        )
        logits_SV: torch.Tensor = output.logits[0]
        return logits_SV.float()

    def run_base(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """The stage without the LM head (but with the final norm, if it is here): [T, hidden]."""
        self._binding.layout = layout
        output = self._base(**self._arguments(inputs, layout), use_cache=False)
        hidden_TH: torch.Tensor = output.last_hidden_state[0]
        return hidden_TH

    def run_without_layers(self, hidden_TH: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """What the base model's forward does around its layers and output parts; for checks."""
        kept = {name: getattr(self._base, name) for name in ("layers", *self._output_names)}
        self._base.layers = nn.ModuleList()
        for name in self._output_names:
            setattr(self._base, name, nn.Identity() if kept[name] is not None else None)
        try:
            return self.run_base(hidden_TH, layout)
        finally:
            for name, part in kept.items():
                setattr(self._base, name, part)

    @contextmanager
    def recording(self, cache: KVCache) -> Iterator[list[AttentionCall]]:
        """Run on a throw-away `cache` and list what attention is asked for; for checks."""
        binding = self._binding
        calls: list[AttentionCall] = []
        kept = binding.cache
        binding.cache, binding.calls = cache, calls
        try:
            yield calls
            self._options.update({call.layer: call.options for call in calls})
        finally:
            binding.cache, binding.calls = kept, None

    def has_window(self, layer: int) -> bool:
        """Whether the configuration gives layer `layer` of this stage a sliding window."""
        layer_types = getattr(self._full_config, "layer_types", None)
        if layer_types:
            return bool(layer_types[self.plan.first_layer + layer] == "sliding_attention")
        return getattr(self._full_config, "sliding_window", None) is not None

    def _loaded_device(self) -> torch.device:
        """Where the weights are. A method of its own: `finish` must not hold what it frees."""
        state = self.module.state_dict(keep_vars=True)
        missing = [name for name, tensor in state.items() if tensor.is_meta]
        assert not missing, f"not loaded: {', '.join(missing[:5])}"
        first: torch.Tensor = next(iter(state.values()))
        return first.device

    def _arguments(self, inputs: torch.Tensor, layout: BatchLayout) -> dict[str, torch.Tensor]:
        name = "input_ids" if self.plan.has_embedding else "inputs_embeds"
        return {name: inputs[None], "position_ids": layout.positions_T[None]}

    def _canonical(self, name: str) -> str:
        """The full model's name: the layer number counted from the first layer of all."""
        if not name.startswith(self._layers_prefix):
            return name
        number, _, rest = name.removeprefix(self._layers_prefix).partition(".")
        return f"{self._layers_prefix}{int(number) + self.plan.first_layer}.{rest}"
