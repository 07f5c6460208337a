"""A stage of a transformers model: the family's own forward over layers [first, last).

The full model is built on the meta device (no memory), everything another stage holds is taken
out, and the loader fills the rest. The stage then runs transformers' own code: the base model's
forward on all stages but the last, the causal model's forward on the last one, so that what a
family does to its hidden states or logits comes with it. Attention and cache are ours
(`attention_bridge`).

Life of a stage: `build_stage_model` → `weights.loader.load_stage` replaces every name of
`wanted_names` in `module` → `finish(cache)` → `forward` or `forward_decode` per step.

`finish` gives the stage the fastest form its device and family have: packed weights and fused
layers on a CPU (`packed_linear`, `fused_layer`), the fused stack on a GPU (`fast_stack`), else the
plain modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention.sdpa import SdpaAttention
from mpipipe.models.attention_bridge import AttentionCall, StageBinding, bind
from mpipipe.models.buffers import loaded_device, materialise_buffers
from mpipipe.models.checkpoint_names import CheckpointNames
from mpipipe.models.families import ModelParts, locate_parts, refuse
from mpipipe.models.fast_stack import FastStack, build_fast_stack
from mpipipe.models.forms import choose_form, graph_obstacle
from mpipipe.models.fused_layer import fuse_layers
from mpipipe.models.operations import choose_operations
from mpipipe.models.packed_linear import pack_linears
from mpipipe.models.rotary import settle_rotary
from mpipipe.models.stage_cut import cut_stage, empty_model
from mpipipe.models.verification import verify_stage

if TYPE_CHECKING:
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.attention.base import AttentionBackend, AttentionOptions
    from mpipipe.models.operations import Operations
    from mpipipe.planning.plan import StagePlan

__all__ = ["StageModel", "build_stage_model"]


def build_stage_model(
    folder: Path,
    stage: StagePlan,
    *,
    dtype: torch.dtype,
    backend: AttentionBackend,
    max_sequence_tokens: int,
    trust_remote_code: bool = False,
) -> StageModel:
    """The modules of `stage`, on the meta device, without weights.

    Args:
        folder: the model folder; its `config.json` is read.
        stage: which layers, and whether embedding and head belong to it.
        dtype: of parameters and activations.
        backend: computes attention.
        max_sequence_tokens: no sequence of this run grows longer; sizes rotary tables.
        trust_remote_code: run Python code found in the folder.

    Raises:
        UnsupportedModelError: the family cannot be split into stages.
    """
    model = empty_model(folder, dtype, trust_remote_code)
    parts = locate_parts(model)
    names = CheckpointNames.of(model)
    binding = StageBinding(backend, stage.first_layer)
    bind(cut_stage(parts, stage), binding)
    return StageModel(
        plan=stage,
        parts=parts,
        binding=binding,
        names=names,
        dtype=dtype,
        max_positions=max_sequence_tokens,
    )


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
        max_positions: int,
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
        self._binding = binding
        self._max_positions = max_positions
        self._options: dict[int, AttentionOptions] = {}  # by layer, as seen in the trial steps
        self._fast: FastStack | None = None
        self.form = "plain"  # "plain" | "packed" | "fast", after `finish`
        self.form_reason = "not finished"
        self.device = torch.device("meta")  # where the weights are, after `finish`
        self.rotary_by_length = False  # layouts of prompt chunks need `rotary_lens_T`

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

    def finish(
        self, cache: KVCache, *, form: str = "auto", operations: Operations | None = None
    ) -> None:
        """Make the loaded stage ready to compute: buffers, checks, its fastest form, the cache.

        Args:
            cache: holds the stage's keys and values from now on.
            form: `auto`; `plain`, transformers' modules; `packed`, for a CPU; `fast`, the fused
                stack (asserts that the stage has one).
            operations: of the fused stack and around it; None takes the best for the device.

        Raises:
            UnsupportedModelError: the family fails the trial steps (`verification`).
        """
        self.device = loaded_device(self.module)
        self.operations = operations or choose_operations(self.device)[0]
        materialise_buffers(self.module, self._base, self.device)
        self.rotary_by_length = settle_rotary(self._base, self._binding, self._max_positions)
        kv_shape = verify_stage(self)
        if isinstance(cache, PagedKVCache) and tuple(cache.keys[0].shape[2:]) != kv_shape:
            raise refuse(
                self.model_type,
                "caches {} heads of {} per token where its configuration says {} of {}".format(
                    *kv_shape, *cache.keys[0].shape[2:]
                ),
            )
        self._binding.cache = cache
        layers = list(self._base.layers)
        self.form, self.form_reason = choose_form(form, self.module, layers, cache, self.device)
        del layers  # what is merged shall be freed
        if self.form == "packed":
            fuse_layers(self._base.layers, self._binding, self._options)
            pack_linears(self.module)
        elif self.form == "fast":
            self._fast = build_fast_stack(
                self.module,
                self._base,
                self._binding,
                options=self._options,
                operations=self.operations,
                max_positions=self._max_positions,
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the plain weights and the trial steps' tensors

    def graph_obstacle(self) -> str:
        """Why no CUDA graph can hold `forward_decode`, as a phrase; empty: one can."""
        return graph_obstacle(self.module.config, self._binding.backend)

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
            return self._hidden(inputs, layout)
        if sample_rows is None or not sample_rows.numel():
            self._hidden(inputs, layout)  # for the keys and values only
            return torch.empty(0, self.vocab_size, device=inputs.device)
        return self._logits(inputs, layout, sample_rows).float()

    @torch.inference_mode()
    def forward_decode(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """One token for each row of the step. On a GPU it waits for nothing (`graph_obstacle`).

        Args:
            inputs: ids int64 [B] on the first stage, within the vocabulary in empty rows too;
                hidden states [B, hidden] elsewhere.
            layout: a decode step, from the host (`build_layout`) or from tensors
                (`decode_layout`; not with a backend that needs spans).

        Returns:
            Hidden states [B, hidden]; on the last stage logits [B, vocabulary] of every row, in
            the dtype of the model. Rows of empty sequences hold finite numbers of no meaning.
        """
        if not self.plan.has_head:
            return self._hidden(inputs, layout)
        return self._logits(inputs, layout, None)

    def _hidden(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        if self._fast is not None:
            return self._fast.hidden(inputs, layout)
        return self.run_base(inputs, layout)

    def _logits(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [S, vocabulary] of the rows `rows_S`, of all rows for None."""
        if self._fast is not None:
            return self._fast.logits(inputs, layout, rows_S)
        self._binding.layout = layout
        output = self.module(
            **self._arguments(inputs, layout),
            logits_to_keep=0 if rows_S is None else rows_S,
            use_cache=False,
        )
        logits_SV: torch.Tensor = output.logits[0]
        return logits_SV

    def run_base(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """The plain stage without LM head (but with the final norm, if it is here): [T, hidden]."""
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
        """Run on a throw-away `cache` and list what attention is asked for; for checks.

        With SDPA, which takes every cache: what is checked is the family, not the backend.
        """
        binding = self._binding
        calls: list[AttentionCall] = []
        kept = binding.cache, binding.backend
        binding.cache, binding.backend, binding.calls = cache, SdpaAttention(), calls
        try:
            yield calls
            self._options.update({call.layer: call.options for call in calls})
        finally:
            binding.cache, binding.backend = kept
            binding.calls, binding.layout = None, None

    def _arguments(self, inputs: torch.Tensor, layout: BatchLayout) -> dict[str, torch.Tensor]:
        name = "input_ids" if self.plan.has_embedding else "inputs_embeds"
        return {name: inputs[None], "position_ids": layout.positions_T[None]}

    def _canonical(self, name: str) -> str:
        """The full model's name: the layer number counted from the first layer of all."""
        if not name.startswith(self._layers_prefix):
            return name
        number, _, rest = name.removeprefix(self._layers_prefix).partition(".")
        return f"{self._layers_prefix}{int(number) + self.plan.first_layer}.{rest}"
