"""From the words of the command to the matrix of an experiment; makes its prompts if asked to.

Reads the configuration, the model's `config.json` and the prompt file; starts nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipipe._version import __version__
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.checkpoint.vocabulary import Vocabulary
from mpipipe.config.load import LoadedConfig, load_config, to_dict
from mpipipe.config.prompt_file import STANDARD_INPUT, prompts_hash
from mpipipe.config.prompts import configured_prompts
from mpipipe.config.schema import AUTO
from mpipipe.errors import ConfigError, PlanError, UnsupportedModelError
from mpipipe.experiments.folder import ExperimentFolder
from mpipipe.experiments.matrix import (
    VARIED,
    ExperimentOptions,
    launch_order,
    make_cases,
    num_prompts_needed,
)
from mpipipe.experiments.prompts import prompt_file
from mpipipe.experiments.record import SCHEMA, Matrix
from mpipipe.planning.arrangements import cuts_of
from mpipipe.planning.model_facts import ModelFacts, read_model
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.run_folder.files import write_whole

__all__ = ["added_words", "experiment_matrix", "possible_arrangements"]

# Every prompt to its full length, and the most likely token each time: equal work, equal tokens.
_FIXED = {
    "generation.temperature": "0.0",
    "generation.ignore_eos": "true",
    "generation.use_model_defaults": "false",
    "log.progress": "none",
    "log.sample_interval_s": "1.0",  # runs of some seconds have samples, too
}
_UNCOMPARED = ("output.", "log.", "name", "prompts.path", "prompts.limit")


def added_words(words: Sequence[str]) -> tuple[str, ...]:
    """What makes runs comparable, unless `words` say it themselves.

    Raises:
        ConfigError: they set what the experiment varies.
    """
    named = {word.partition("=")[0].strip() for word in words if "=" in word}
    for name in VARIED:
        if name in named:
            raise ConfigError(
                f"{name} is what the experiment sets for each case: leave it out, and use "
                "--stages, --replicas, --tensor-parallel, --batch, --prompts and --out"
            )
    return tuple(f"{name}={value}" for name, value in _FIXED.items() if name not in named)


def experiment_matrix(
    folder: ExperimentFolder,
    config: Path,
    words: Sequence[str],
    options: ExperimentOptions,
    command: Sequence[str],
    *,
    threads: int | None = None,
) -> Matrix:
    """The matrix that this command asks for; generated prompts are in its folder afterwards.

    Args:
        folder: of the experiment.
        config: configuration file or model.
        words: settings beside it.
        options: what the experiment varies.
        command: that makes it again.
        threads: of every rank in every case, unless the configuration says; None: `auto`.

    Raises:
        MpipipeError: what `mpipipe run` would refuse, or the cases cannot be made.
    """
    asked = _asked(folder, config, words, options, threads)
    settings = _settings(asked.loaded)
    cases = make_cases(options, asked.num_prompts, asked.words)
    matrix = Matrix(
        schema=SCHEMA,
        experiment=options.experiment,
        config=str(config),
        words=tuple(words),
        settings=settings,
        config_hash=_hash(settings),
        prompts_hash=asked.prompts_hash,
        cases=cases,
        repeat=options.repeat,
        seed=options.seed,
        order=launch_order(cases, options.repeat, options.seed),
        timeout_s=options.timeout_s,
        command=tuple(command),
        version=__version__,
    )
    folder.keep_matrix(matrix)
    if asked.made_prompts is not None and not folder.prompts_path.exists():
        write_whole(folder.prompts_path, asked.made_prompts)
    return matrix


@dataclass(frozen=True, slots=True)
class _Asked:
    """The configuration of all cases, and its prompts."""

    loaded: LoadedConfig
    words: tuple[str, ...]  # of every case, beside those that were given
    num_prompts: int
    prompts_hash: str
    made_prompts: bytes | None  # None: they are the configuration's own


def _asked(
    folder: ExperimentFolder,
    config: Path,
    words: Sequence[str],
    options: ExperimentOptions,
    threads: int | None,
) -> _Asked:
    added = added_words(words)
    model = read_model(load_config(config, (*words, *added)))
    made = None
    if options.prompt_tokens:
        _check_no_prompts(words)
        _check_length(model, options)
        added = (*added, f"prompts.path={folder.prompts_path.absolute()}")
        made = _generated(model, options)
        num_prompts, digest = num_prompts_needed(options), hashlib.sha256(made).hexdigest()
    else:
        num_prompts, digest = _given_prompts(model.loaded)
    if threads is not None and model.loaded.config.pipeline.threads_per_rank == AUTO:
        added = (*added, f"pipeline.threads_per_rank={threads}")
    loaded = load_config(config, (*words, *added))
    _check_split(loaded, options)
    _check_lanes(loaded, options)
    return _Asked(loaded, added, num_prompts, digest, made)


def _check_no_prompts(words: Sequence[str]) -> None:
    """A prompt file is what `--prompt-tokens` replaces."""
    given = [word for word in words if "=" not in word or word.startswith("prompts.path=")]
    if given:
        raise ConfigError(
            f"--prompt-tokens makes the prompts, and {given[0]} is given too: leave one of them out"
        )


def _check_length(model: ModelFacts, options: ExperimentOptions) -> None:
    if not options.num_prompts:
        raise ConfigError("--prompt-tokens makes prompts, but not how many: add --prompts")
    config = model.loaded.config
    asked = config.memory.max_context_tokens
    limit = asked if isinstance(asked, int) else model.spec.max_context_tokens
    wanted = options.prompt_tokens + config.generation.max_new_tokens
    if wanted > limit:
        raise ConfigError(
            f"prompts of {options.prompt_tokens} tokens and {config.generation.max_new_tokens} new "
            f"ones come to {wanted}, and the model takes {limit}: lower --prompt-tokens or "
            "generation.max_new_tokens"
        )


def _generated(model: ModelFacts, options: ExperimentOptions) -> bytes:
    return prompt_file(
        Vocabulary.of(model.folder, model.spec),
        num_prompts=num_prompts_needed(options),
        num_tokens=options.prompt_tokens,
        seed=options.seed,
    )


def _given_prompts(loaded: LoadedConfig) -> tuple[int, str]:
    """How many the configuration's own prompts are, and a hash of them."""
    path = loaded.config.prompts.path
    if path == STANDARD_INPUT:
        raise ConfigError(
            'prompts.path = "-": an experiment reads its prompts many times; write them to a file'
        )
    lines = configured_prompts(loaded)
    broken = next((line for line in lines if line.error is not None), None)
    if broken is not None:
        raise ConfigError(
            f"the prompt {broken.prompt_id!r} would become an error record ({broken.error}): an "
            "experiment needs prompts that all complete"
        )
    if path:
        return len(lines), prompts_hash(Path(path))
    text = json.dumps(loaded.inline_prompts, sort_keys=True)
    return len(lines), hashlib.sha256(text.encode()).hexdigest()


