"""Jobs whose first attempt does not come to its end, however long a test takes to touch it.

After some completions each step of the head sleeps, so that what happens to a job happens in its
middle on any machine. An attempt after a requeue is a run as any other, and of an array's tasks all
but the one that has the array's own id. `GATE` names a file without which no Python of the job goes
on: of a held job in a later attempt, so that a test can look at what the first one left, else from
its start. A job's Python imports this module when `HELD` is in its environment: `prepare` writes a
`sitecustomize` for it, `environ` and `behind` put it in the way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.slowed.after_import import after_import, before_each_step

__all__ = ["behind", "environ", "hold", "prepare"]

# A step in flight delays the answer to a stop by so much; some hundred steps are left, always.
STEP_S = 0.2
GATE_LIMIT_S = 300.0  # a test that has failed opens none
_ROOT = Path(__file__).parents[2]
_SITECUSTOMIZE = f"""\
import os, sys, time
told = os.environ.get
own = told("SLURM_ARRAY_JOB_ID") in (None, told("SLURM_JOB_ID"))
first = told("SLURM_RESTART_COUNT", "0") == "0"
if "GATE" in os.environ and not ("HELD" in os.environ and first):
    until_s = time.monotonic() + {GATE_LIMIT_S}
    while not os.path.exists(os.environ["GATE"]) and time.monotonic() < until_s:
        time.sleep(0.05)
if "HELD" in os.environ and own and first:
    sys.path.append({str(_ROOT)!r})  # last: what is installed is what runs
    from tests.slurm.held import hold
    hold(int(os.environ["HELD"]))
"""


def prepare(folder: Path) -> None:
    """Write to `folder` what `environ` names."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)


def environ(folder: Path, num_completions: int, gate: Path | None = None) -> Mapping[str, str]:
    """The environment of a job that is held once it has so many completions.

    Its later attempts do not begin before `gate` exists, where one is given.
    """
    held = {"HELD": str(num_completions), "PYTHONPATH": _path(folder)}
    return held if gate is None else {**held, "GATE": str(gate)}


def behind(folder: Path, gate: Path) -> Mapping[str, str]:
    """The environment of a job that does not begin before `gate` exists."""
    return {"GATE": str(gate), "PYTHONPATH": _path(folder)}


def _path(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def hold(num_completions: int) -> None:
    """The rank that writes the journal sleeps in each step once it has written so many."""
    num_written = 0

    def count(module: ModuleType) -> None:
        write = module.CompletionWriter.write

        def counted(self: Any, completion: Any) -> None:
            nonlocal num_written
            write(self, completion)
            num_written += 1

        module.CompletionWriter.write = counted

    after_import("mpipipe.run_folder.journal", count)
    is_held = before_each_step(lambda: STEP_S if num_written >= num_completions else 0.0)
    after_import("mpipipe.stage.engine", is_held)
