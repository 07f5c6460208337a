"""The folder that a run acquires, new or resumed, and what is left to do in it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.config.schema import AUTO
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS, ConfigError
from mpipipe.metrics.identity import RunIdentity, new_run_id
from mpipipe.planning.devices import choose_device, choose_dtype
from mpipipe.run_folder.files import holds_run, prepare_run_folder
from mpipipe.run_folder.fingerprint import DTYPE, completions_fingerprint
from mpipipe.run_folder.history import last_logged, told_attempts
from mpipipe.run_folder.lock import lock_folder
from mpipipe.run_folder.resume import Earlier, earlier_fingerprint, read_earlier, wants_resume
from mpipipe.runtime.ranks import in_phase
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.planning.layout import Place
    from mpipipe.run_folder.lock import FolderLock
    from mpipipe.runtime.startup import Joined
    from mpipipe.topology.slurm import SlurmJob

__all__ = ["Acquired", "acquire", "acquire_folder"]

_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Acquired:
    """The run folder and what is to be done in it. On ranks but the head only the first four."""

    folder: Path
    done_code: int | None  # the exit code when nothing is left to do; None: something is
    run: str  # the id of the run, made at its first attempt
    attempt: int  # counted from 1
    earlier: Earlier = field(default_factory=Earlier)
    lines_left: Sequence[PromptLine] = ()
    index_of: Mapping[str, int] = field(default_factory=dict)  # id → position, of all prompts
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # what decides the completions
    lock: FolderLock | None = None  # until the run has ended

    def close(self) -> None:
        """Let others into the folder."""
        if self.lock is not None:
            self.lock.close()

    def identity(self, rank: int, place: Place) -> RunIdentity:
        """What every line that `rank` writes begins with."""
        job = read_job(os.environ)
        label = job.label if job is not None else None
        where = {"replica": place.replica, "rank": rank, "stage": place.stage}
        return RunIdentity(self.run, self.attempt, label, **where)

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier attempt had begun to generate (head)."""
        return self.earlier.fingerprint is not None


async def acquire(joined: Joined[list[PromptLine]]) -> Acquired:
    """The run folder, chosen, locked and acquired by the head, the same on every rank.

    Raises:
        AgreedError: it cannot be used, or not resumed.
    """
    ranks, loaded, model = joined.ranks, joined.loaded, joined.model

    def work() -> Acquired | None:
        if model is None:
            return None
        # As the plan is going to choose them.
        device, _ = choose_device(loaded.config.pipeline, joined.resources)
        dtype, _ = choose_dtype(
            loaded.config.model.dtype, model.spec.dtype, device, joined.resources
        )
        fingerprint = completions_fingerprint(loaded, model, dtype)
        return acquire_folder(loaded, joined.inputs or (), fingerprint, read_job(os.environ))

    # As long as it takes: all earlier completions are read, and the prompts once more.
    acquired = await in_phase(ranks, "output", work)
    payload = None
    if acquired is not None:
        told = [str(acquired.folder), acquired.done_code, acquired.run, acquired.attempt]
        payload = json.dumps(told).encode()
    folder, *rest = json.loads(await ranks.mesh.broadcast("output", payload, _DEADLINE_S))
    return acquired or Acquired(Path(folder), *rest)


def acquire_folder(
    loaded: LoadedConfig,
    lines: Sequence[PromptLine],
    fingerprint: Mapping[str, Any],
    job: SlurmJob | None,
) -> Acquired:
    """The run folder of these settings in `job`, and what is left to do of `lines`; head only.

    Raises:
        ConfigError: an earlier run was asked for, and nothing says which.
        OutputError: the folder cannot be used, or not resumed.
    """
    output = loaded.config.output
    auto = output.dir == AUTO
    index_of = {line.prompt_id: line.index for line in lines}
    folder = (_auto_folder(loaded, fingerprint, job) if auto else Path(output.dir)).absolute()
    lock = lock_folder(folder, job)
    try:
        resume = wants_resume(output.resume, folder, job)
        prepare_run_folder(folder, overwrite=output.overwrite, resume=resume)
        earlier = read_earlier(folder, fingerprint, index_of) if resume else Earlier()
        told = told_attempts(folder, earlier.attempts, earlier.records)
        logged_attempt, logged_run = last_logged(folder)
    except BaseException:
        lock.close()
        raise
    kept = earlier.records
    left = [line for line in lines if line.prompt_id not in kept.checksums]
    done_code = None if left else EXIT_PROMPTS if kept.num_failed else EXIT_OK
    return Acquired(
        folder,
        done_code,
        earlier.run or logged_run or new_run_id(),
        max([logged_attempt, *(entry["attempt"] for entry in told)]) + 1,
        replace(earlier, attempts=told),
        left,
        index_of,
        fingerprint,
        lock,
    )


def _auto_folder(
    loaded: LoadedConfig, fingerprint: Mapping[str, Any], job: SlurmJob | None
) -> Path:
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
        fingerprints = {folder: earlier_fingerprint(folder) for folder in earlier}
        # What ended while it booted is anybody's. Another dtype is refused later, with a sentence.
        wanted = {**fingerprint, DTYPE: None}
        for folder, found in fingerprints.items():
            if found is None or found == fingerprint:
                return folder
        for folder, found in fingerprints.items():
            if {**(found or {}), DTYPE: None} == wanted:
                return folder
    return Path("runs", f"{first}.{len(earlier) + 1}" if earlier else first)
