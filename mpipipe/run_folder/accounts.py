"""What Slurm counted of the jobs of a run: `sacct_<job>.txt`, and `slurm` in `metrics.json`.

launch/run.sh writes the files, the last time within the job, which counts on until its end. So what
comes later asks again: the next attempt (run.sh), `mpipipe status` and `mpipipe report`. A job that
has no such file is not looked for. Nothing is changed while a job of the run has not ended, as its
run writes to the folder itself.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mpipipe.errors import OutputError
from mpipipe.run_folder.files import write_json, write_whole
from mpipipe.topology.command import Runner, run_child
from mpipipe.topology.slurm_account import ACCOUNT_FORMAT, account_of, all_ended, ask_account

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["follow_up_accounts", "read_accounts"]

_PREFIX = "sacct_"
_METRICS = "metrics.json"


def read_accounts(folder: Path) -> list[dict[str, Any]] | None:
    """Every ended attempt of the jobs of this run, as Slurm counted it; None: it counted none.

    The fields are those of `AccountedAttempt`.
    """
    attempts = [
        dataclasses.asdict(attempt)
        for text in _texts(folder).values()
        for attempt in account_of(text) or ()
    ]
    return attempts or None


def follow_up_accounts(folder: Path, run: Runner = run_child) -> None:
    """Ask Slurm again for the jobs that had not ended; then bring `metrics.json` up to date.

    Silent where there is nothing to ask, no answer, or a folder that cannot be written.
    """
    texts = _texts(folder)
    if not texts:
        return
    with suppress(OutputError, OSError):
        for path, text in texts.items():
            if all_ended(text):
                continue
            columns = text.splitlines()[0] if account_of(text) is not None else ACCOUNT_FORMAT
            job = path.stem.removeprefix(_PREFIX)
            answer = ask_account(job, columns.replace("|", ","), run)
            if not all_ended(answer):
                return
            write_whole(path, answer.encode())
        _tell_metrics(folder)


def _texts(folder: Path) -> dict[Path, str]:
    found = {}
    for path in sorted(folder.glob(f"{_PREFIX}*.txt")):
        with suppress(OSError):
            found[path] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _tell_metrics(folder: Path) -> None:
    """Nothing where there is no `metrics.json`, or one that cannot be read."""
    try:
        metrics = json.loads((folder / _METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    accounts = read_accounts(folder)
    if isinstance(metrics, dict) and metrics.get("slurm") != accounts:
        write_json(folder / _METRICS, {**metrics, "slurm": accounts})
