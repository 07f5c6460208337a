"""Do all ranks see the folders that rank 0 reads and writes? Asked before anything is loaded.

The head plans with its own view, and every rank reads weights at the same path and writes its log
into the same run folder. A folder that only one node has must be named, with the node that lacks
it. Copies of a model at the same path of every node are as good as one folder, if they are equal.

`checkpoint.index` checks that the model is whole; `job.acquire` acquires the run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError, OutputError
from mpipipe.runtime.ranks import in_phase, told_by_head
from mpipipe.topology.host import host_name

if TYPE_CHECKING:
    from mpipipe.planning.model_facts import ModelFacts
    from mpipipe.runtime.ranks import Ranks

__all__ = [
    "check_model_folder",
    "check_output_folder",
    "describe_model",
    "see_model",
    "see_output",
]

_SMALL_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKEN_FILE = ".seen_by_all_ranks"
# Network file systems show a new file late: NFS keeps a folder's entries for 30 to 60 s, but looks
# again when a file that it does not know is opened.
_SEEN_LIMIT_S = 15.0
_LOOK_AGAIN_S = 0.2
_NOT_SHARED = "most likely the nodes do not share this folder"

Described = Mapping[str, str]  # of a file's name: its size, and of small files what is in them


async def check_model_folder(ranks: Ranks, model: ModelFacts | None) -> None:
    """Every rank sees the head's model folder as the head does.

    Raises:
        AgreedError: a rank does not; CheckpointError, names rank, host and path.
    """

    def describe() -> bytes:
        assert model is not None, "the head has read it"
        with_weights = model.loaded.config.model.weights != "random"
        files = describe_model(model.folder, with_weights=with_weights)
        return json.dumps([str(model.folder), host_name(), files]).encode()

    folder, head_host, files = json.loads(await told_by_head(ranks, "model folder", describe))

    def look() -> None:
        if not ranks.is_head:
            see_model(Path(folder), files, head_host)

    await in_phase(ranks, "model seen", look)


async def check_output_folder(ranks: Ranks, folder: Path) -> None:
    """Every rank sees the run folder that the head has acquired, and can write its log there.

    Raises:
        AgreedError: a rank does not; OutputError, names rank, host and path.
    """
    token_path = folder / _TOKEN_FILE

    def leave_token() -> bytes:
        token = secrets.token_hex(16)
        try:
            token_path.write_text(token)
        except OSError as error:
            raise OutputError(
                f"output.dir = {folder} cannot be written ({error.strerror}): choose another folder"
            ) from error
        return json.dumps([token, host_name()]).encode()

    try:
        token, head_host = json.loads(await told_by_head(ranks, "run folder", leave_token))
        await in_phase(
            ranks,
            "run folder seen",
            lambda: see_output(folder, token, head_host, ranks.mesh.rank),
        )
    finally:
        if ranks.is_head:
            with suppress(OSError):
                token_path.unlink()


def describe_model(folder: Path, *, with_weights: bool) -> dict[str, str]:
    """What tells two copies of a model apart, by file name. Reads small files only.

    Raises:
        CheckpointError: a file cannot be read, or the weights are incomplete.
    """
    described = {}
    for name in _SMALL_FILES:
        if (folder / name).exists():
            described[name] = _look_at(folder / name, with_content=True)
    if with_weights:
        for path in read_index(folder).files:
            described[path.name] = _look_at(path, with_content=False)
    return described


def see_model(folder: Path, files: Described, head_host: str) -> None:
    """Compare this rank's view of the model folder with the head's.

    Raises:
        CheckpointError: the folder or a file is missing, unreadable or another one.
    """
    remedy = (
        "put the model on a file system that every node has at this path, or copy it to the same "
        "path on each node"
    )
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no model folder {folder} here, which rank 0 on {head_host} reads: "
            f"{_NOT_SHARED}; {remedy}"
        )
    for name, described in files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"the model folder {folder} has no {name} here, which rank 0 on {head_host} reads: "
                f"{_NOT_SHARED}, and its copy here is incomplete; {remedy}"
            )
        seen = _look_at(path, with_content=name in _SMALL_FILES)
        if seen != described:
            raise CheckpointError(
                f"{path} is another file here ({seen}) than for rank 0 on {head_host} "
                f"({described}): {_NOT_SHARED}, and its copies differ; {remedy}"
            )


def see_output(
    folder: Path,
    token: str,
    head_host: str,
    rank: int,
    *,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Find what the head has left in the run folder, and open this rank's log there.

    Raises:
        OutputError: it is not there, or the log cannot be written.
    """
    until_s = now_s() + _SEEN_LIMIT_S
    while _read_token(folder) != token:
        if now_s() >= until_s:
            raise OutputError(
                f"output.dir = {folder} is not the folder here that rank 0 on {head_host} has made "
                f"(looked for {_SEEN_LIMIT_S:g} s): {_NOT_SHARED}; set output.dir to a folder on a "
                "file system of all nodes"
            )
        sleep(_LOOK_AGAIN_S)
    log = folder / f"rank_{rank}.log"
    try:
        log.open("a").close()
    except OSError as error:
        raise OutputError(
            f"{log} cannot be written ({error.strerror}): most likely this node has mounted the "
            "folder for reading only; set output.dir to a folder that every node can write"
        ) from error


def _read_token(folder: Path) -> str | None:
    """What the head has left; listing the folder first makes NFS look again."""
    with suppress(OSError, UnicodeDecodeError):
        os.listdir(folder)
        return (folder / _TOKEN_FILE).read_text()
    return None


def _look_at(path: Path, *, with_content: bool) -> str:
    try:
        size = path.stat().st_size
        if with_content:
            return f"{size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        with path.open("rb"):
            return f"{size:,} bytes"
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): give the user of the job the right to read "
            "it on every node"
        ) from error
