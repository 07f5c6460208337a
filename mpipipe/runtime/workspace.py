"""The folder of a job on a cluster: copies of what it reads, a place for what it writes.

Layout: `config/` (the configuration with every file that it builds on), `prompts/`, `outputs/` (the
run folder), `job.env` (what `launch/run.sh` sources). Not here: reading the model, starting ranks.

Invariants: `job.env` is written last, so a folder that has it is complete; a job that Slurm starts
again finds it and reads the same copies, whatever was edited meanwhile. Paths in it are absolute.
Needs neither torch nor MPI, and nothing is fetched.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.errors import OutputError
from mpipipe.runtime.model_folder import model_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["JOB_FILE", "OUTPUT_FOLDER", "prepare_workspace"]

JOB_FILE = "job.env"
OUTPUT_FOLDER = "outputs"


def prepare_workspace(config: Path, overrides: Sequence[str], folder: Path) -> Path:
    """Fill `folder` for a run of `config` under `overrides`; returns its `job.env`.

    `job.env` sets, for bash: `config` (the copy), `models` (folders to bind read-only: the model,
    and the tokenizer where it is apart) and `words` (the overrides, and the paths to the copies).

    Raises:
        ConfigError: the configuration is wrong, or it names no model.
        CheckpointError: the demo model was not fetched before.
        OutputError: the prompts or the configuration could not be copied.
    """
    loaded = load_config(config, overrides)
    model = model_folder(loaded)
    models, words = [model], [*overrides, f"model.path={model}"]
    if loaded.config.model.tokenizer_path:
        tokenizer = Path(loaded.config.model.tokenizer_path).absolute()
        models.append(tokenizer)
        words.append(f"model.tokenizer_path={tokenizer}")
    folder = folder.absolute()
    try:
        copy = _copy_tree(_config_files(loaded), folder / "config", config)
        prompts = loaded.config.prompts.path
        if prompts:
            words.append(f"prompts.path={_copy(Path(prompts), folder / 'prompts')}")
        (folder / OUTPUT_FOLDER).mkdir(parents=True, exist_ok=True)
        words.append(f"output.dir={folder / OUTPUT_FOLDER}")
        job_file = folder / JOB_FILE
        partial = folder / f"{JOB_FILE}.partial"
        partial.write_text(_job_lines(copy, models, words), encoding="utf-8")
        partial.replace(job_file)
    except OSError as error:
        raise OutputError(
            f"the job's folder {folder} could not be filled ({error}): check that the file exists "
            "and that MPIPIPE_SCRATCH is a folder you can write to"
        ) from error
    return job_file


def _config_files(loaded: LoadedConfig) -> list[Path]:
    """Every file that the configuration was read from."""
    files = [path.absolute() for path in loaded.sources]
    if loaded.deepspeed is not None:
        files.append(loaded.deepspeed.path.absolute())
    return files


def _copy_tree(files: Sequence[Path], target: Path, chosen: Path) -> Path:
    """Copy `files`, keeping where they lie relative to each other; returns the copy of `chosen`.

    `extends = "../base.toml"` in a copy then finds the copy of the base.
    """
    normal = [Path(os.path.normpath(path)) for path in files]
    root = Path(os.path.commonpath([path.parent for path in normal]))
    for path in normal:
        _copy(path, target / path.parent.relative_to(root))
    return target / Path(os.path.normpath(chosen.absolute())).relative_to(root)


def _copy(path: Path, target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, target / path.name))


def _job_lines(config: Path, models: Sequence[Path], words: Sequence[str]) -> str:
    return (
        "# shellcheck shell=bash\n"
        "# Written by `mpipipe slurm workspace`, sourced by launch/run.sh.\n"
        f"config={shlex.quote(str(config))}\n"
        f"models=({shlex.join(map(str, models))})\n"
        f"words=({shlex.join(words)})\n"
    )
