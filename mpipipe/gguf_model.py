"""A GGUF file as transformers knows the model: its config, its tensors and its tokenizer.

The package `gguf` reads the file and decodes its blocks; transformers has the names, the order of
the rotary rows and the tokenizers. What transformers passes over is accounted for here: a setting
or a tensor that no one takes would make another model of it, so the file is refused by name.

llama.cpp writes the frequencies of Llama 3's rotary embedding as factors; they are computed anew
from the published settings and must agree.

Invariants: tensors are decoded one by one, so the peak is the largest tensor in float32, twice;
nothing of the file is changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.errors import CheckpointError, EnvironmentSetupError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedTokenizerFast

__all__ = ["GgufModel", "open_gguf", "tokenizer_files"]

# Tried in tests/contract/test_gguf_model.py. transformers reads more, but of some it leaves out
# settings that the file states (Gemma's scaling, Phi-3's windows).
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Settings of an architecture that need no place in the config: checked below, or no part of it.
_CHECKED = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_IDLE = {
    "vocab_size": None,  # follows from the embedding
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "tensor_data_layout": "Meta AI original pth",  # the order of rows that all files have
}
_ROPE_FACTORS = "rope_freqs.weight"
# As published with Llama 3.1 (factor 8), 3.2 (32) and 3.3 (8): what the factors are made from.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE_TOLERANCE = 1e-4
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_THETA = 10000.0  # llama.cpp's, where a file states none
_SPACE_PREFIX, _SPACE = "tokenizer.ggml.add_space_prefix", "\u2581"
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DECODED = "bfloat16"  # blocks: computing in it overflows with no model, and 8 bits hold the error


@dataclass(frozen=True, slots=True)
class GgufModel:
    """An open file; `tensor` reads."""

    path: Path
    config: Mapping[str, Any]  # the content of `config.json`
    generation_config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]  # transformers' name → shape, in the order of the file
    _reader: GGUFReader
    _stored: Mapping[str, ReaderTensor]
    _processor: Any

    @property
    def dtype(self) -> str:
        """The type of the weights: of plain ones their own, of blocks bfloat16."""
        return str(self.config["dtype"])

    def field(self, key: str) -> Any:
        """A value of the file's metadata; None: it has none of this key."""
        return _field(self._reader, key)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by transformers' name, decoded, float32, as torch's modules hold it."""
        import numpy as np
        import torch
        from gguf import dequantize

        stored = self._stored[name]
        decoded = dequantize(stored.data, stored.tensor_type)
        ordered = self._processor.process(weights=decoded, name=stored.name).weights
        # A copy: float32 tensors are read-only views of the mapped file.
        return torch.from_numpy(np.array(ordered)).float()


def open_gguf(path: Path) -> GgufModel:
    """Open `path` and account for all that it says of the model.

    Raises:
        CheckpointError: no GGUF file, cut off, or one part of several.
        UnsupportedModelError: an architecture, setting or tensor that has no place.
        EnvironmentSetupError: the package `gguf` is not installed.
    """
    reader = _open_reader(path)
    architecture = str(_field(reader, "general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path.name} holds a model of architecture {architecture!r}; of GGUF files "
            f"{', '.join(_ARCHITECTURES)} are converted: stage the model's safetensors instead"
        )
    if (_field(reader, "split.count") or 1) > 1:
        raise CheckpointError(
            f"{path.name} is one of {_field(reader, 'split.count')} parts of a GGUF file: merge "
            "them first (`llama-gguf-split --merge FIRST_PART OUT.gguf`)"
        )
    config = _config(path, reader, architecture)
    return _placed(path, reader, architecture, config)


def tokenizer_files(model: GgufModel) -> dict[str, bytes]:
    """The files of the tokenizer that the model's file describes, by their names.

    Raises:
        UnsupportedModelError: it splits text in a way that transformers does not know.
    """
    from transformers import AutoTokenizer

    path = model.path
    _require_known_splits(model)
    tokenizer = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    if model.field("tokenizer.ggml.model") == "llama":
        _set_space_prefix(tokenizer, prefixed=model.field(_SPACE_PREFIX) is not False)
    with tempfile.TemporaryDirectory(prefix="mpipipe-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _open_reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise EnvironmentSetupError(
            "GGUF files are read with the package `gguf`, which is not installed: "
            "pip install 'mpipipe[gguf]'"
        ) from error
    try:
        return GGUFReader(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # of a cut file: whatever numpy and struct raise
        raise CheckpointError(
            f"{path} is not a readable GGUF file ({error}): it is cut off, or another kind of "
            "file; copy it again"
        ) from error


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


# ---- config --------------------------------------------------------------------------------------


def _config(path: Path, reader: GGUFReader, architecture: str) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config: dict[str, Any] = dict(load_gguf_checkpoint(str(path))["config"])
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path.name} lacks what transformers reads ({error})") from error
    config.pop("_model_name_or_path", None)
    if absent := sorted(name for name in _NEEDED if not config.get(name)):
        raise CheckpointError(
            f"{path.name} does not state {', '.join(absent)}: it is no whole model, or damaged"
        )
    blocks = {tensor.name.split(".")[1] for tensor in reader.tensors if "blk." in tensor.name}
    if len(blocks) != config["num_hidden_layers"]:
        raise CheckpointError(
            f"{path.name} says {config['num_hidden_layers']} layers and holds {len(blocks)}: it is "
            "damaged, or one part of a model"
        )
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("rope_theta", _THETA)
    # The file holds float32: 1e-5 comes out as 9.99999974e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    _require_settings_taken(path, reader, architecture)
    config["head_dim"] = _head_dim(path, reader, architecture, config)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    plain = [name for kind, name in reversed(_PLAIN.items()) if kind in kinds]
    config["dtype"] = plain[0] if kinds <= _PLAIN.keys() else _DECODED
    return config


def _require_settings_taken(path: Path, reader: GGUFReader, architecture: str) -> None:
    """Every setting of the architecture is read by transformers, checked, or without effect."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    taken = {key for key, name in GGUF_CONFIG_MAPPING[architecture].items() if name}
    prefix = f"{architecture}."
    for full in reader.fields:
        key = full.removeprefix(prefix)
        if not full.startswith(prefix) or key in taken or key in _CHECKED:
            continue
        value = _field(reader, full)
        idle = key in _IDLE and _IDLE[key] in (None, value)
        if not idle:
            raise UnsupportedModelError(
                f"{path.name} sets {full} = {value!r}, which transformers does not take from a "
                "GGUF file, so the model would compute something else: stage its safetensors "
                "instead"
            )


