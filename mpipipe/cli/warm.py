"""`mpipipe warm`: fills the caches of later starts, and says what this one took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["warm"]

_CONFIG = "What `mpipipe run` will get: a configuration or a model folder."
_WORDS = "A prompt file, and settings that win over the configuration."


def warm(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|MODEL", help=_CONFIG)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help=_WORDS)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compile kernels and keep the tokenizer ahead of a run, under the same mpirun or srun.

    Kernels go to TRITON_CACHE_DIR (default ~/.triton/cache), the tokenizer to MPIPIPE_CACHE.
    """
    from mpipipe.cli.warming import warm_command

    raise typer.Exit(warm_command(config, overrides or [], debug=debug))
