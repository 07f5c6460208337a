r"""Holds what is predicted against what is measured, by rates and by a profile that is made first.

    python launch/bench_predictions.py --ranks 2,1 --config configs/bench_gpu.toml \
        --models configs/shapes/openllama_3b,configs/shapes/llama3_8b \
        --works 64x512x128,512x512x128,512xmixed --out predictions

For every model and number of ranks: `mpipipe plan --measure`, a forecast from rates (`mpipipe
plan`, with an empty folder of profiles), then each work in a process of its own (`mpipipe bench
throughput`, whose record has the forecast from the profile). Prints a table and below it how far
the forecasts were off in all; writes table.md, records.jsonl and log.txt to `--out`. What fails is
told of and loses only its own line; after `--limit-s` no further process is started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mpipipe.bench.gpu_suite import mpirun_command
from mpipipe.bench.prediction_table import error_lines, prediction_header, prediction_row
from mpipipe.demo.model import DEMO_MODEL, demo_model_folder

_PROCESS_LIMIT_S = 300.0
_END_S = 8.0
_LEAST_S = 5.0  # that it takes to see anything


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Predicted beside measured.")
    parser.add_argument("--config", default="configs/bench_gpu.toml")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, with commas")
    parser.add_argument("--models", default="configs/shapes/openllama_3b", help="with commas")
    parser.add_argument("--works", default="64x512x128,512xmixed", help="with commas")
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    parser.add_argument("--limit-s", type=float, default=3600.0, help="for everything")
    parser.add_argument(
        "--measure-once",
        action="store_true",
        help="with the first number of ranks only: a GPU's profile holds for any number",
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value for every process")
    return parser.parse_args()


class ProcessFailedError(Exception):
    """A command ended with an error, or was stopped at the limit."""


@dataclass(frozen=True)
class Bench:
    """What all processes share."""

    config: str
    overrides: Sequence[str]
    out: Path
    log: TextIO
    ends_s: float  # of the monotonic clock

    def words(self, model: str) -> list[str]:
        """Configuration, model and settings, as every command takes them."""
        path = demo_model_folder() if model == DEMO_MODEL else Path(model).absolute()
        return [self.config, f"model.path={path}", *self.overrides]

    def run(self, launcher: Sequence[str], words: Sequence[str], cache: str = "profiles") -> str:
        """What a command prints; its errors go to the log."""
        command = [*launcher, sys.executable, "-m", "mpipipe", *words]
        left_s = self.ends_s - time.monotonic()
        if left_s < _LEAST_S:
            raise ProcessFailedError(f"no time left for {' '.join(words)}")
        self.log.write(f"\n==== {' '.join(command)}\n")
        self.log.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "MPIPIPE_CACHE": str((self.out / cache).absolute())},
        )
        limit_s = min(_PROCESS_LIMIT_S, left_s)
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise ProcessFailedError(f"stopped after {limit_s:.0f} s: {' '.join(words)}") from error
        self.log.write(said)
        self.log.flush()
        if process.returncode:
            raise ProcessFailedError(f"exit code {process.returncode} of {' '.join(words)}")
        return said

    def measure(self, model: str, num_ranks: int) -> None:
        """Make a profile."""
        self.run(mpirun_command(num_ranks), ["plan", "--measure", *self.words(model)])

    def record(self, model: str, num_ranks: int, work: str) -> dict[str, Any]:
        """Forecast and run one work."""
        words = self.words(model)
        plan = ["plan", *words, "--stages", str(num_ranks), "--work", work, "--json"]
        by_rates = json.loads(self.run([], plan, cache="no_profiles"))
        path = self.out / "record.jsonl"
        path.unlink(missing_ok=True)
        bench = ["bench", "throughput", *words, "--work", work, "--json", str(path)]
        self.run(mpirun_command(num_ranks), bench)
        record = json.loads(path.read_text().splitlines()[-1])
        told = {name: by_rates[name] for name in ("forecast", "wall_clock_s")}
        return {**record, "model": Path(model).name, "ranks": num_ranks, "by_rates": told}


def _end(process: subprocess.Popen[str]) -> None:
    """In order: an mpirun that is killed would leave its ranks, and they their GPUs' memory."""
    process.terminate()
    try:
        process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def tasks(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(model, ranks, work); no work: make a profile."""
    for model in args.models.split(","):
        for place, num_ranks in enumerate(map(int, args.ranks.split(","))):
            if not (args.measure_once and place):
                yield model, num_ranks, ""
            for work in args.works.split(","):
                yield model, num_ranks, work


def main() -> int:
    """Run all, and print the tables; 1 if anything failed."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    lines, records, failed = prediction_header(), [], False
    with (args.out / "log.txt").open("w") as log, (args.out / "records.jsonl").open("w") as kept:
        ends_s = time.monotonic() + args.limit_s
        bench = Bench(args.config, args.overrides, args.out, log, ends_s)
        for model, num_ranks, work in tasks(args):
            try:
                if not work:
                    bench.measure(model, num_ranks)
                    continue
                record = bench.record(model, num_ranks, work)
            except ProcessFailedError as error:
                print(f"{Path(model).name}, {num_ranks} ranks: {error}; see log.txt", flush=True)
                failed = True
                continue
            records.append(record)
            kept.write(json.dumps(record) + "\n")
            kept.flush()
            lines.append(prediction_row(record))
            print(lines[-1], flush=True)
    lines += ["", *error_lines(records)]
    print(*lines[-len(error_lines(records)) :], sep="\n", flush=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
