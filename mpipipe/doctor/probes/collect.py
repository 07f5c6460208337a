"""Collects the facts of this rank, what takes long at the same time: `import torch`, the rest.

Called on every rank, by itself; nothing is sent. `checks` say what the facts mean.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.config.load import config_hash, load_config
from mpipipe.config.schema import AUTO
from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.probes.gpu import probe_before_torch, probe_with_torch
from mpipipe.doctor.probes.launch import MpiState, probe_launch
from mpipipe.doctor.probes.node import probe_node
from mpipipe.doctor.probes.software import import_torch, probe_software
from mpipipe.errors import MpipipeError
from mpipipe.topology.host import host_name

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig

__all__ = ["collect_facts", "try_load"]


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
    (facts, gpus), torch_import = await asyncio.gather(
        asyncio.to_thread(probe_before_torch, os.environ, wanted=wanted), importing
    )
    launch = probe_launch(os.environ, mpi)
    if not torch_import.problem:
        facts = probe_with_torch(facts, gpus, launch.local_rank)
    return RankFacts(
        rank=mpi.rank,
        host=host_name(),
        pid=os.getpid(),
        launch=launch,
        software=probe_software(os.environ, torch_import),
        node=node,
        gpu=facts,
        config_hash=config_hash(loaded.config) if loaded is not None else "",
        config_problem=str(problem) if problem is not None else "",
        config_exit_code=problem.exit_code if problem is not None else 0,
    )
