"""`mpipipe warm`: a start without a run, which fills the caches that later starts use.

It boots as `mpipipe run` with the same words and ranks would, so that it compiles the very kernels
of that run's plan and keeps its tokenizer, and ends where the run would begin to generate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.metrics.log import NullLog
from mpipipe.runtime.requests import Prepared, expected_workload, prepare_text, tokenize
from mpipipe.runtime.startup import joined_ranks, loaded_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.config.prompts import PromptLine
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.planning.model_facts import ModelFacts

__all__ = ["warm_up"]


async def warm_up(
    config_path: Path,
    overrides: Sequence[str],
    boot: BootTimeline,
    tell: Callable[[BootTimeline, str], object],
    *,
    debug: bool,
) -> None:
    """Boot and end, on every rank; `tell` gets the finished boot of rank 0, and what kept kernels
    from being compiled ahead (empty: nothing).

    Without configured prompts the plan is made for unknown ones, as the library's is.

    Raises:
        MpipipeError: what `mpipipe run` would refuse.
    """

    def load() -> LoadedConfig:
        return load_config(config_path, overrides)

    def read(model: ModelFacts) -> list[PromptLine]:
        return configured_prompts(model.loaded) if model.loaded.config.prompts.path else []

    joining = joined_ranks(boot.clock, load, read, expect=expected_workload, boot=boot, debug=debug)
    async with joining as joined:
        lines = joined.inputs or []

        def prepare(model: ModelFacts) -> Prepared:
            return tokenize(model, lines) if lines else prepare_text(model)

        log = _KernelsLog()
        async with loaded_session(joined, prepare, log) as (session, _):
            if not session.is_head:
                await session.serve_until_ended()
                return
            session.end()
            tell(boot, log.problem)


class _KernelsLog(NullLog):
    """Remembers what the process that compiles kernels has said."""

    problem = ""

    def info(self, event: str, **fields: object) -> None:
        if event == "kernels":
            self.problem = str(fields.get("problem", ""))
