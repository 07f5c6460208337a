"""Which tensors of a checkpoint make up which parameter: names only, no bytes, no torch.

Purpose: checkpoints of one model name their tensors in several ways (saved from the bare decoder or
with its head, by an older library, experts one by one or fused). The models package speaks the
names of the full model's `state_dict` ("canonical"); here those are found in the checkpoint, and
every name on both sides is accounted for. `weights/loader.py` checks shapes and types.

Invariants: one prefix rule holds for a whole checkpoint; no checkpoint tensor is taken silently:
it belongs to a canonical name, or to `_IGNORED`, or is reported as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Part", "Resolution", "resolve_names"]


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor and the region of a parameter that it fills."""

    source: str  # name in the checkpoint
    expert: int | None = None  # index into the parameter's first dimension; None: the whole of it
    half: int | None = None  # 0: first, 1: second half of the expert's rows (gate, up)


@dataclass(frozen=True, slots=True)
class Resolution:
    """The outcome for the whole model, the same on every rank."""

    parts: Mapping[str, tuple[Part, ...]]  # canonical name -> what fills it
    missing: tuple[str, ...]  # canonical names that the checkpoint does not hold
    unexpected: tuple[str, ...]  # checkpoint names that belong to nothing


# (fragment of a canonical name, the same in some checkpoints)
_SPELLINGS = (
    ("lm_head.", "embed_out."),  # GPT-NeoX before and since transformers 5.2x
    ("embed_out.", "lm_head."),
    (".mlp.gate.", ".block_sparse_moe.gate."),  # Mixtral, Phi-MoE
    (".LayerNorm.weight", ".LayerNorm.gamma"),  # written from TensorFlow
    (".LayerNorm.bias", ".LayerNorm.beta"),
)
# (end of a canonical name of fused experts, where each expert's matrices are in a checkpoint)
_EXPERTS = (
    (".mlp.experts.gate_up_proj", ".mlp.experts.{}.", ("gate_proj.weight", "up_proj.weight")),
    (".mlp.experts.down_proj", ".mlp.experts.{}.", ("down_proj.weight",)),
    (".mlp.experts.gate_up_proj", ".block_sparse_moe.experts.{}.", ("w1.weight", "w3.weight")),
    (".mlp.experts.down_proj", ".block_sparse_moe.experts.{}.", ("w2.weight",)),
)
# Tensors that older libraries stored and newer ones compute: rotary tables and causal masks.
_IGNORED = re.compile(
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|.*\.(attn|attention)\.(bias|masked_bias)"
    r"|.*\.position_ids"
)


def resolve_names(
    canonical: Collection[str],
    available: Collection[str],
    tied: Mapping[str, str],
    to_canonical: Callable[[str], str] | None = None,
) -> Resolution:
    """Find every canonical name among the `available` checkpoint names.

    Args:
        canonical: all parameters and persistent buffers of the full model.
        available: all tensors of the checkpoint.
        tied: canonical name -> the canonical name whose tensor it shares, e.g. the LM head's ->
            the embedding's. Either may be absent from the checkpoint; both may be there.
        to_canonical: checkpoint name -> canonical name, asked for what no rule here places.
    """
    names = sorted({*canonical, *tied})
    available = frozenset(available)
    rename = max(_prefix_rules(names), key=lambda rule: sum(rule(n) in available for n in names))
    parts = {n: found for n in names if (found := _find(rename(n), available))}
    if to_canonical is not None:
        taken = {part.source for found in parts.values() for part in found}
        for source in sorted(available - taken):
            name = to_canonical(source)
            if name in names and name not in parts:
                parts[name] = (Part(source),)
    for name, twin in [*tied.items(), *((twin, name) for name, twin in tied.items())]:
        if name not in parts and twin in parts:
            parts[name] = parts[twin]
    used = {part.source for found in parts.values() for part in found}
    return Resolution(
        parts=parts,
        missing=tuple(n for n in names if n not in parts),
        unexpected=tuple(
            n for n in sorted(available) if n not in used and not _IGNORED.fullmatch(n)
        ),
    )


def _prefix_rules(names: Collection[str]) -> list[Callable[[str], str]]:
    """How a checkpoint's names may begin, most common first (`max` keeps the first of equals)."""
    firsts = [name.partition(".")[0] + "." for name in names]
    base = max(dict.fromkeys(firsts), key=firsts.count, default="model.")
    return [
        lambda name: name,
        lambda name: name.removeprefix(base),  # saved from the decoder without its head
        lambda name: f"module.{name}",  # saved from torch's DataParallel
        lambda name: f"_orig_mod.{name}",  # saved from a compiled module
    ]


def _find(name: str, available: Collection[str]) -> tuple[Part, ...]:
    for spelling in _spellings(name):
        if spelling in available:
            return (Part(spelling),)
    for end, folder, matrices in _EXPERTS:
        if name.endswith(end):
            prefix = name.removesuffix(end) + folder
            if found := tuple(_experts(prefix, matrices, available)):
                return found
    return ()


def _spellings(name: str) -> Iterator[str]:
    yield name
    for ours, theirs in _SPELLINGS:
        if ours in name:
            yield name.replace(ours, theirs)


def _experts(prefix: str, matrices: tuple[str, ...], available: Collection[str]) -> Iterator[Part]:
    """The parts of one fused parameter, expert by expert, up to the first gap."""
    expert = 0
    while all(prefix.format(expert) + matrix in available for matrix in matrices):
        for half, matrix in enumerate(matrices):
            source = prefix.format(expert) + matrix
            yield Part(source, expert, half if len(matrices) > 1 else None)
        expert += 1
