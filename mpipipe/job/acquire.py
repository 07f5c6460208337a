"""What a run reads before it loads anything, and the folder that it claims, new or resumed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import AUTO
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, ConfigError
from mpipipe.job.manifest import completions_basis
from mpipipe.planning.devices import choose_device, choose_dtype
from mpipipe.planning.inputs import read_model
from mpipipe.run_folder.files import claim_run_folder, holds_run
from mpipipe.run_folder.lock import lock_folder
from mpipipe.run_folder.resume import (
    DTYPE,
    Earlier,
    earlier_basis,
    read_earlier,
    wants_resume,
)
from mpipipe.runtime.ranks import in_phase
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.planning.inputs import ModelFacts
    from mpipipe.planning.resources import RankResources
    from mpipipe.run_folder.lock import FolderLock
    from mpipipe.runtime.ranks import Ranks
    from mpipipe.topology.slurm import SlurmJob

__all__ = ["Claim", "claim", "claim_folder", "read_inputs"]

_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The run folder and what is to be done in it. On ranks but the head only the first two."""

    folder: Path
    done_code: int | None  # the exit code when nothing is left to do; None: something is
    earlier: Earlier = field(default_factory=Earlier)
    lines_left: Sequence[PromptLine] = ()
    index_of: Mapping[str, int] = field(default_factory=dict)  # id → position, of all prompts
    basis: Mapping[str, Any] = field(default_factory=dict)  # what decides the completions
    lock: FolderLock | None = None  # until the run has ended

    def close(self) -> None:
        """Let others into the folder."""
        if self.lock is not None:
            self.lock.close()

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier attempt had begun to generate (head)."""
        return self.earlier.basis is not None


def read_inputs(ranks: Ranks, loaded: LoadedConfig) -> tuple[ModelFacts | None, list[PromptLine]]:
    """Model facts and prompt lines, on the head; nothing elsewhere."""
    if not ranks.is_head:
        return None, []
    model = read_model(loaded)
    config = model.loaded.config
    path = Path(config.prompts.path) if config.prompts.path else None
    lines = read_prompts(path, config.generation, config.prompts.limit, loaded.inline_prompts)
    return model, lines


async def claim(
    ranks: Ranks,
    loaded: LoadedConfig,
    model: ModelFacts | None,
    lines: Sequence[PromptLine],
    hellos: Sequence[RankResources],
) -> Claim:
    """The run folder, chosen, locked and claimed by the head, the same on every rank.

    Raises:
        AgreedError: it cannot be used, or not resumed.
    """

    def work() -> Claim | None:
        if model is None:
            return None
        basis = completions_basis(loaded, model, _dtype(loaded, model, hellos))
        return claim_folder(loaded, lines, basis, read_job(os.environ))

    # As long as it takes: all earlier completions are read, and the prompts once more.
    claimed = await in_phase(ranks, "output", work)
    payload = None
    if claimed is not None:
        payload = json.dumps([str(claimed.folder), claimed.done_code]).encode()
    folder, done_code = json.loads(await ranks.mesh.broadcast("output", payload, _DEADLINE_S))
    return claimed or Claim(Path(folder), done_code)


def _dtype(loaded: LoadedConfig, model: ModelFacts, hellos: Sequence[RankResources]) -> str:
    """What the plan is going to compute in."""
    config = loaded.config
    device, _ = choose_device(config.pipeline, hellos)
    return choose_dtype(config.model.dtype, model.spec.dtype, device, hellos)[0]


def claim_folder(
    loaded: LoadedConfig,
    lines: Sequence[PromptLine],
    basis: Mapping[str, Any],
    job: SlurmJob | None,
) -> Claim:
    """The run folder of these settings in `job`, and what is left to do of `lines`; head only.

    Raises:
        ConfigError: an earlier run was asked for, and nothing says which.
        OutputError: the folder cannot be used, or not resumed.
    """
    output = loaded.config.output
    auto = output.dir == AUTO
    index_of = {line.prompt_id: line.index for line in lines}
    folder = (_auto_folder(loaded, basis, job) if auto else Path(output.dir)).absolute()
    lock = lock_folder(folder, job)
    try:
        resume = wants_resume(output.resume, folder, job)
        claim_run_folder(folder, overwrite=output.overwrite, resume=resume)
        earlier = read_earlier(folder, basis, index_of) if resume else Earlier()
    except BaseException:
        lock.close()
        raise
    kept = earlier.records
    left = [line for line in lines if line.prompt_id not in kept.checksums]
    done_code = None if left else EXIT_PROMPTS if kept.num_failed else EXIT_OK
    return Claim(folder, done_code, earlier, left, index_of, basis, lock)


def _auto_folder(loaded: LoadedConfig, basis: Mapping[str, Any], job: SlurmJob | None) -> Path:
    """By date and time; in a job by its id, so that it is found again when the job is requeued.

    Further runs of one job are numbered from 2 on.
    """
    name, resume = loaded.config.name, loaded.config.output.resume
    if job is None:
        if resume is True:
            raise ConfigError(
                'output.resume = true, but output.dir = "auto" begins a new folder every time: set '
                "output.dir to the folder of the run to go on with"
            )
        return Path(f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    first = f"{name}-{job.label}"
    folders = (Path("runs", f"{first}.{n}" if n > 1 else first) for n in itertools.count(1))
    earlier = list(itertools.takewhile(holds_run, folders))
    if resume is True or (resume == AUTO and job.num_restarts > 0):
        bases = {folder: earlier_basis(folder) for folder in earlier}
        # What ended while it booted is anybody's. Another dtype is refused later, with a sentence.
        wanted = {**basis, DTYPE: None}
        for folder, found in bases.items():
            if found is None or found == basis:
                return folder
        for folder, found in bases.items():
            if {**(found or {}), DTYPE: None} == wanted:
                return folder
    return Path("runs", f"{first}.{len(earlier) + 1}" if earlier else first)