def _head_dim(path: Path, reader: GGUFReader, architecture: str, config: Mapping[str, Any]) -> int:
    """Elements of a head, in which keys, values and the rotary embedding must agree."""
    derived = config["hidden_size"] // config["num_attention_heads"]
    stated = {key: _field(reader, f"{architecture}.{key}") for key in _CHECKED}
    sizes = {int(size) for size in stated.values() if size is not None}
    if len(sizes) > 1:
        raise UnsupportedModelError(
            f"{path.name} has heads of several sizes ({stated}), which is not converted: stage "
            "the model's safetensors instead"
        )
    return sizes.pop() if sizes else derived


def _generation_config(reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin and end a text; a chat model's turns end with a token of their own."""
    ends = [_field(reader, f"tokenizer.ggml.{key}") for key in _ENDS]
    eos = list(dict.fromkeys(int(end) for end in ends if end is not None))
    found = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    found["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
    return {key: value for key, value in found.items() if value is not None}


# ---- tensors -------------------------------------------------------------------------------------


def _placed(path: Path, reader: GGUFReader, architecture: str, config: dict[str, Any]) -> GgufModel:
    """Every tensor of the file has a place in transformers' model, and every place a tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception as error:  # of odd settings: whatever the family's code raises
        raise CheckpointError(
            f"{path.name} has settings of which transformers makes no model ({error}): the file "
            "is damaged, or of a variant that is not converted"
        ) from error
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor, model_type=architecture)
    stored = {names[t.name]: t for t in reader.tensors if t.name in names}
    extra = [t for t in reader.tensors if t.name not in names]
    config["architectures"] = [type(model).__name__]
    for tensor in extra:
        if tensor.name != _ROPE_FACTORS:
            raise UnsupportedModelError(
                f"{path.name} holds a tensor {tensor.name!r}, for which {architecture} has no "
                "place: stage the model's safetensors instead"
            )
        config["rope_parameters"] = _llama3_rotary(path, tensor, config)
    tied = set(model.all_tied_weights_keys) if config["tie_word_embeddings"] else set()
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in stored.items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _require_shapes(
        path, shapes, {n: s for n, s in expected.items() if n not in tied - set(shapes)}
    )
    _require_whole(path, reader)
    ends = _generation_config(reader, config)
    return GgufModel(path, {**config, **ends}, ends, shapes, reader, stored, processor)


def _require_shapes(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    if wrong:
        name = wrong[0]
        held = f"has the shape {found[name]}" if name in found else "is missing"
        raise CheckpointError(
            f"{path.name} does not fit its own settings: {name} {held}, expected "
            f"{expected[name]} ({len(wrong)} such tensors): the file is damaged, or of a variant "
            "that is not converted"
        )


def _require_whole(path: Path, reader: GGUFReader) -> None:
    size = path.stat().st_size
    end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is cut off: its header says {end:,} bytes and it has {size:,}; copy it again"
        )


def _llama3_rotary(path: Path, factors: ReaderTensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings from which transformers computes the frequencies that `factors` give."""
    import torch
    from gguf import dequantize
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divided_by = torch.tensor(dequantize(factors.data, factors.tensor_type)).double()
    theta = float(config["rope_theta"])
    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(divided_by.max()),
        **_LLAMA3,
    }
    settings = {**config, "rope_parameters": parameters}
    computed, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**settings), "cpu")
    steps = torch.arange(0, config["head_dim"], 2).double() / config["head_dim"]
    wanted = theta**-steps / divided_by
    if not torch.allclose(computed.double(), wanted, rtol=_ROPE_TOLERANCE, atol=0.0):
        raise UnsupportedModelError(
            f"{path.name} scales its rotary frequencies by factors ({_ROPE_FACTORS}) that are not "
            "those of Llama 3.1 to 3.3: stage the model's safetensors instead"
        )
    return parameters


