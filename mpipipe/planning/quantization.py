"""What a run computes in, and which weights it has in 8 bits: whether every device can do that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.errors import PlanError
from mpipipe.planning.devices import choose_dtype, describe_gpu, least_capable
from mpipipe.planning.plan import Decisions
from mpipipe.planning.resources import RankResources
from mpipipe.types import DeviceName, DtypeName

__all__ = ["FP8_CAPABILITY", "choose_numbers"]

FP8_CAPABILITY = 89  # Ada; Hopper has 90


def choose_numbers(
    spec: ModelSpec, decisions: Decisions, device: DeviceName, ranks: Sequence[RankResources]
) -> tuple[ModelSpec, DtypeName]:
    """What to compute in, and `spec` with the weights that the run has.

    They are as asked for, or as the checkpoint has them.

    Raises:
        PlanError: a device cannot compute in it, or the checkpoint has other weights already.
    """
    dtype, reason = choose_dtype(decisions.config.model.dtype, spec.dtype, device, ranks)
    dtype = decisions.settle("model.dtype", dtype, reason)
    return _quantized(spec, decisions, device, ranks), dtype


def _quantized(
    spec: ModelSpec, decisions: Decisions, device: DeviceName, ranks: Sequence[RankResources]
) -> ModelSpec:
    asked, stored = decisions.config.model.quantize, spec.quantized
    if stored not in {"none", asked} and asked != "none":
        raise PlanError(
            f'model.quantize = "{asked}", but the weights of the checkpoint are in {stored} '
            'already, and would lose twice: set model.quantize = "none", which takes them as they '
            "are, or use the model's float16 or bfloat16 weights"
        )
    quantized = asked if stored == "none" else stored
    if quantized == "fp8":
        _check_fp8(device, ranks)
    if quantized == "none":
        return spec
    reason = "asked for" if stored == "none" else "as the weights are in the checkpoint"
    what = "the linears of the layers, with a scale per output channel"
    if spec.num_experts > 1:
        share = 1 - spec.quantizable_parameters / spec.layer_parameters
        what += f"; experts stay as they are ({share:.0%} of a layer's weights)"
    if spec.plain_parameters:
        what += ", those apart that it leaves as they are"
    spec = replace(spec, quantized=quantized)
    if not spec.has_quantized_head:
        what += "; the LM head stays as it is"
    elif spec.tied_embeddings:
        what += "; of the embedding the LM head has a copy in 8 bits"
    decisions.note("model.quantize", quantized, f"{reason}: {what}")
    return spec


def _check_fp8(device: DeviceName, ranks: Sequence[RankResources]) -> None:
    remedy = 'set model.quantize = "int8", which every GPU and CPU computes'
    if device == "cpu":
        raise PlanError(f'model.quantize = "fp8", but the stages run on CPUs: {remedy}')
    worst = least_capable(ranks)
    if worst.gpu.capability < FP8_CAPABILITY:
        major, minor = divmod(worst.gpu.capability, 10)
        raise PlanError(
            f'model.quantize = "fp8", but {describe_gpu(worst)} of rank {worst.rank} on '
            f"{worst.host} has compute capability {major}.{minor}, and 8-bit floats need 8.9 (Ada) "
            f"or newer: {remedy}"
        )
