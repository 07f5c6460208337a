"""`ModelSpec`: what planning needs to know of a model, read from its `config.json`. No torch.

transformers builds the model: it reads the same file again and has the last word on what the layers
compute; here are sizes only. What differs between families is in `families.py`.

Invariants: nothing outside the folder is read and nothing is downloaded; a size that the file does
not state is derived by the rule that transformers' own configuration classes apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpipipe.checkpoint.families import (
    ALIASES,
    LEARNED_POSITIONS,
    PLAIN_MLP,
    TIED_BY_DEFAULT,
    RotaryFacts,
    read_rotary,
    refusal,
    refuse,
    split_refusal,
)
from mpipipe.checkpoint.generation_defaults import (
    GenerationDefaults,
    read_generation_defaults,
)
from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.checkpoint.quantization import (
    HEAD,
    PlainLinears,
    StoredQuantization,
    quantization_of,
)
from mpipipe.checkpoint.staged import require_finished
from mpipipe.errors import CheckpointError, UnsupportedModelError
from mpipipe.types import QuantizeName

__all__ = ["ModelSpec", "read_spec", "require_model_folder"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes of a decoder-only model. Sizes are element counts, not bytes."""

    model_type: str  # "llama", "opt", …
    architecture: str  # "LlamaForCausalLM"
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    tied_embeddings: bool
    gated_mlp: bool  # gate, up and down projections instead of up and down
    dtype: str  # of the checkpoint: "float32" | "bfloat16" | "float16"
    eos_token_ids: tuple[int, ...]
    embedding_size: int = 0  # width of the embedding where it differs (OPT-350M); 0: hidden_size
    rotary: RotaryFacts = field(default_factory=RotaryFacts)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    num_experts: int = 1  # feed-forwards per layer, each of intermediate_size; 1: no mixture
    # What the linears of the layers and the LM head are in: by the checkpoint, or, in planning, by
    # the run.
    quantized: QuantizeName = "none"
    # What a checkpoint in 8 bits leaves of them as it was: weights and outputs of a layer, on
    # average, and the head.
    plain_parameters: int = 0
    plain_outputs: int = 0
    plain_head: bool = False
    # Rows of the LM head that a rank holds, where the lanes of a stage share it; 0: all. Heads and
    # intermediate_size are then those of a lane too (planning/tensor_parallel.py).
    head_rows: int = 0
    split_refusal: str = ""  # why lanes cannot share its layers, a clause; empty: nothing is known

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices, all experts.

        Left out: norms and biases (below 0.1 %), the router, experts that all tokens share.
        """
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.gated_mlp else 2)
        return attention + mlp * self.num_experts

    @property
    def quantizable_parameters(self) -> int:
        """Those of `layer_parameters` that can be quantised: experts are not (one tensor each)."""
        if self.num_experts == 1:
            return self.layer_parameters
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def quantizable_outputs(self) -> int:
        """Output channels of these matrices together: each has a scale."""
        heads = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) + self.hidden_size
        if self.num_experts > 1:
            return heads
        return heads + self.intermediate_size * (1 + self.gated_mlp) + self.hidden_size

    @property
    def has_quantized_head(self) -> bool:
        """Whether the LM head is in 8 bits; tied to the embedding, it is a copy then.

        Not in fp8, whose rounding of the activations would come straight into the logits.
        """
        if self.plain_head or (self.tied_embeddings and self.quantized == "fp8"):
            return False
        return self.quantized != "none"

    @property
    def is_head_the_embedding(self) -> bool:
        """Whether embedding and LM head of one stage are one matrix."""
        return self.tied_embeddings and not self.has_quantized_head

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding matrix."""
        return self.vocab_size * (self.embedding_size or self.hidden_size)

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return (self.head_rows or self.vocab_size) * (self.embedding_size or self.hidden_size)

    @property
    def position_parameters(self) -> int:
        """Weights of the table of learned positions, which is beside the embedding; 0: none."""
        if self.model_type not in LEARNED_POSITIONS:
            return 0
        return (self.max_context_tokens + LEARNED_POSITIONS[self.model_type]) * self.hidden_size

    @property
    def kv_elements_per_token_layer(self) -> int:
        """K and V elements that one token leaves in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim


_DTYPES = ("float32", "bfloat16", "float16")
_MAX_SIZE = 2**31 - 1  # of a dimension, and of a token's id
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def require_model_folder(folder: Path) -> None:
    """Raises CheckpointError with the likely cause unless `folder` holds a `config.json`.

    Also where `mpipipe stage-model` has not finished the folder.
    """
    if not folder.exists():
        typed = str(folder.relative_to(Path.cwd()) if _is_below_here(folder) else folder)
        if _HUB_ID.fullmatch(typed):
            raise CheckpointError(
                f"there is no folder {typed!r} in {Path.cwd()}: it looks like the name of a "
                "model on a hub, but nothing is downloaded at run time; copy the model's folder to "
                "this machine and give its path"
            )
        raise CheckpointError(f"there is no model folder {folder}: check the path (model.path)")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file: give the folder that holds config.json, weights and tokenizer"
        )
    require_finished(folder)
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} has no config.json (it holds {held}): it is not a model folder, or was "
            "copied in part"
        )


def _is_below_here(folder: Path) -> bool:
    """Whether an absolute path may have been made from a relative one."""
    return folder.is_absolute() and folder.is_relative_to(Path.cwd())


def read_spec(folder: Path) -> ModelSpec:
    """The model's shapes from `config.json` and `generation_config.json`.

    Raises:
        CheckpointError: no folder, no or broken `config.json`, a size missing.
        UnsupportedModelError: not a decoder-only model with attention, or quantised weights.
    """
    require_model_folder(folder)
    outer = read_json_object(folder / "config.json")
    inner = outer.get("text_config")
    config = {**outer, **inner} if isinstance(inner, dict) else outer
    _require_decoder(outer, config)
    quantization, generation = quantization_of(outer), _generation_config(folder)
    sizes = _Sizes(folder / "config.json", config)
    hidden_size, num_heads = sizes.need("hidden_size"), sizes.need("num_heads")
    model_type = str(config.get("model_type", ""))
    num_layers, is_tied = sizes.need("num_layers"), _tied(outer, inner, model_type)
    context_tokens, rotary = sizes.need("max_context_tokens"), read_rotary(config)
    plain = PlainLinears() if quantization is None else _plain_linears(folder, quantization)
    return ModelSpec(
        model_type=model_type,
        architecture=_architecture(outer),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=sizes.find("expert_size")
        or sizes.find("intermediate_size")
        or 4 * hidden_size,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, sizes, num_heads),
        head_dim=_head_dim(config, hidden_size, num_heads),
        vocab_size=sizes.need("vocab_size"),
        max_context_tokens=rotary.stretched_tokens or context_tokens,
        tied_embeddings=is_tied,
        gated_mlp=model_type not in PLAIN_MLP,
        dtype=_dtype(folder, outer, config),
        eos_token_ids=_eos_token_ids(generation, config),
        embedding_size=_positive(config.get("word_embed_proj_dim")) or 0,
        rotary=rotary,
        generation=read_generation_defaults(generation, config),
        num_experts=sizes.find("num_experts") or 1,
        quantized=quantization.scheme if quantization else "none",
        plain_parameters=-(-plain.num_weights // num_layers),
        plain_outputs=-(-plain.num_outputs // num_layers),
        plain_head=quantization is not None and (is_tied or plain.has_head),
        split_refusal=split_refusal(config),
    )


def _generation_config(folder: Path) -> dict[str, object] | None:
    path = folder / "generation_config.json"
    return read_json_object(path) if path.is_file() else None


def _plain_linears(folder: Path, quantization: StoredQuantization) -> PlainLinears:
    """What is not quantised; where the names in the files cannot be told cheaply, by the rule."""
    try:
        shapes = {name: entry.shape for name, entry in read_index(folder).tensors.items()}
    except CheckpointError:
        shapes = {}  # planning works without weights; loading reports what is wrong
    if not shapes:
        return PlainLinears(has_head=not quantization.holds(HEAD))
    return quantization.plain_linears(shapes)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Looks sizes up under the names of `ALIASES`."""

    path: Path
    config: Mapping[str, object]

    def find(self, name: str) -> int | None:
        """The size, or None when the file does not state it (or states null)."""
        for alias in ALIASES[name]:
            value = self.config.get(alias)
            if value is None:
                continue
            if _positive(value) is None:
                raise UnsupportedModelError(
                    f"{self.path}: {alias} is {value!r}, expected one positive whole number; "
                    "models whose layers differ in shape cannot be planned"
                )
            return _positive(value)
        return None

    def need(self, name: str) -> int:
        """The size; raises CheckpointError when it is not there."""
        size = self.find(name)
        if size is None:
            raise CheckpointError(
                f"{self.path} does not state {' or '.join(ALIASES[name])}: the file is "
                f"incomplete, or the family {self.config.get('model_type', '(unknown)')!r} is not "
                "a decoder with attention"
            )
        return size


