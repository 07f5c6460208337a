"""Reading the JSON files of a model folder: one place for the ways they can be broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpipipe.errors import CheckpointError

__all__ = ["LFS_MAGIC", "read_json_object", "require_content"]

LFS_MAGIC = b"version https://git-lfs"  # how a git-lfs pointer file begins


def require_content(path: Path) -> None:
    """Raises CheckpointError when `path` is empty or only a git-lfs pointer to the real file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path} is empty: the copy was cut off; copy the file again")
    if start == LFS_MAGIC:
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in the folder "
            "it was cloned to, and copy again"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        CheckpointError: missing, empty, a pointer, not UTF-8, not JSON, or no object.
    """
    require_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): the copy was cut off, or the file was edited"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content
