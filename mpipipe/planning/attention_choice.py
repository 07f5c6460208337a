"""Which attention backend a run uses, and why. Pure: what the ranks can run is given.

`models.attention.select` finds on every rank what can run there, and makes the backend; the head
decides with what all ranks have.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mpipipe.config.schema import AUTO, Auto
from mpipipe.errors import ConfigError
from mpipipe.types import AttentionName

__all__ = ["AttentionFacts", "choose_attention"]

_HALF_TYPES = frozenset({"float16", "bfloat16"})
_FLASHINFER_DIMS = (64, 128, 256)
_MAX_HEAD_DIM = 256
_ON_EVERY_DEVICE = frozenset({"sdpa", "reference"})


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """What a run has and needs."""

    device: str  # cpu or cuda
    capability: int  # the lowest of the run's GPUs, times 10 (75: a T4); 0 on a CPU
    head_dim: int  # elements of one head
    dtype: str  # of the activations, e.g. "bfloat16"
    available: Collection[str]  # the backends that every rank imports and can run


def choose_attention(
    asked: Auto | AttentionName, facts: AttentionFacts
) -> tuple[AttentionName, str]:
    """The backend's name and the reason; `asked`: `pipeline.attention`.

    Raises:
        ConfigError: the backend asked for cannot run this model here.
    """
    if asked != AUTO:
        problem = _problem(asked, facts)
        if problem:
            raise ConfigError(f'pipeline.attention = "{asked}" cannot run here: {problem}')
        return asked, "asked for"
    if facts.device != "cuda":
        return "sdpa", "torch's fused attention is the fast one on a CPU"
    problem = _problem("triton", facts)
    if not problem:
        head_dim = facts.head_dim
        return "triton", f"our paged kernels fit any head dimension up to 256 (here {head_dim})"
    if not _problem("varlen", facts):
        return "varlen", f"torch's flash attention over pages, as triton is out: {problem}"
    return "sdpa", f"slow, without CUDA graphs, but it runs everywhere; triton is out: {problem}"


def _problem(name: str, facts: AttentionFacts) -> str:
    """Why backend `name` cannot run, with a remedy; empty if it can."""
    if name in _ON_EVERY_DEVICE:
        return ""
    if facts.device != "cuda":
        return 'it needs a GPU and this run is on the CPU; use "sdpa", or pipeline.device = "cuda"'
    least = 75 if name == "triton" else 80
    if facts.capability < least:
        return (
            f"it needs compute capability {least / 10:.1f} and a GPU of this run has "
            f'{facts.capability / 10:.1f}; use "triton" or "sdpa"'
        )
    if name not in facts.available:
        return _MISSING[name]
    return _problem_of_model(name, facts)


def _problem_of_model(name: str, facts: AttentionFacts) -> str:
    dtype, head_dim = facts.dtype, facts.head_dim
    if dtype not in _HALF_TYPES and name != "triton":
        return f'it computes in float16 and bfloat16, not {dtype}; set model.dtype or use "triton"'
    if name == "flashinfer" and head_dim not in _FLASHINFER_DIMS:
        dims = ", ".join(map(str, _FLASHINFER_DIMS))
        return f'its kernels take heads of {dims} elements, this model has {head_dim}; use "triton"'
    if name == "varlen" and head_dim % 8:
        return f'its heads are multiples of 8 elements, this model has {head_dim}; use "triton"'
    if head_dim > _MAX_HEAD_DIM:
        return f'its heads hold up to 256 elements, this model has {head_dim}; use "sdpa"'
    return ""


_MISSING = {
    "triton": (
        "Triton or a C compiler is missing on a rank, or a trial kernel failed; install triton and "
        'gcc, or use "varlen" or "sdpa"'
    ),
    "flashinfer": (
        "a rank has no flashinfer, or neither its compiled kernels nor nvcc; install mpipipe[cuda] "
        'and CUDA\'s compiler there, or use "triton" or "auto"'
    ),
    "varlen": (
        "a rank's torch has no varlen_attn over pages (2.13 has); install a newer torch, or use "
        '"triton" or "auto"'
    ),
}