def _positive(value: object) -> int | None:
    return value if type(value) is int and 0 < value <= _MAX_SIZE else None


def _head_dim(config: Mapping[str, object], hidden_size: int, num_heads: int) -> int:
    size = _positive(config.get("head_dim")) or hidden_size // num_heads
    if size == 0:
        raise CheckpointError(
            f"config.json says {num_heads} attention heads for a hidden size of {hidden_size}: "
            "one of them is wrong; copy the file again"
        )
    return size


def _require_decoder(outer: Mapping[str, object], config: Mapping[str, object]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            "config.json does not state model_type: the file is incomplete, or is not one of "
            "transformers"
        )
    why = refusal(outer)
    if why:
        raise refuse(model_type, why)
    architecture = _architecture(outer)
    generates = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model")
    if architecture and not architecture.endswith(generates):
        raise UnsupportedModelError(
            f"{architecture} does not generate text: a decoder with a language-model head "
            "(…ForCausalLM) is needed"
        )


def _architecture(outer: Mapping[str, object]) -> str:
    """The class that wrote the checkpoint; empty when the file does not say."""
    architectures = outer.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _num_kv_heads(config: Mapping[str, object], sizes: _Sizes, num_heads: int) -> int:
    # Falcon states num_kv_heads always and means it only in its newer layout.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    if "new_decoder_architecture" in config and not config["new_decoder_architecture"]:
        return num_heads
    return sizes.find("num_kv_heads") or num_heads


