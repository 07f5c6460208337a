"""What the stages compute on and how: device, dtype, transport, lookahead. Pure.

All ranks run in the same way, so the least capable GPU decides. `step_limits` decides how much is
in flight, `attention_choice` which attention kernel runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mpipipe.config.schema import AUTO, Auto, PipelineConfig
from mpipipe.errors import EnvironmentSetupError, PlanError
from mpipipe.planning.resources import RankResources
from mpipipe.types import CacheKind, DeviceName, DtypeName, PrefillMode, TransportName

__all__ = [
    "BF16_CAPABILITY",
    "choose_device",
    "choose_dtype",
    "choose_lookahead",
    "choose_prefill",
    "choose_transport",
    "describe_gpu",
    "least_capable",
    "needed_dtype",
]

# Ampere. `torch.cuda.is_bf16_supported()` also says yes on a T4 (7.5), where bfloat16 is emulated.
BF16_CAPABILITY = 80


def choose_device(
    pipeline: PipelineConfig, ranks: Sequence[RankResources]
) -> tuple[DeviceName, str]:
    """`cuda` where every rank has a GPU of its own, else `cpu`; and why.

    Raises:
        EnvironmentSetupError: a GPU was asked for and a rank has none, or ranks would share one
            without `pipeline.share_gpus`.
    """
    if pipeline.device == "cpu":
        return "cpu", "asked for"
    lacking = [rank for rank in ranks if not rank.has_gpu]
    if lacking and pipeline.device == "cuda":
        raise EnvironmentSetupError(
            f'pipeline.device = "cuda", but {_who(lacking[0])} has no usable GPU: '
            f"{_problem(lacking[0])}"
        )
    if lacking:
        return "cpu", _why_cpu(lacking, num_ranks=len(ranks))
    if not pipeline.share_gpus:
        _check_own_gpus(ranks)
    worst = least_capable(ranks)
    name = worst.gpu.name or "GPU"
    if len(ranks) == 1:
        return "cuda", f"the rank has a GPU ({name})"
    return "cuda", f"every rank has a GPU, the least capable is {name}"


def _why_cpu(lacking: Sequence[RankResources], *, num_ranks: int) -> str:
    named = [rank for rank in lacking if rank.gpu.problem]
    if not named and len(lacking) == num_ranks:
        return "no rank has an NVIDIA GPU"
    first = (named or lacking)[0]
    return f"{_who(first)} has no usable GPU: {_problem(first)}"


def _problem(rank: RankResources) -> str:
    return rank.gpu.problem or (
        'there is none in sight: start it where the GPUs are, or set pipeline.device = "cpu"'
    )


def _check_own_gpus(ranks: Sequence[RankResources]) -> None:
    for sharers in _by_gpu(ranks):
        if len(sharers) == 1:
            continue
        numbers = ", ".join(str(rank.rank) for rank in sharers)
        host, gpu = sharers[0].host, describe_gpu(sharers[0])
        num_ranks = sum(rank.host == host for rank in ranks)
        num_gpus = len({_identity(rank) for rank in ranks if rank.host == host})
        raise EnvironmentSetupError(
            f"ranks {numbers} on {host} would share {gpu}, as {num_ranks} ranks see "
            f"{num_gpus} GPU{'s' * (num_gpus > 1)} there: start at most one rank per GPU, let the "
            f"ranks see as many GPUs as they are (CUDA_VISIBLE_DEVICES, srun --gpus-per-node="
            f"{num_ranks}), or set pipeline.share_gpus = true, which is slow and made for tests"
        )


def _by_gpu(ranks: Sequence[RankResources]) -> list[list[RankResources]]:
    groups: dict[tuple[str, str], list[RankResources]] = {}
    for rank in ranks:
        groups.setdefault((rank.host, _identity(rank)), []).append(rank)
    return list(groups.values())


def _identity(rank: RankResources) -> str:
    return rank.gpu.uuid or f"index {rank.gpu.index}"


def _who(rank: RankResources) -> str:
    return f"rank {rank.rank} on {rank.host}"


def describe_gpu(rank: RankResources) -> str:
    """E.g. "GPU 1 (Tesla T4)"."""
    return f"GPU {rank.gpu.index} ({rank.gpu.name})"


def least_capable(ranks: Sequence[RankResources]) -> RankResources:
    """The rank with the lowest compute capability; the lowest-numbered of equals."""
    return min(ranks, key=lambda rank: (rank.gpu.capability, rank.rank))


# ---- numbers -------------------------------------------------------------------------------------


def choose_dtype(
    asked: Auto | DtypeName, checkpoint: str, device: DeviceName, ranks: Sequence[RankResources]
) -> tuple[DtypeName, str]:
    """What to store and compute in, and why. `checkpoint`: the dtype of the weight files.

    Raises:
        PlanError: bfloat16 was asked for on a GPU that cannot compute in it.
    """
    if device == "cuda" and asked == "bfloat16":
        _check_bf16(least_capable(ranks))
    if asked != AUTO:
        return asked, "asked for"
    if device == "cuda":
        return _gpu_dtype(checkpoint, least_capable(ranks))
    if checkpoint == "float32":
        return "float32", "as in the checkpoint"
    return "float32", f"exact on every CPU; the checkpoint is {checkpoint}"


def needed_dtype(asked: Auto | DtypeName, ranks: Sequence[RankResources]) -> DtypeName | None:
    """What to ask for on these GPUs, where they cannot compute in what is asked for; else None."""
    is_too_old = least_capable(ranks).gpu.capability < BF16_CAPABILITY
    return "float16" if asked == "bfloat16" and is_too_old else None


def _gpu_dtype(checkpoint: str, worst: RankResources) -> tuple[DtypeName, str]:
    if checkpoint == "float16":
        return "float16", "as in the checkpoint"
    if worst.gpu.capability >= BF16_CAPABILITY:
        made_of = (
            "as in the checkpoint" if checkpoint == "bfloat16" else "half the bytes of float32"
        )
        return "bfloat16", f"{made_of}; every GPU has compute capability 8.0 or newer"
    return "float16", (
        f"the checkpoint is {checkpoint}, but {_who(worst)} has a GPU of compute capability "
        f"{_capability(worst)} ({worst.gpu.name}), whose only 16-bit type is float16"
    )


def _check_bf16(worst: RankResources) -> None:
    if worst.gpu.capability < BF16_CAPABILITY:
        raise PlanError(
            f'model.dtype = "bfloat16", but {describe_gpu(worst)} of {_who(worst)} has compute '
            f"capability {_capability(worst)}, and bfloat16 needs 8.0 (Ampere) or newer: set "
            'model.dtype = "float16" or "auto"'
        )


def _capability(rank: RankResources) -> str:
    return f"{rank.gpu.capability // 10}.{rank.gpu.capability % 10}"


# ---- edges ---------------------------------------------------------------------------------------


def choose_transport(
    asked: Literal["auto", "nccl", "mpi"], device: DeviceName, ranks: Sequence[RankResources]
) -> tuple[TransportName, str]:
    """How tensors travel between several stages, and why.

    Raises:
        PlanError: `nccl` was asked for, but not all stages have a GPU of their own.
        EnvironmentSetupError: `nccl` was asked for, but a rank has none.
    """
    unsupported_reason = _nccl_unsupported_reason(device, ranks)
    if asked == "nccl" and unsupported_reason is not None:
        raise unsupported_reason
    if asked != AUTO:
        return asked, "asked for"
    if device == "cpu":
        return "mpi", "the stages run on CPUs"
    versions = sorted({rank.gpu.nccl_version for rank in ranks})
    if unsupported_reason is not None:
        return "mpi", f"through pinned host memory, as {_first_clause(unsupported_reason)}"
    if len(versions) > 1:
        return "mpi", f"through pinned host memory, as the ranks have NCCL {' and '.join(versions)}"
    return "nccl", f"every stage has a GPU of its own, and NCCL {versions[0]} is there"


def _nccl_unsupported_reason(
    device: DeviceName, ranks: Sequence[RankResources]
) -> PlanError | EnvironmentSetupError | None:
    if device == "cpu":
        return PlanError(
            "NCCL moves tensors between GPUs, but the stages run on CPUs: set pipeline.transport = "
            '"mpi" or "auto"'
        )
    for sharers in _by_gpu(ranks):
        if len(sharers) > 1:
            return PlanError(
                f"ranks {sharers[0].rank} and {sharers[1].rank} share {describe_gpu(sharers[0])} "
                f"of {sharers[0].host}, and NCCL refuses two ranks on one GPU: set "
                'pipeline.transport = "mpi" or "auto", or start fewer ranks'
            )
    slices = Counter((rank.host, rank.gpu.pci) for rank in ranks if rank.gpu.pci)
    for (host, _), num_ranks in slices.items():
        if num_ranks > 1:
            return PlanError(
                f"{num_ranks} ranks on {host} have slices (MIG) of one GPU, and NCCL refuses two "
                'ranks on one GPU: set pipeline.transport = "mpi" or "auto", or give each rank a '
                "GPU of its own"
            )
    for rank in ranks:
        if not rank.gpu.nccl_version:
            return EnvironmentSetupError(
                f"torch on {_who(rank)} was built without NCCL: install a torch with NCCL, or set "
                'pipeline.transport = "mpi" or "auto"'
            )
    return None


def _first_clause(error: Exception) -> str:
    return str(error).partition(":")[0]


# ---- lookahead -----------------------------------------------------------------------------------


def choose_lookahead(
    pipeline: PipelineConfig, device: DeviceName, kv_cache: CacheKind
) -> tuple[int, str]:
    """One round ahead on a GPU, none on a CPU, which awaits every token; and why.

    Raises:
        PlanError: the device or the cache does not have the lookahead that was asked for.
    """
    lookahead, reason = 0, "a CPU's steps are long beside a message"
    if isinstance(pipeline.lookahead, int):
        lookahead = pipeline.lookahead
    elif device == "cuda":
        lookahead, reason = 1, "the GPU never waits for the head to see a token"
    if device == "cuda" and lookahead == 0:
        raise PlanError(
            "pipeline.lookahead = 0 is for CPUs, and this run is on GPUs: set lookahead = 1 or "
            '"auto", or pipeline.device = "cpu"'
        )
    if lookahead and kv_cache != "paged":
        raise PlanError(
            f'memory.kv_cache = "{kv_cache}" cannot be used with pipeline.lookahead = {lookahead}, '
            "whose steps find their keys and values by page: set memory.kv_cache = "
            '"paged", or pipeline.device = "cpu" and pipeline.lookahead = 0'
        )
    return lookahead, reason


def choose_prefill(asked: Auto | PrefillMode, lookahead: int) -> tuple[PrefillMode, str]:
    """When the head computes prompts, and why."""
    if asked != AUTO:
        return asked, "asked for"
    if lookahead:
        return "phases", "long steps of prompts, then steps of decodes alone, which graphs replay"
    return "mixed", "without lookahead prompts fill up every step"
