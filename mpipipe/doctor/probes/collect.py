"""Collects the facts of this rank, what takes long at the same time: `import torch`, the rest.

Not here: judging. Called on every rank, by itself; nothing is sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.config.load import config_hash, load_config
from mpipipe.config.schema import AUTO
from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.probes.gpu import probe_before_torch, probe_with_torch
from mpipipe.doctor.probes.launch import probe_launch
from mpipipe.doctor.probes.node import probe_node
from mpipipe.doctor.probes.software import import_torch, probe_software
from mpipipe.errors import MpipipeError
from mpipipe.topology.host import host_name

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig

__all__ = ["MpiState", "collect_facts", "try_load"]


@dataclasses.dataclass(frozen=True, slots=True)
class MpiState:
    """This rank's place in MPI's world; one of one, without a library, where there is no MPI."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    library: str = ""
    module: str = ""  # file of mpi4py's
    thread_level: str = ""


def try_load(
    path: Path | None, overrides: Sequence[str]
) -> tuple[LoadedConfig | None, MpipipeError | None]:
    """The configuration, or why there is none; neither when no job was named."""
    if path is None:
        return None, None
    try:
        return load_config(path, overrides), None
    except MpipipeError as error:
        return None, error


async def collect_facts(
    mpi: MpiState, loaded: LoadedConfig | None, problem: MpipipeError | None
) -> RankFacts:
    """What this rank sees. Imports torch in a thread, so that messages go on meanwhile."""
    wanted = loaded.config.pipeline.device if loaded is not None else AUTO
    node = probe_node(os.environ)  # before torch takes its share of the memory
    importing = asyncio.to_thread(import_torch)
    (look, gpus), torch_import = await asyncio.gather(
        asyncio.to_thread(probe_before_torch, os.environ, wanted=wanted), importing
    )
    launch = probe_launch(
        os.environ,
        rank=mpi.rank,
        local_rank=mpi.local_rank,
        world_size=mpi.world_size,
        mpi_library=mpi.library,
        mpi_module=mpi.module,
        thread_level=mpi.thread_level,
    )
    if not torch_import.problem:
        look = probe_with_torch(look, gpus, launch.local_rank)
    return RankFacts(
        rank=mpi.rank,
        host=host_name(),
        pid=os.getpid(),
        launch=launch,
        software=probe_software(os.environ, torch_import),
        node=node,
        gpu=look,
        config_hash=config_hash(loaded.config) if loaded is not None else "",
        config_problem=str(problem) if problem is not None else "",
        config_exit_code=problem.exit_code if problem is not None else 0,
    )