def _tied(outer: Mapping[str, object], inner: object, model_type: str) -> bool:
    for config in (outer, inner):
        if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
            return bool(config["tie_word_embeddings"])
    return model_type in TIED_BY_DEFAULT


def _dtype(folder: Path, outer: Mapping[str, object], config: Mapping[str, object]) -> str:
    stated = (source.get(key) for source in (config, outer) for key in ("dtype", "torch_dtype"))
    name = next((str(value) for value in stated if value), "").removeprefix("torch.")
    if name in ("", "auto"):
        return _stored_dtype(folder)
    if name not in _DTYPES:
        raise UnsupportedModelError(
            f"config.json says dtype = {name!r}: weights in {', '.join(_DTYPES)} can be run"
        )
    return name


def _stored_dtype(folder: Path) -> str:
    """What most tensors of a safetensors file are; float32 where that cannot be told cheaply."""
    try:
        entries = read_index(folder).tensors.values()
    except CheckpointError:
        return "float32"  # planning works without weights; loading reports what is wrong
    names = [entry.dtype for entry in entries if entry.dtype in _DTYPES]
    return max(_DTYPES, key=names.count) if names else "float32"


def _eos_token_ids(
    generation: Mapping[str, object] | None, config: Mapping[str, object]
) -> tuple[int, ...]:
    """Of `generation_config.json` where it names some, else of `config.json`."""
    for source in (generation or {}, config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = tuple(n for n in ids if type(n) is int and 0 <= n <= _MAX_SIZE)
        if found:
            return found
    return ()
