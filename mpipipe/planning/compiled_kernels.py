"""Whether the kernels that a plan launches were compiled before, as a file in Triton's cache says.

The process that compiles a host's kernels leaves a note of what it compiled
(`runtime/kernels_ahead.py`); forecasts ask for it. Needs neither torch nor Triton.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resources import RankResources
from mpipipe.topology.packages import package_versions

__all__ = ["are_kernels_compiled", "compiled_note", "stages_on_host", "triton_cache"]


def triton_cache() -> Path:
    """Where Triton keeps what it compiles.

    Raises:
        RuntimeError: there is no home folder.
    """
    told = os.environ.get("TRITON_CACHE_DIR")
    if told:
        return Path(told)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


def compiled_note(
    plan: PipelinePlan, numbers: Sequence[int], capability: tuple[int, int], num_processors: int
) -> Path:
    """The file that says that all that stages of `plan` launch is in Triton's cache.

    It is there, too, and goes with it. Its name follows from what kernels are specialised for.
    Where that leaves something out, ranks compile what is missing.

    Args:
        plan: what is computed.
        numbers: of the stages.
        capability: of the GPUs.
        num_processors: streaming multiprocessors of each.

    Raises:
        OSError: the model's configuration cannot be read.
        RuntimeError: there is no home folder.
    """
    stages = [plan.stages[number] for number in numbers]
    asked = (
        *package_versions(("triton", "torch")).values(),
        *(capability, num_processors),
        *(plan.dtype, plan.quantize, plan.kv_cache, plan.attention, plan.page_size_tokens),
        *(plan.max_decode_rows, plan.max_sequences_per_slot, plan.max_tokens_per_step),
        *(plan.max_sequence_tokens, plan.tensor_parallel, plan.read_prefixes_once),
        # Dry runs put all layers and their caches on the device.
        *((stage.has_embedding, stage.has_head) for stage in stages),
    )
    digest = hashlib.sha256(repr(asked).encode())
    digest.update((Path(plan.model_path) / "config.json").read_bytes())
    digest.update(_sources())
    return triton_cache() / f"mpipipe-{digest.hexdigest()[:32]}"


@functools.cache
def _sources() -> bytes:
    """A digest of the kernels, and of the dry run, which says which of them are launched."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in (
        *sorted((package / "models" / "kernels").glob("*.py")),
        package / "stage" / "dry_run.py",
    ):
        digest.update(source.read_bytes())
    return digest.digest()


def stages_on_host(plan: PipelinePlan, host: str) -> tuple[int, ...]:
    """The stages of `plan` on `host` that launch different kernels: what they hold of the ends."""
    found: dict[tuple[bool, bool], int] = {}
    for stage in plan.stages:
        if stage.host == host:
            found.setdefault((stage.has_embedding, stage.has_head), stage.stage)
    return tuple(found.values())


def are_kernels_compiled(plan: PipelinePlan, ranks: Sequence[RankResources]) -> bool:
    """Whether all hosts of `plan` have their kernels, as the cache that this process sees says.

    False as well where that cannot be known: the GPUs are only described, or did not tell how many
    processors they have. `ranks` are of all replicas, by rank.
    """
    if plan.device != "cuda":
        return False
    for host in dict.fromkeys(stage.host for stage in plan.stages):
        numbers = stages_on_host(plan, host)
        gpu = ranks[plan.stages[numbers[0]].rank].gpu
        if not gpu.num_processors:
            return False
        major, minor = divmod(gpu.capability, 10)
        try:
            if not compiled_note(plan, numbers, (major, minor), gpu.num_processors).exists():
                return False
        except (OSError, RuntimeError):
            return False
    return True
