"""The folder of a job on a cluster: copies of what it reads, a place for what it writes.

Layout: `config/` (the configuration with every file that it builds on), `prompts/`, `outputs/` (the
run folder), `job.env` (what `launch/run.sh` sources), `request.json` (what was asked for, and in
which attempt of the job last), `scontrol.txt` (the job as Slurm described it when run.sh began).
The model is not read and no rank is started.

Invariants: `job.env` is written last, so a folder that has it is complete; a job that Slurm starts
again finds the folder of each of its commands, once an attempt, and reads the same copies, whatever
was edited meanwhile. Paths in it are absolute. Needs neither torch nor MPI, and nothing is fetched.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.config.prompt_file import STANDARD_INPUT
from mpipipe.errors import ConfigError, OutputError
from mpipipe.planning.model_facts import model_folder
from mpipipe.run_folder.files import write_json, write_whole
from mpipipe.topology.slurm import job_record, sbatch_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.topology.slurm import SlurmJob

__all__ = [
    "JOB_FILE",
    "OUTPUT_FOLDER",
    "how_to_go_on",
    "job_workspace",
    "prepare_workspace",
    "recorded_job",
]

JOB_FILE = "job.env"
OUTPUT_FOLDER = "outputs"
_RECORD_FILE = "scontrol.txt"  # what Slurm said of the job when run.sh began
_REQUEST_FILE = "request.json"


def job_workspace(config: Path, overrides: Sequence[str], scratch: Path, job: SlurmJob) -> Path:
    """The folder of this command of `job` below `scratch`, filled; returns its `job.env`.

    `<config>-<job>`, for further commands of the job `<config>.2-<job>` and so on. The same command
    in a later attempt of the job finds its folder again, once an attempt.

    Raises:
        ConfigError: the configuration is wrong, or the words name another run folder.
        CheckpointError: the demo model was not fetched before.
        OutputError: the folder could not be filled.
    """
    for word in overrides:
        if word.startswith("output.dir="):
            raise ConfigError(
                f"{word}: a Slurm job writes to its own folder, below MPIPIPE_SCRATCH; to go on "
                "with an earlier job, give its folder in the place of the configuration: "
                "sbatch launch/submit.sbatch FOLDER"
            )
    asked = {"config": str(config.absolute()), "words": list(overrides)}
    for number in itertools.count(1):
        name = config.stem if number == 1 else f"{config.stem}.{number}"
        folder = scratch.absolute() / f"{name}-{job.label}"
        earlier = _request(folder)
        if earlier is None:
            prepare_workspace(config, overrides, folder)
            break
        attempt = earlier.pop("attempt", 0)
        # One without a request was made by an older version, or just before the node was lost.
        if attempt < job.num_restarts and (earlier == asked or not earlier):
            break
    write_json(folder / _REQUEST_FILE, {**asked, "attempt": job.num_restarts})
    return folder / JOB_FILE


def _request(folder: Path) -> dict[str, Any] | None:
    """What `folder` was made for; None: it is not made, or not to its end."""
    if not (folder / JOB_FILE).exists():
        return None
    try:
        request = json.loads((folder / _REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # it is not known which command made it
    return request if isinstance(request, dict) else {}


def how_to_go_on(folder: Path) -> str:
    """What a user does to complete the rest of the run in `folder`."""
    if folder.name == OUTPUT_FOLDER and (folder.parent / JOB_FILE).exists():
        options = sbatch_options(recorded_job(folder))
        return shlex.join(["sbatch", *options, "launch/submit.sbatch", str(folder.parent)])
    return "start it again with the same output.dir and output.resume=true"


def recorded_job(folder: Path) -> dict[str, str]:
    """What Slurm said of the job that runs, or ran last, in the run folder `folder`.

    As fields of `scontrol show job`; empty: no job, or no run.sh that wrote it down.
    """
    try:
        text = (folder.parent / _RECORD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return job_record(text)


def prepare_workspace(config: Path, overrides: Sequence[str], folder: Path) -> Path:
    """Fill `folder` for a run of `config` under `overrides`; returns its `job.env`.

    `job.env` sets, for bash: `config` (the copy), `models` (folders to bind read-only: the model,
    and the tokenizer where it is apart), `words` (the overrides, and the paths to the copies) and
    `profiler` (`profile.tool`).

    Raises:
        ConfigError: the configuration is wrong, or it names no model.
        CheckpointError: the demo model was not fetched before.
        OutputError: the prompts or the configuration could not be copied.
    """
    loaded = load_config(config, overrides)
    if not loaded.sources:
        raise ConfigError(
            f"{config} is no configuration file, which a Slurm job starts from: write one with "
            f'model.path = "{config}" and prompts.path'
        )
    if loaded.config.prompts.path == STANDARD_INPUT:
        raise ConfigError(
            'prompts.path = "-": a Slurm job has no standard input, and may be started again: '
            "write the prompts to a file"
        )
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
    except OSError as error:
        raise OutputError(
            f"the job's folder {folder} could not be filled ({error}): check that the file exists "
            "and that MPIPIPE_SCRATCH is a folder you can write to"
        ) from error
    lines = _job_lines(copy, models, words, loaded.config.profile.tool)
    write_whole(folder / JOB_FILE, lines.encode())
    return folder / JOB_FILE


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


def _job_lines(config: Path, models: Sequence[Path], words: Sequence[str], profiler: str) -> str:
    return (
        "# shellcheck shell=bash\n"
        "# Written by `mpipipe slurm workspace`, sourced by launch/run.sh.\n"
        f"config={shlex.quote(str(config))}\n"
        f"models=({shlex.join(map(str, models))})\n"
        f"words=({shlex.join(words)})\n"
        f"profiler={profiler}\n"
    )
