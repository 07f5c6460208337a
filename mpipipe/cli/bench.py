"""`mpipipe bench …`: measurements of one part, and the rival's figure for comparison."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.bench.baseline import (
    BaselinePlace,
    BaselineResult,
    generate_with_transformers,
    open_baseline,
    time_with_transformers,
)
from mpipipe.bench.control import measure_control_plane
from mpipipe.bench.environment import SPEED_PACKAGES
from mpipipe.bench.workloads import BenchWork, Vocabulary, bench_requests
from mpipipe.clock import MonotonicClock
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.control_plane.probe import format_probe
from mpipipe.errors import ConfigError
from mpipipe.planning.model_facts import read_model
from mpipipe.progress import new_event_loop
from mpipipe.run_folder.files import prepare_run_folder
from mpipipe.run_folder.journal import CompletionWriter, merge
from mpipipe.runtime.requests import tokenize
from mpipipe.topology.packages import package_versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.config.load import LoadedConfig

__all__ = ["control_command", "transformers_command", "transformers_works_command"]


def control_command(*, debug: bool) -> int:
    """Measure messages between the ranks of this launch; the head prints a table.

    Raises:
        MpipipeError: fewer than two ranks, or MPI is not as needed.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        probe = runner.run(measure_control_plane(MonotonicClock(), debug=debug))
    if probe is not None:
        rows = [("", "mpipipe", "plain mpi4py"), *format_probe(probe)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return 0


def transformers_command(
    config_path: Path, overrides: Sequence[str], place: BaselinePlace, *, batch_size: int
) -> None:
    """Run the configured prompts through `transformers.generate` and print its throughput.

    Completions go to `output.dir` when it is set, in the form of a run's.

    Raises:
        MpipipeError: what `mpipipe run` would refuse.
    """
    place.check()
    model = read_model(load_config(config_path, overrides))
    loaded = model.loaded
    config = loaded.config
    lines = configured_prompts(loaded)
    if config.generation.temperature > 0:
        raise ConfigError(
            "bench transformers decodes greedily, so that tokens can be compared: set "
            "generation.temperature=0"
        )

    folder = Path(config.output.dir).absolute() if config.output.dir != "auto" else None
    if folder is not None:
        prepare_run_folder(folder, overwrite=config.output.overwrite)
    prepared = tokenize(model, lines)
    tokenizer, prompts = prepared.tokenizer, prepared.prompts
    assert tokenizer is not None, "tokenised with it"
    result = generate_with_transformers(
        model.folder,
        prompts.requests,
        dtype=_dtype(loaded),
        batch_size=batch_size or max(1, len(prompts.requests)),
        decode=tokenizer.decode,
        place=place,
        random=config.model.weights == "random",
    )
    print(_result_line(result, place))
    if folder is not None:
        with CompletionWriter(folder, 0) as writer:
            for completion in (*prompts.rejected, *result.completions):
                writer.write(completion)
        print(f"Completions in {merge(folder, writer.index_of, writer.written)}")


def transformers_works_command(
    config_path: Path,
    overrides: Sequence[str],
    words: Sequence[str],
    place: BaselinePlace,
    *,
    batch_size: int,
) -> None:
    """Time works of random tokens with transformers; prints one JSON line for each.

    Raises:
        MpipipeError: a wrong option, setting or model folder, or no GPU.
    """
    place.check()
    works = [BenchWork.parse(word) for word in words]
    loaded = load_config(config_path, overrides)
    facts = read_model(loaded)

    dtype = _dtype(loaded)
    random = loaded.config.model.weights == "random"
    model = open_baseline(facts.folder, dtype, place, random=random)
    # A None among generate's arguments does not win over the model's own generation settings.
    model.generation_config.eos_token_id = None
    vocabulary = Vocabulary.of(facts.folder, facts.spec)
    for work in works:
        requests = bench_requests(work, vocabulary, seed=0)
        record = {
            "peer": "transformers",
            "place": place.text,
            "work": work.name,
            **time_with_transformers(model, requests, batch_size=batch_size or work.num_prompts),
            "model": facts.folder.name,
            "dtype": dtype,
            "batch_size": batch_size or work.num_prompts,
            "versions": package_versions(SPEED_PACKAGES),
        }
        print(json.dumps(record), flush=True)


def _dtype(loaded: LoadedConfig) -> str:
    dtype = loaded.config.model.dtype
    return "float32" if dtype == "auto" else dtype


def _result_line(result: BaselineResult, place: BaselinePlace) -> str:
    return (
        f"transformers.generate: {len(result.completions)} prompts, "
        f"{result.num_output_tokens} output tokens in {result.generate_s:.2f} s, "
        f"{result.tokens_per_s:.1f} tokens/s on {place.text} "
        f"(load {result.load_s:.1f} s)"
    )
