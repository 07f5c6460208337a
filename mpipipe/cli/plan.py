"""`mpipipe plan`: the plan for N ranks of this machine's kind, without starting anything."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from mpipipe.config.load import load_config
from mpipipe.planning.explain import plan_lines
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.resolve import deepspeed_warnings, make_plan
from mpipipe.planning.resources import RankResources, read_rank_resources
from mpipipe.topology.gpu import (
    GpuFacts,
    driver_in_sight,
    gpu_of_rank,
    no_driver_problem,
)
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.nvml import query_host
from mpipipe.topology.packages import installed_attention_backends

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig

__all__ = ["plan_command", "ranks_of_this_host"]


def plan_command(
    config: Path, overrides: Sequence[str], *, num_stages: int | None, as_json: bool
) -> None:
    """Print the plan that the ranks of `num_stages` on one host like this one would agree on.

    Without `num_stages`: as many as the configuration asks for, or one.

    Raises:
        MpipipeError: what `mpipipe run` would refuse before it reads prompts and weights.
    """
    loaded = load_config(config, overrides)
    if num_stages is None:
        configured = loaded.config.pipeline.num_stages
        num_stages = configured if isinstance(configured, int) else 1
    model = read_model(loaded)
    num_ranks = num_stages * loaded.config.pipeline.tensor_parallel
    ranks = ranks_of_this_host(loaded, num_ranks)
    plan = make_plan(model.loaded.config, model.spec, ranks, str(model.folder), notes=model.notes)
    for warning in (*loaded.warnings, *deepspeed_warnings(loaded, plan)):
        print(f"mpipipe: warning: {warning}", file=sys.stderr)
    print(plan.to_json() if as_json else "\n".join(plan_lines(plan)))


def ranks_of_this_host(loaded: LoadedConfig, num_ranks: int) -> list[RankResources]:
    """What `num_ranks` ranks of this host would have."""
    backends = installed_attention_backends()
    return [
        read_rank_resources(
            rank,
            launcher=Launcher.NONE.value,
            gpu=gpu,
            attention_backends=backends if gpu.index >= 0 else (),
        )
        for rank, gpu in enumerate(_gpus(loaded.config.pipeline.device, num_ranks))
    ]


def _gpus(device: str, num_ranks: int) -> list[GpuFacts]:
    """The GPU of each rank, as the driver tells; whether torch can use it is not tried."""
    found = query_host()[0] if device != "cpu" and driver_in_sight() else ()
    if found:
        return [found[gpu_of_rank(rank, len(found))] for rank in range(num_ranks)]
    problem = no_driver_problem(os.environ) if device == "cuda" else ""
    return [GpuFacts(problem=problem)] * num_ranks
