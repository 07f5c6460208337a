"""A checkpoint of a Llama shape whose text repeats itself, for what text that repeats gains.

Random weights do not copy what a prompt says, so drafts (`pipeline.num_speculative_tokens`) come to
nothing with them. Here the LM head's row of each token is the embedding of the token before it on a
cycle of `PERIOD` ids, and what layers add is small: greedy text goes round such a cycle, whatever
the prompt is. A step costs what it costs with any weights of the shape. From the second time round
every draft is right, so a gain that is measured with it is the largest there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpipipe.errors import ConfigError, OutputError

__all__ = ["PERIOD", "write_copying_model"]

PERIOD = 16
_DEVIATION = 0.02  # of the layers' matrices
_SMALL = 1e-2 * _DEVIATION  # of those whose product is added to the hidden states
_EMBEDDING = 0.5
_BLOCK = 1 << 22  # numbers drawn for the layers, again and again


def write_copying_model(shape: Path, folder: Path) -> None:
    """Write the checkpoint of the model whose `config.json` is in `shape`, in bfloat16.

    Nothing is done where `folder` has it already.

    Raises:
        ConfigError: the shape is not that of a plain Llama.
        OutputError: it cannot be written, e.g. as the disk is full.
    """
    if (folder / "config.json").is_file():
        return
    config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama" or config.get("attention_bias"):
        raise ConfigError(f"{shape} is not the shape of a Llama without biases: choose another")
    config["tie_word_embeddings"] = False
    shapes = dict(_shapes(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "model.safetensors").open("wb") as file:
            _write(file, shapes)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"no model can be written to {folder} ({error.strerror}): choose another --scratch"
        ) from error


def _shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries = heads * head_dim
    keys = config.get("num_key_value_heads", heads) * head_dim
    inner = config["intermediate_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, size in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (queries, hidden)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, queries)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _write(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    draw = np.random.default_rng(0)
    drawn = draw.standard_normal(_BLOCK, dtype=np.float32)
    usual, small = _bfloat16(drawn * _DEVIATION), _bfloat16(drawn * _SMALL)
    one = _bfloat16(np.ones(1, dtype=np.float32))
    embedding = _bfloat16(
        _EMBEDDING * draw.standard_normal(shapes["model.embed_tokens.weight"], dtype=np.float32)
    )
    for name, size in shapes.items():
        if name == "model.embed_tokens.weight":
            file.write(embedding.tobytes())
        elif name == "lm_head.weight":
            file.write(embedding[_before(len(embedding))].tobytes())
        elif len(size) == 1:
            file.write(one.tobytes() * size[0])
        else:
            _write_again(file, small if "o_proj" in name or "down_proj" in name else usual, size)


def _write_again(file: BinaryIO, block: np.ndarray, size: tuple[int, ...]) -> None:
    left = int(np.prod(size))
    while left:
        file.write(block[:left].tobytes())
        left -= min(left, len(block))


def _before(num_ids: int) -> np.ndarray:
    """The id before each on its cycle; the last ids, too few for a cycle, follow themselves."""
    ids = np.arange(num_ids)
    before = ids - ids % PERIOD + (ids - 1) % PERIOD
    return np.where(ids < num_ids // PERIOD * PERIOD, before, ids)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut off behind the eighth bit, as uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