# ---- tokenizer -----------------------------------------------------------------------------------


def _set_space_prefix(tokenizer: PreTrainedTokenizerFast, *, prefixed: bool) -> None:
    """Put a space before every text, as sentencepiece and llama.cpp do.

    transformers' own leaves it out before a text that begins with one.
    """
    from tokenizers import normalizers

    spelled = normalizers.Replace(pattern=" ", content=_SPACE)
    first = [normalizers.Prepend(prepend=_SPACE)] if prefixed else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*first, spelled])
    tokenizer.backend_tokenizer.pre_tokenizer = None


def _require_known_splits(model: GgufModel) -> None:
    """A byte-level tokenizer splits text by rules that the file only names."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError as error:
        raise EnvironmentSetupError(
            "this transformers is too old to make tokenizers of GGUF files as they are meant (5.23 "
            "does): install a newer one, or give the folder of the original model's tokenizer "
            "files (--tokenizer FOLDER)"
        ) from error

    rule = model.field("tokenizer.ggml.pre")
    is_byte_level = model.field("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and rule not in {None, "default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS}:
        raise UnsupportedModelError(
            f"{model.path.name} splits text as {rule!r} does, which transformers does not know: "
            "give the folder of the original model's tokenizer files (--tokenizer FOLDER)"
        )
