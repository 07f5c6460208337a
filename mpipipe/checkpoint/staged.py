"""What `mpipipe stage-model` leaves in a folder, as far as those who read models must know.

While it copies, `UNFINISHED_NAME` says what is done; `MANIFEST_NAME` takes its place as the last
act. So a copy that was broken off is told apart from a model, however much of it is there.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.errors import CheckpointError

__all__ = ["MANIFEST_NAME", "UNFINISHED_NAME", "require_finished"]

MANIFEST_NAME = "mpipipe-model.json"
UNFINISHED_NAME = ".mpipipe-staging.json"


def require_finished(folder: Path) -> None:
    """Raises CheckpointError while the copy in `folder` is not complete."""
    path = folder / UNFINISHED_NAME
    if not path.is_file() or (folder / MANIFEST_NAME).is_file():
        return
    command = f"mpipipe stage-model SRC {folder}"
    progress = ""
    with suppress(CheckpointError, KeyError, TypeError):  # damaged, or of another version
        told = read_json_object(path)
        progress = f" ({len(told['files'])} of {told['num_files']} files are there)"
        command = str(told["command"])
    raise CheckpointError(
        f"the copy in {folder} is not finished{progress}: it is being made, or was broken off; "
        f"go on with it: {command}"
    )
