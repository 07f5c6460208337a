"""A stage of a model, from empty modules to computing steps over layers [first, last).

The full model is built on the meta device (no memory), of our own modules for Llama-like families
(`llama_modules`), else of transformers'. Everything another stage holds is taken out, and the
loader fills the rest. The stage then runs these modules' code (`plain_stage`), with our attention
and cache (`attention_bridge`), or a faster execution mode of it.

Life of a stage: `build_stage_model` → `weights.loader.load_stage` replaces every name of
`wanted_names` in `module` → `finish(cache)` → `forward` or `forward_decode` per step.

`finish` takes the fastest execution mode of device and family:

* `packed`, on a CPU: prepacked weights and fused layers (`prepacked_linear`, `fused_cpu`);
* `fast`, on a GPU: the fused stack (`fused_gpu`);
* `plain`: the modules' own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpipipe.checkpoint.quantization import read_quantization
from mpipipe.data_plane.lanes import ALONE
from mpipipe.errors import UnsupportedModelError
from mpipipe.kv_cache.paged import PagedKVCache
from mpipipe.models.attention_bridge import ForwardContext, attach_context
from mpipipe.models.families import ModelParts, locate_parts, refuse, refuse_split
from mpipipe.models.fused_cpu import FusedLayer, fuse_layers
from mpipipe.models.fused_gpu import FusedStack, build_fused_stack, unsupported_reason
from mpipipe.models.layer_options import AttentionOptions
from mpipipe.models.llama_modules import LlamaModel
from mpipipe.models.operations import choose_operations
from mpipipe.models.plain_stage import PlainStage
from mpipipe.models.prepacked_linear import prepack_linears
from mpipipe.models.quantized_linear import quantize_linears, quantized_linears, use_products
from mpipipe.models.rotary import settle_rotary
from mpipipe.models.row_major_linear import as_it_lies
from mpipipe.models.stage_cut import (
    CheckpointNames,
    cut_stage,
    empty_model,
    loaded_device,
    materialise_buffers,
)
from mpipipe.models.streaming import NO_GATES, StreamedHead, StreamedWeights, attach_streaming
from mpipipe.models.tensor_split import TensorSplit, split_stage
from mpipipe.models.verification import verify_stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from mpipipe.checkpoint.quantization import StoredQuantization
    from mpipipe.data_plane.lanes import Lanes
    from mpipipe.kv_cache.base import KVCache
    from mpipipe.kv_cache.layout import BatchLayout
    from mpipipe.models.attention.base import AttentionBackend
    from mpipipe.models.operations import Operations
    from mpipipe.planning.plan import StagePlan
    from mpipipe.types import QuantizeName, Shard

__all__ = ["StageModel", "build_stage_model"]

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def build_stage_model(
    folder: Path,
    stage: StagePlan,
    *,
    dtype: torch.dtype,
    backend: AttentionBackend,
    max_sequence_tokens: int,
    trust_remote_code: bool = False,
    quantize: QuantizeName = "none",
    lanes: Lanes = ALONE,
) -> StageModel:
    """The modules of `stage`, on the meta device, without weights.

    Args:
        folder: the model folder; its `config.json` is read.
        stage: which layers, and whether embedding and head belong to it.
        dtype: of parameters and activations.
        backend: computes attention.
        max_sequence_tokens: no sequence of this run grows longer; sizes rotary tables.
        trust_remote_code: run Python code found in the folder.
        quantize: what the linears of the layers become, and the LM head (`quantized_linear`), of
            a tied embedding a copy; of a checkpoint in 8 bits what it has so, and so.
        lanes: of the stage; the model is one lane's part of it.

    Raises:
        UnsupportedModelError: the family cannot be split into stages, or not over the lanes.
    """
    stored = read_quantization(folder)
    if stored is not None:
        assert quantize == stored.scheme, f"weights in {stored.scheme}, asked for as {quantize}"
    model = empty_model(folder, dtype, trust_remote_code)
    parts = locate_parts(model)
    names = CheckpointNames.of(model)
    context = ForwardContext(backend, stage.first_layer)
    attach_context(cut_stage(parts, stage), context)
    if quantize != "none":
        _quantize(parts, stage, names, quantize, stored)
    tensor_split = split_stage(parts, lanes, names.tied, has_head=stage.has_head)
    return StageModel(
        plan=stage,
        parts=parts,
        context=context,
        names=names,
        dtype=dtype,
        max_positions=max_sequence_tokens,
        lanes=lanes,
        tensor_split=tensor_split,
    )


def _quantize(
    parts: ModelParts,
    stage: StagePlan,
    names: CheckpointNames,
    scheme: QuantizeName,
    stored: StoredQuantization | None,
) -> None:
    """The linears of the layers and of the head, or what the checkpoint has quantised of them.

    A tied head becomes a copy of the embedding, which gives its rows as they are; but not in fp8
    (`ModelSpec.has_quantized_head`). The routing of experts stays: linears with no more outputs
    than there are experts.
    """
    layers_prefix = f"{parts.base_name}.layers."
    counts = (getattr(parts.model.config, name, None) for name in _EXPERT_COUNTS)
    num_experts = max((count for count in counts if isinstance(count, int)), default=0)

    head = parts.model.get_output_embeddings()

    def is_wanted(path: str, linear: nn.Linear) -> bool:
        inside = path.startswith(layers_prefix)
        if not inside and linear is not head:
            return False
        if f"{path}.weight" in names.tied and (stored is not None or scheme == "fp8"):
            return False
        if stored is not None:
            return stored.holds(_canonical(path, layers_prefix, stage.first_layer))
        return linear.out_features > num_experts

    quantize_linears(parts.model, scheme, is_wanted)


def _canonical(name: str, layers_prefix: str, first_layer: int) -> str:
    """The full model's name: the layer number counted from the first layer of all."""
    if not name.startswith(layers_prefix):
        return name
    number, _, rest = name.removeprefix(layers_prefix).partition(".")
    return f"{layers_prefix}{int(number) + first_layer}.{rest}"


