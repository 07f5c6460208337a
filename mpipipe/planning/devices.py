"""What the stages compute on and how: device, dtype, transport, launch-ahead. Pure.

All ranks do alike, so the least capable GPU decides. Not here: how much may be in flight
(`gpu_limits`), which attention kernel (`attention_choice`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.config.schema import AUTO, PipelineConfig
from mpipipe.errors import EnvironmentSetupError, PlanError
from mpipipe.planning.resources import RankResources

__all__ = [
    "BF16_CAPABILITY",
    "AheadMode",
    "choose_ahead_mode",
    "choose_device",
    "choose_dtype",
    "choose_transport",
    "describe_gpu",
    "least_capable",
]

# Ampere. `torch.cuda.is_bf16_supported()` also says yes on a T4 (7.5), where bfloat16 is emulated.
BF16_CAPABILITY = 80

Choice = tuple[str, str]  # value, reason


def choose_device(pipeline: PipelineConfig, ranks: Sequence[RankResources]) -> Choice:
    """`cuda` where every rank has a GPU of its own, else `cpu`.

    Raises:
        EnvironmentSetupError: a GPU was asked for and a rank has none, or ranks would share one
            without `pipeline.share_gpus`.
    """
    if pipeline.device == "cpu":
        return "cpu", "asked for"
    lacking = [rank for rank in ranks if rank.gpu_index < 0 or rank.gpu_problem]
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
    name = worst.gpu_name or "GPU"
    if len(ranks) == 1:
        return "cuda", f"the rank has a GPU ({name})"
    return "cuda", f"every rank has a GPU, the least capable is {name}"


def _why_cpu(lacking: Sequence[RankResources], *, num_ranks: int) -> str:
    named = [rank for rank in lacking if rank.gpu_problem]
    if not named and len(lacking) == num_ranks:
        return "no rank has an NVIDIA GPU"
    first = (named or lacking)[0]
    return f"{_who(first)} has no usable GPU: {_problem(first)}"


def _problem(rank: RankResources) -> str:
    return rank.gpu_problem or (
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
    return rank.gpu_uuid or f"index {rank.gpu_index}"


def _who(rank: RankResources) -> str:
    return f"rank {rank.rank} on {rank.host}"


def describe_gpu(rank: RankResources) -> str:
    """E.g. "GPU 1 (Tesla T4)"."""
    return f"GPU {rank.gpu_index} ({rank.gpu_name})"


def least_capable(ranks: Sequence[RankResources]) -> RankResources:
    """The rank with the lowest compute capability; the lowest-numbered of equals."""
    return min(ranks, key=lambda rank: (rank.gpu_capability, rank.rank))


# ---- numbers -------------------------------------------------------------------------------------


def choose_dtype(
    asked: str, checkpoint: str, device: str, ranks: Sequence[RankResources]
) -> Choice:
    """What to store and compute in. `checkpoint`: the dtype of the weight files.

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


def _gpu_dtype(checkpoint: str, worst: RankResources) -> Choice:
    if checkpoint == "float16":
        return "float16", "as in the checkpoint"
    if worst.gpu_capability >= BF16_CAPABILITY:
        made_of = (
            "as in the checkpoint" if checkpoint == "bfloat16" else "half the bytes of float32"
        )
        return "bfloat16", f"{made_of}; every GPU has compute capability 8.0 or newer"
    return "float16", (
        f"the checkpoint is {checkpoint}, but {_who(worst)} has a GPU of compute capability "
        f"{_capability(worst)} ({worst.gpu_name}), whose only 16-bit type is float16"
    )


def _check_bf16(worst: RankResources) -> None:
    if worst.gpu_capability < BF16_CAPABILITY:
        raise PlanError(
            f'model.dtype = "bfloat16", but {describe_gpu(worst)} of {_who(worst)} has compute '
            f"capability {_capability(worst)}, and bfloat16 needs 8.0 (Ampere) or newer: set "
            'model.dtype = "float16" or "auto"'
        )


def _capability(rank: RankResources) -> str:
    return f"{rank.gpu_capability // 10}.{rank.gpu_capability % 10}"


# ---- edges ---------------------------------------------------------------------------------------


def choose_transport(asked: str, device: str, ranks: Sequence[RankResources]) -> Choice:
    """How tensors travel between several stages.

    Raises:
        PlanError: `nccl` was asked for, but not all stages have a GPU of their own.
        EnvironmentSetupError: `nccl` was asked for, but a rank has none.
    """
    obstacle = _nccl_obstacle(device, ranks)
    if asked == "nccl" and obstacle is not None:
        raise obstacle
    if asked != AUTO:
        return asked, "asked for"
    if device == "cpu":
        return "mpi", "the stages run on CPUs"
    versions = sorted({rank.nccl_version for rank in ranks})
    if obstacle is not None:
        return "mpi", f"through pinned host memory, as {_first_clause(obstacle)}"
    if len(versions) > 1:
        return "mpi", f"through pinned host memory, as the ranks have NCCL {' and '.join(versions)}"
    return "nccl", f"every stage has a GPU of its own, and NCCL {versions[0]} is there"


def _nccl_obstacle(
    device: str, ranks: Sequence[RankResources]
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
    slices = Counter((rank.host, rank.gpu_pci) for rank in ranks if rank.gpu_pci)
    for (host, _), num_ranks in slices.items():
        if num_ranks > 1:
            return PlanError(
                f"{num_ranks} ranks on {host} have slices (MIG) of one GPU, and NCCL refuses two "
                'ranks on one GPU: set pipeline.transport = "mpi" or "auto", or give each rank a '
                "GPU of its own"
            )
    for rank in ranks:
        if not rank.nccl_version:
            return EnvironmentSetupError(
                f"torch on {_who(rank)} was built without NCCL: install a torch with NCCL, or set "
                'pipeline.transport = "mpi" or "auto"'
            )
    return None


def _first_clause(error: Exception) -> str:
    return str(error).partition(":")[0]


# ---- launch-ahead --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AheadMode:
    """How far the head runs ahead of the tokens, and when it computes prompts."""

    laps_ahead: int
    laps_reason: str
    prefill: str
    prefill_reason: str


def choose_ahead_mode(pipeline: PipelineConfig, device: str, kv_cache: str) -> AheadMode:
    """One lap ahead and in phases on a GPU; a CPU awaits tokens and mixes prompts into its steps.

    Raises:
        PlanError: the device or the cache does not have the mode that was asked for.
    """
    laps, reason = 0, "a CPU's steps are long beside a message"
    if isinstance(pipeline.laps_ahead, int):
        laps = pipeline.laps_ahead
    elif device == "cuda":
        laps, reason = 1, "the GPU never waits for the head to see a token"
    if device == "cuda" and laps == 0:
        raise PlanError(
            "pipeline.laps_ahead = 0 is for CPUs, and this run is on GPUs: set laps_ahead = 1 or "
            '"auto", or pipeline.device = "cpu"'
        )
    if laps and kv_cache != "paged":
        raise PlanError(
            f'memory.kv_cache = "{kv_cache}" cannot be used with pipeline.laps_ahead = {laps}, '
            "whose steps find their keys and values by page: set memory.kv_cache = "
            '"paged", or pipeline.device = "cpu" and pipeline.laps_ahead = 0'
        )
    if laps:
        prefill = "phases"
        prefill_reason = "long steps of prompts, then steps of decodes alone, which graphs replay"
    else:
        prefill, prefill_reason = "mixed", "without laps_ahead prompts fill up every step"
    if pipeline.prefill != AUTO:
        prefill = pipeline.prefill
    return AheadMode(laps, reason, prefill, prefill_reason)
