"""What must be known before anything heavy starts: who the ranks are, what the model is.

Imports neither torch nor transformers, so that a wrong setting is answered at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe._version import __version__
from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import ModelSpec, read_spec
from mpipipe.config.deepspeed import check_against_plan
from mpipipe.config.load import LoadedConfig, config_hash
from mpipipe.control_plane.messages import PROTOCOL_VERSION, Hello
from mpipipe.errors import DeadlineError, ProtocolMismatchError
from mpipipe.runtime.launch import AgreedError, Ranks
from mpipipe.runtime.model_folder import model_folder
from mpipipe.topology.host import read_host

if TYPE_CHECKING:
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["ModelFacts", "Workload", "deepspeed_warnings", "greet", "read_model"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the head knows of the model before any weight is read."""

    folder: Path  # absolute
    spec: ModelSpec
    tokenizer_folder: Path


@dataclass(frozen=True, slots=True)
class Workload:
    """What is known of the requests before the plan: lets `auto` sizes fit them. None: unknown."""

    num_requests: int | None = None
    longest_request_tokens: int | None = None  # prompt + max_new_tokens


async def greet(ranks: Ranks, loaded: LoadedConfig) -> tuple[Hello, ...]:
    """Exchange who we are and what we have; everybody must have the same configuration.

    Raises:
        AgreedError: versions, configurations or the number of ranks differ, or ranks are missing.
    """
    host = read_host()
    hello = Hello(
        rank=ranks.mesh.rank,
        world_size=ranks.mesh.world_size,
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        config_hash=config_hash(loaded.config),
        host=host.host,
        pid=os.getpid(),
        num_cores=host.usable_cores,
        memory_available_bytes=host.memory_available_bytes,
        launcher=ranks.info.launcher.value,
    )
    deadline_s = loaded.config.pipeline.handshake_timeout_s
    try:
        hellos = await ranks.mesh.handshake(hello, deadline_s)
    except (ProtocolMismatchError, DeadlineError) as error:
        raise AgreedError(error) from None
    local = [greeting for greeting in hellos if greeting.host == host.host]
    ranks.engine.share_cores(num_ranks=len(local), num_cores=host.usable_cores)
    return hellos


def read_model(loaded: LoadedConfig) -> ModelFacts:
    """Read what the head must know before it plans: `config.json` and the weight files' headers.

    Raises:
        CheckpointError: folder or files missing or incomplete, or not a model we can run.
    """
    folder = model_folder(loaded)
    spec = read_spec(folder)
    read_index(folder)  # a half-copied model must be told before anything heavy starts
    tokenizer_path = loaded.config.model.tokenizer_path
    return ModelFacts(folder, spec, Path(tokenizer_path).absolute() if tokenizer_path else folder)


def deepspeed_warnings(loaded: LoadedConfig, plan: PipelinePlan) -> list[str]:
    """What a `ds_config.json` beside the configuration asks for and the plan does differently.

    Raises:
        ConfigError: it was written for another number of stages.
    """
    if loaded.deepspeed is None:
        return []
    return check_against_plan(
        loaded.deepspeed,
        num_stages=plan.num_stages,
        dtype=plan.dtype,
        max_sequences_per_slot=plan.max_sequences_per_slot,
    )