def _check_split(loaded: LoadedConfig, options: ExperimentOptions) -> None:
    split = loaded.config.pipeline.split
    stages = sorted({place.stages for place in options.places})
    if isinstance(split, tuple) and stages != [len(split)]:
        raise ConfigError(
            f"pipeline.split = {list(split)} is for {len(split)} stages, and the experiment has "
            f"{', '.join(map(str, stages))}: set pipeline.split=auto"
        )


def _check_lanes(loaded: LoadedConfig, options: ExperimentOptions) -> None:
    """What the configuration asks for, and each case would overrule."""
    num_lanes = loaded.config.pipeline.tensor_parallel
    if num_lanes > 1 and num_lanes != options.lanes and not options.arrangements:
        raise ConfigError(
            f"pipeline.tensor_parallel = {num_lanes}, and the cases have {options.lanes}: give "
            f"--tensor-parallel {num_lanes}, or set pipeline.tensor_parallel=1"
        )


def possible_arrangements(
    config: Path, words: Sequence[str], num_ranks: int
) -> tuple[tuple[int, int, int], ...]:
    """Replicas, stages and lanes: every way to use so many ranks that the model's shapes allow.

    Whether its memory does is for the runs to find.

    Raises:
        MpipipeError: what `mpipipe run` would refuse.
    """
    spec = read_model(load_config(config, (*words, *added_words(words)))).spec
    return tuple(cut for cut in cuts_of(num_ranks) if _allows(spec, *cut))


def _allows(spec: ModelSpec, _replicas: int, stages: int, lanes: int) -> bool:
    try:
        lane_spec(spec, lanes)
    except (PlanError, UnsupportedModelError):
        return False
    return stages <= spec.num_layers


def _settings(loaded: LoadedConfig) -> Mapping[str, Any]:
    """All settings that may not change, flat."""
    flat: dict[str, Any] = {}
    for section, values in to_dict(loaded.config).items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return {name: value for name, value in flat.items() if not name.startswith(_UNCOMPARED)}


def _hash(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
