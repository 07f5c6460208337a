"""`mpipipe plan`: the plan for N ranks of this machine's kind, without starting anything."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.config.load import config_hash, load_config
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.resolve import make_plan
from mpipipe.runtime.inputs import deepspeed_warnings, read_model
from mpipipe.topology.affinity import usable_physical_cores
from mpipipe.topology.gpu import (
    GpuFacts,
    driver_in_sight,
    gpu_of_rank,
    installed_attention_backends,
    no_driver_problem,
    query_gpus,
)
from mpipipe.topology.host import read_host

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig

__all__ = ["plan_command"]


def plan_command(
    config: Path, overrides: Sequence[str], *, num_stages: int | None, as_json: bool
) -> None:
    """Print the plan that `num_stages` ranks on one host like this one would agree on.

    Without `num_stages`: as many as the configuration asks for, or one.

    Raises:
        MpipipeError: what `mpipipe run` would refuse before it reads prompts and weights.
    """
    loaded = load_config(config, overrides)
    if num_stages is None:
        configured = loaded.config.pipeline.num_stages
        num_stages = configured if isinstance(configured, int) else 1
    model = read_model(loaded)
    hellos = _greetings(loaded, num_stages)
    plan = make_plan(loaded.config, model.spec, hellos, str(model.folder))
    for warning in (*loaded.warnings, *deepspeed_warnings(loaded, plan)):
        print(f"mpipipe: warning: {warning}", file=sys.stderr)
    print(plan.to_json() if as_json else "\n".join(plan_lines(plan)))


def _greetings(loaded: LoadedConfig, num_ranks: int) -> list[Hello]:
    """What `num_ranks` ranks of this host would tell each other."""
    host = read_host()
    gpus = _gpus(loaded.config.pipeline.device, num_ranks)
    cores = usable_physical_cores()
    backends = installed_attention_backends()
    return [
        Hello(
            rank=rank,
            world_size=num_ranks,
            protocol_version=PROTOCOL_VERSION,
            package_version=__version__,
            config_hash=config_hash(loaded.config),
            host=host.host,
            pid=os.getpid(),
            num_cores=host.usable_cores,
            memory_available_bytes=host.memory_available_bytes,
            launcher="none",
            gpu_index=gpu.index,
            gpu_name=gpu.name,
            gpu_uuid=gpu.uuid,
            gpu_capability=gpu.capability,
            gpu_memory_bytes=gpu.memory_bytes,
            gpu_free_bytes=gpu.free_bytes,
            nccl_version=gpu.nccl_version,
            attention_backends=backends if gpu.index >= 0 else (),
            gpu_problem=gpu.problem,
            cores=cores,
            num_allowed_cpus=sum(map(len, cores)),
        )
        for rank, gpu in enumerate(gpus)
    ]


def _gpus(device: str, num_ranks: int) -> list[GpuFacts]:
    """The GPU of each rank, as nvidia-smi tells; whether torch can use it is not tried."""
    found = query_gpus() if device != "cpu" and driver_in_sight() else ()
    if found:
        return [found[gpu_of_rank(rank, len(found))] for rank in range(num_ranks)]
    problem = no_driver_problem(os.environ) if device == "cuda" else ""
    return [GpuFacts(problem=problem)] * num_ranks
