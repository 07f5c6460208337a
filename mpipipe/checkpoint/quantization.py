"""Checkpoints whose weights are in 8 bits already: which of them can be run, and how they lie.

`quantization_config` of `config.json` tells. What maps onto a weight in 8 bits with one scale per
output channel is run (`models/quantized_linear.py`):

* compressed-tensors, 8 bits, symmetric, one scale per channel or tensor: `int-quantized` and
  `float-quantized` hold `weight` [O, I] and `weight_scale`; `pack-quantized` holds `weight_packed`
  int32 [O, I / 4], four weights + 128 in each number, the first in its lowest byte;
* GPTQ, 8 bits, symmetric, one group: `qweight` int32 [I / 4, O] packed in the same way down its
  columns, `scales` [1, O]. Their order of quantisation (`desc_act`) leaves no trace then.

Everything else is refused by name. Seen in compressed-tensors 0.15 and GPTQModel 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpipipe.checkpoint.families import ALIASES
from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.errors import UnsupportedModelError
from mpipipe.types import QuantizeName

__all__ = [
    "HEAD",
    "Packing",
    "PlainLinears",
    "StoredQuantization",
    "quantization_of",
    "read_quantization",
]

# How the numbers of a weight lie: each for itself, or four in an int32 along a row or a column.
Packing = Literal["none", "rows", "columns"]

HEAD = "lm_head"
_IN_A_LAYER = re.compile(r"\.\d+\.")
_LINEAR = "Linear"  # compressed-tensors: all layers of that class
_GPTQ_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class PlainLinears:
    """Linear layers that a checkpoint in 8 bits leaves as they were."""

    num_weights: int = 0  # within the decoder layers, all together
    num_outputs: int = 0
    has_head: bool = False  # the LM head is one of them


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How the quantised weights of a checkpoint lie. Names are those of modules, "….q_proj"."""

    scheme: QuantizeName
    packing: Packing
    weight: str  # the last part of the weight's name: "weight_packed"
    scale: str
    companions: tuple[str, ...]  # further tensors of such a module, of which nothing is needed
    targets: tuple[str, ...]  # names, "re:…" or "Linear"
    ignored: tuple[str, ...] = ()

    def holds(self, module: str) -> bool:
        """Whether the linear layer of this name is quantised."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return False
        return any(_matches(pattern, module) for pattern in self.targets)

    def plain_linears(self, shapes: Mapping[str, tuple[int, ...]]) -> PlainLinears:
        """Those among the tensors of the checkpoint, whose names and shapes are given."""
        plain = [
            shape
            for name, shape in shapes.items()
            if len(shape) == 2  # norms and biases have one side
            and name.endswith(".weight")
            and _IN_A_LAYER.search(name)
            and f"{name.removesuffix('.weight')}.{self.scale}" not in shapes
        ]
        return PlainLinears(
            num_weights=sum(outputs * inputs for outputs, inputs in plain),
            num_outputs=sum(outputs for outputs, _ in plain),
            has_head=f"{HEAD}.{self.scale}" not in shapes,
        )


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern in (_LINEAR, module)


def read_quantization(folder: Path) -> StoredQuantization | None:
    """How the model in `folder` is quantised; None: it is not, or has no `config.json`.

    Raises:
        CheckpointError: `config.json` is broken.
        UnsupportedModelError: see `quantization_of`.
    """
    path = folder / "config.json"
    return quantization_of(read_json_object(path)) if path.is_file() else None


def quantization_of(config: Mapping[str, object]) -> StoredQuantization | None:
    """The same from the content of a `config.json`.

    Raises:
        UnsupportedModelError: the scheme does not map onto 8 bits with a scale per channel.
    """
    inner = config.get("text_config")
    stated = config.get("quantization_config")
    if stated is None and isinstance(inner, Mapping):
        stated = inner.get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        raise _refusal("an unknown method", f"quantization_config is {stated!r:.80}")
    method = str(stated.get("quant_method") or "an unknown method")
    readers = {"compressed-tensors": _compressed_tensors, "gptq": _gptq}
    if method not in readers:
        raise _refusal(method, _OTHERS.get(method, "its layout is not known"))
    if any(config.get(name) not in (None, 0, 1) for name in ALIASES["num_experts"]):
        raise _refusal(method, "its experts lie one by one, and are run as one tensor")
    return readers[method](stated)


_OTHERS = {
    "awq": "it groups weights of 4 bits, which no kernel here computes",
    "bitsandbytes": "its layout needs its own kernels",
    "fp8": "it has a scale per block of 128 × 128 weights, not per output channel",
    "mxfp4": "it groups floats of 4 bits, which no kernel here computes",
}


def _refusal(method: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights are quantised with {method}, which cannot be run: {why}; 8 bits with one "
        "symmetric scale per output channel can be, of compressed-tensors (int8, fp8) or GPTQ; or "
        'use the model\'s float16 or bfloat16 weights, with model.quantize = "int8" to save memory'
    )


# ---- compressed-tensors --------------------------------------------------------------------------

_FORMATS: Mapping[str, tuple[str, Packing]] = {
    "int-quantized": ("int", "none"),
    "float-quantized": ("float", "none"),
    "naive-quantized": ("", "none"),  # both, in older versions
    "pack-quantized": ("int", "rows"),
}


def _compressed_tensors(stated: Mapping[str, object]) -> StoredQuantization:
    method, form = "compressed-tensors", str(stated.get("format"))
    if form not in _FORMATS:
        raise _refusal(method, f'its format is "{form}"')
    if stated.get("kv_cache_scheme"):
        raise _refusal(method, "its keys and values are quantised too (kv_cache_scheme)")
    kind, packing = _FORMATS[form]
    groups = stated.get("config_groups")
    schemes, targets = set(), []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if not isinstance(group, Mapping):
            raise _refusal(method, "its config_groups are broken")
        schemes.add(_scheme_of(method, group, kind))
        targets += _texts(group.get("targets"))
    if len(schemes) != 1:
        raise _refusal(method, f"it has {len(schemes)} schemes of quantisation, not one")
    return StoredQuantization(
        scheme=schemes.pop(),
        packing=packing,
        weight="weight_packed" if packing == "rows" else "weight",
        scale="weight_scale",
        companions=("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
                    "input_zero_point"),
        targets=_checked(method, targets),
        ignored=_checked(method, _texts(stated.get("ignore"))),
    )  # fmt: skip


def _scheme_of(method: str, group: Mapping[str, object], kind: str) -> QuantizeName:
    """What the weights of one group are in, if it can be run."""
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise _refusal(method, "a group says nothing of its weights")
    bits, found = weights.get("num_bits"), str(weights.get("type"))
    if bits != 8:
        raise _refusal(method, f"its weights have {bits} bits")
    if found not in ("int", "float") or kind not in ("", found):
        raise _refusal(method, f'its weights are of type "{found}"')
    if weights.get("symmetric") is not True:
        raise _refusal(method, "its weights are not symmetric round zero")
    if weights.get("strategy") not in ("channel", "tensor"):
        raise _refusal(method, f"its scales are per {weights.get('strategy')}, not per channel")
    if found == "float" and not isinstance(group.get("input_activations"), Mapping):
        raise _refusal(method, "its weights are floats of 8 bits for activations of 16 (W8A16)")
    return "int8" if found == "int" else "fp8"


# ---- GPTQ ----------------------------------------------------------------------------------------


def _gptq(stated: Mapping[str, object]) -> StoredQuantization:
    bits, group_size = stated.get("bits"), stated.get("group_size")
    if bits != 8:
        raise _refusal("gptq", f"its weights have {bits} bits")
    if group_size != -1:
        raise _refusal("gptq", f"its scales are per {group_size} weights, not per output channel")
    if stated.get("sym") is not True:
        raise _refusal("gptq", "its weights are not symmetric round zero")
    form = stated.get("checkpoint_format", _GPTQ_FORMATS[0])
    if form not in _GPTQ_FORMATS:
        raise _refusal("gptq", f'its format is "{form}"')
    if stated.get("dynamic"):
        raise _refusal("gptq", "its layers differ in their quantisation (dynamic)")
    named = tuple(f"re:.*\\.{re.escape(name)}$" for name in _flat(
        stated.get("modules_in_block_to_quantize")))  # fmt: skip
    return StoredQuantization(
        scheme="int8",
        packing="columns",
        weight="qweight",
        scale="scales",
        companions=("qzeros", "g_idx"),
        targets=named or (_LINEAR,),
        ignored=() if stated.get("lm_head") is True else (HEAD,),
    )


def _flat(value: object) -> Iterator[str]:
    """The names in a list, or in lists in it."""
    for item in value if isinstance(value, list) else ():
        yield from (name for name in (item if isinstance(item, list) else [item])
                    if isinstance(name, str))  # fmt: skip


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _checked(method: str, patterns: list[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise _refusal(method, f"{pattern!r} is no regular expression ({error})") from error
    return tuple(patterns)
