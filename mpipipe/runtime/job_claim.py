"""What a run reads before it loads anything, and the folder that it claims, new or resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import AUTO
from mpipipe.errors import EXIT_OK, EXIT_PROMPTS
from mpipipe.runtime.inputs import read_model
from mpipipe.runtime.launch import in_phase
from mpipipe.runtime.manifest import completions_basis
from mpipipe.runtime.output import claim_run_folder
from mpipipe.runtime.resume import Earlier, check_basis, read_earlier, wants_resume
from mpipipe.topology.slurm import read_job

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.runtime.inputs import ModelFacts
    from mpipipe.runtime.launch import Ranks

__all__ = ["Claim", "claim", "read_inputs"]

_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The run folder and what is to be done in it. On ranks but the head only the first two."""

    folder: Path
    done_code: int | None  # the exit code when nothing is left to do; None: something is
    earlier: Earlier = field(default_factory=Earlier)
    lines_left: Sequence[PromptLine] = ()
    index_of: Mapping[str, int] = field(default_factory=dict)  # id → position, of all prompts

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier attempt had begun to generate (head)."""
        return self.earlier.basis is not None


def read_inputs(ranks: Ranks, loaded: LoadedConfig) -> tuple[ModelFacts | None, list[PromptLine]]:
    """Model facts and prompt lines, on the head; nothing elsewhere."""
    if not ranks.is_head:
        return None, []
    config = loaded.config
    path = Path(config.prompts.path) if config.prompts.path else None
    lines = read_prompts(path, config.generation, config.prompts.limit, loaded.inline_prompts)
    return read_model(loaded), lines


async def claim(
    ranks: Ranks, loaded: LoadedConfig, model: ModelFacts | None, lines: Sequence[PromptLine]
) -> Claim:
    """The run folder, chosen and claimed by the head, the same on every rank.

    Raises:
        AgreedError: it cannot be used, or not resumed.
    """
    claimed = await in_phase(
        ranks, "output", lambda: _claim(loaded, model, lines) if model else None, _DEADLINE_S
    )
    payload = None
    if claimed is not None:
        payload = json.dumps([str(claimed.folder), claimed.done_code]).encode()
    folder, done_code = json.loads(await ranks.mesh.broadcast("output", payload, _DEADLINE_S))
    return claimed or Claim(Path(folder), done_code)


def _claim(loaded: LoadedConfig, model: ModelFacts, lines: Sequence[PromptLine]) -> Claim:
    output = loaded.config.output
    resume = wants_resume(output.resume, os.environ)
    folder = Path(_auto_folder(loaded) if output.dir == AUTO else output.dir).absolute()
    claim_run_folder(folder, overwrite=output.overwrite, resume=resume)
    earlier = read_earlier(folder) if resume else Earlier()
    if earlier.basis is not None:
        check_basis(earlier.basis, completions_basis(loaded, model.folder), folder)
    left = [line for line in lines if line.prompt_id not in earlier.kept_ids]
    done_code = None if left else EXIT_PROMPTS if earlier.num_failed else EXIT_OK
    index_of = {line.prompt_id: line.index for line in lines}
    return Claim(folder, done_code, earlier, left, index_of)


def _auto_folder(loaded: LoadedConfig) -> str:
    """By date and time; and by job, as the tasks of an array start in the same second."""
    job = read_job(os.environ)
    suffix = "" if job is None else f"-{job.label}"
    return f"runs/{loaded.config.name}-{datetime.now():%Y%m%d-%H%M%S}{suffix}"