class StageModel(PlainStage):
    """One stage, from empty modules to computing steps. Not thread-safe: one compute thread."""

    operations: Operations  # after `finish`

    def __init__(
        self,
        *,
        plan: StagePlan,
        parts: ModelParts,
        context: ForwardContext,
        names: CheckpointNames,
        dtype: torch.dtype,
        max_positions: int,
        lanes: Lanes,
        tensor_split: TensorSplit,
    ) -> None:
        super().__init__(plan, parts, context, dtype)
        self.names = names
        self.lanes = lanes
        self._tensor_split = tensor_split
        self._layers_prefix = f"{parts.base_name}.layers."
        self._max_positions = max_positions
        self._fused: FusedStack | None = None
        self.mode = "plain"  # "plain" | "packed" | "fast", after `finish`
        self.mode_reason = "not finished"
        self.rotary_by_length = False  # layouts of prompt chunks need `rotary_lens_T`

    @property
    def backend(self) -> AttentionBackend:
        """What computes attention."""
        return self._context.backend

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

        Both ends of a tied pair are named where a stage holds both; they are one parameter. The
        scale of a quantised weight is made while loading.
        """
        scales = {f"{path}.scale" for path, _ in quantized_linears(self.module)}
        return {
            name: _canonical(name, self._layers_prefix, self.plan.first_layer)
            for name in self.module.state_dict()
            if name not in scales
        }

    def shards(self) -> Mapping[str, Shard]:
        """By name in `module.state_dict()`, what this lane loads of a tensor; others are whole."""
        return self._tensor_split.shards

    def layer_names(self) -> list[list[str]]:
        """By layer of the stage, the names of its tensors in `module.state_dict()`."""
        names: list[list[str]] = [[] for _ in range(self.plan.num_layers)]
        for name in self.module.state_dict():
            if name.startswith(self._layers_prefix):
                names[int(name.removeprefix(self._layers_prefix).partition(".")[0])].append(name)
        return names

    def embedding_names(self) -> list[str]:
        """The names of the embedding's tensors; none where it is on another stage."""
        return self._names_in(self.module.get_input_embeddings())

    def head_names(self) -> list[str]:
        """The same of the LM head."""
        return self._names_in(self.module.get_output_embeddings())

    def _names_in(self, part: nn.Module | None) -> list[str]:
        if part is None:
            return []
        (prefix,) = [name for name, module in self.module.named_modules() if module is part]
        return [f"{prefix}.{leaf}" for leaf in part.state_dict()]

    def finish(
        self,
        cache: KVCache,
        *,
        mode: str = "auto",
        operations: Operations | None = None,
        streamed: StreamedWeights | None = None,
    ) -> None:
        """Make the loaded stage ready to compute: buffers, checks, its execution mode, the cache.

        Args:
            cache: holds the stage's keys and values from now on.
            mode: `auto`; `plain`, transformers' modules; `packed`, for a CPU; `fast`, the fused
                stack (asserts that the stage has one).
            operations: of the fused stack and around it; None takes the best for the device.
            streamed: the weights that do not stay on the device; None: all do.

        Raises:
            UnsupportedModelError: the family fails the trial steps (`verification`).
        """
        self.device = loaded_device(self.module)
        self.operations = operations or choose_operations(self.device)[0]
        use_products(self.module, self.operations.quantized_product)
        self._streamed = streamed or self._streamed
        self._wire()
        materialise_buffers(self.module, self._base, self.device)
        self.rotary_by_length = settle_rotary(self._base, self._context, self._max_positions)
        kv_shape = self._verified()
        if isinstance(cache, PagedKVCache) and tuple(cache.keys[0].shape[2:]) != kv_shape:
            raise refuse(
                self.model_type,
                "caches {} heads of {} per token where its configuration says {} of {}".format(
                    *kv_shape, *cache.keys[0].shape[2:]
                ),
            )
        self._context.cache = cache
        chosen = _choose_mode(mode, self.module, self._base.layers, cache, self.device)
        self.mode, self.mode_reason = chosen
        if self.mode == "packed":
            self._pack()
        elif self.mode == "fast":
            self._fused = self._fuse()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the plain weights and the trial steps' tensors

    def finish_without_weights(self, cache: KVCache, operations: Operations) -> None:
        """As `finish`, in mode `fast`, of a stage whose weights stay on the meta device.

        It computes shapes, and launches the kernels that it would launch. Of Llama-like models.
        """
        assert isinstance(self.module, LlamaModel), "transformers' modules need trial steps"
        self.device, self.operations = torch.device("meta"), operations
        use_products(self.module, operations.quantized_product)
        self._tensor_split.cut_head(self.module)
        self._tensor_split.attach(self.module, self.lanes)
        attentions = [layer.self_attn for layer in self._base.layers]
        self._options = {
            number: AttentionOptions(attention.scaling, attention.sliding_window)
            for number, attention in enumerate(attentions)
        }
        self._context.cache = cache
        self._fused = self._fuse()

    def _verified(self) -> tuple[int, int]:
        """KV heads and head dimension, after the trial steps."""
        try:
            return verify_stage(self)
        except UnsupportedModelError as error:
            if self.lanes.num_lanes == 1:
                raise
            why = f"a part of one fails its trial steps ({error.__cause__ or error})"
            raise refuse_split(self.model_type, why) from error

    def _wire(self) -> None:
        """Let modules wait for weights that are streamed, and for what other lanes compute."""
        self._tensor_split.cut_head(self.module)
        attach_streaming(self.module, self._base, self._streamed)
        self._tensor_split.attach(self.module, self.lanes)

    def _fuse(self) -> FusedStack:
        return build_fused_stack(
            self.module,
            self._base,
            self._context,
            options=self._options,
            operations=self.operations,
            max_positions=self._max_positions,
            gates=self._streamed.gates,
        )

    def _pack(self) -> None:
        """Into the layout for a CPU, but for what would then take more than the plan allows."""
        layers, streamed = self._base.layers, self._streamed
        kept = [layers[number] for number in sorted(streamed.layers)]
        if streamed.gates is not NO_GATES:
            self._leave_head()
        fuse_layers(layers, self._context, self._options, streamed)
        if self.plan.has_head and isinstance(layers[-1], FusedLayer):
            self._context.cut_layer = len(layers) - 1
        prepack_linears(self.module, kept)
        self._tensor_split.attach(self.module, self.lanes)

    def _leave_head(self) -> None:
        """A head in blocks, or one tensor with the embedding: packed, it would be a second one."""
        ends = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        places = [end.weight.untyped_storage().data_ptr() for end in ends if hasattr(end, "weight")]
        if isinstance(ends[1], StreamedHead):
            ends[1].blocks = tuple(map(as_it_lies, ends[1].blocks))
        elif len(places) == 2 and places[0] == places[1]:
            self.module.set_output_embeddings(as_it_lies(ends[1]))

    @property
    def waits_on_host(self) -> bool:
        """Whether a step may wait for the disk, or a copy, in the thread that launches it."""
        return self._streamed.waits_on_host

    def graphs_unsupported_reason(self) -> str:
        """Why no CUDA graph can hold `forward_decode`, as a phrase; empty: one can."""
        if self.waits_on_host:
            return "some of its weights come from the disk or from memory that is not pinned"
        backend, config = self._context.backend, self.module.config
        if backend.needs_seq_lens:
            return f'attention "{backend.name}" plans every step on the host'
        if any(getattr(config, name, None) for name in _EXPERT_COUNTS):
            return "the routing of experts makes shapes that depend on values"
        return ""

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
            # For the keys and values only.
            self._hidden(inputs, layout, torch.empty(0, dtype=torch.int64, device=inputs.device))
            return torch.empty(0, self.vocab_size, device=inputs.device)
        return self._logits(inputs, layout, sample_rows).float()

    @torch.inference_mode()
    def forward_decode(self, inputs: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """One token for each row of the step. Waits for nothing where CUDA graphs are supported.

        Args:
            inputs: ids int64 [B] on the first stage, within the vocabulary in empty rows too;
                hidden states [B, hidden] elsewhere.
            layout: a decode step, from the host (`build_layout`) or from tensors
                (`decode_layout`; not with a backend that needs `seq_lens`).

        Returns:
            Hidden states [B, hidden]; on the last stage logits [B, vocabulary] of every row, in
            the dtype of the model. Rows of empty sequences hold finite numbers of no meaning.
        """
        if not self.plan.has_head:
            return self._hidden(inputs, layout)
        return self._logits(inputs, layout, None)

    def _hidden(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [T, hidden], of which `rows_S` will be read; None: all."""
        if self._fused is None:
            return self.run_base(inputs, layout, rows_S)
        return self._fused.hidden(inputs, layout)

    def _logits(
        self, inputs: torch.Tensor, layout: BatchLayout, rows_S: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [S, vocabulary] of the rows `rows_S`, of all rows for None."""
        run = self.run_model if self._fused is None else self._fused.logits
        return run(inputs, layout, rows_S)


def _choose_mode(
    asked: str, model: Any, layers: Sequence[Any], cache: KVCache, device: torch.device
) -> tuple[str, str]:
    """`plain`, `packed` or `fast`, and the reason for it.

    Args:
        asked: one of them, or `auto`: packed on a CPU, on a GPU fast where the family allows it.
        model: the causal language model that the stage was cut from.
        layers: the stage's.
        cache: the stage's.
        device: where the weights are.
    """
    assert asked in {"auto", "plain", "packed", "fast"}, f"no execution mode is called {asked}"
    if asked in {"plain", "packed"}:
        return asked, "asked for"
    if asked == "auto" and device.type != "cuda":
        return "packed", "weights laid out for the CPU"
    problem = "its KV cache has no pages"
    if isinstance(cache, PagedKVCache):
        problem = unsupported_reason(model, layers, cache.keys[0].shape[-1])
    assert asked == "auto" or not problem, f"no fused form: {problem}"
    if problem:
        return "plain", f"plain modules: {problem}"
    operations, reason = choose_operations(device)
    return "fast", f"fused layers with {operations.name} operations: {reason}"
