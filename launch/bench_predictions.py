r"""Holds what is predicted against what is measured, by rates and by a profile that is made first.

    python launch/bench_predictions.py --ranks 1,2 --config configs/bench_gpu.toml \
        --models configs/shapes/openllama_3b,configs/shapes/llama3_8b \
        --works 64x512x128,512x512x128,512xmixed --out predictions

For every number of ranks and model: a forecast from rates (`mpipipe plan`, with an empty folder of
profiles), `mpipipe plan --measure`, then each work in a process of its own (`mpipipe bench
throughput`, whose record has the forecast from the profile). Prints a table, and writes table.md,
records.jsonl and log.txt to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mpipipe.bench.gpu_suite import mpirun_command
from mpipipe.demo.model import DEMO_MODEL, demo_model_folder

_LIMIT_S = 300.0  # of one process
_HEADER = (
    "model", "ranks", "work", "tokens/s", "by rates", "error", "by profile", "error", "seconds",
    "by profile", "error", "memory error", "decode step error", "split",
)  # fmt: skip


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Predicted beside measured.")
    parser.add_argument("--config", default="configs/bench_gpu.toml")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, with commas")
    parser.add_argument("--models", default="configs/shapes/openllama_3b", help="with commas")
    parser.add_argument("--works", default="64x512x128,512xmixed", help="with commas")
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    parser.add_argument("overrides", nargs="*", help="section.key=value for every process")
    return parser.parse_args()


@dataclass(frozen=True)
class Bench:
    """What all processes share."""

    config: str
    overrides: Sequence[str]
    out: Path
    log: TextIO

    def words(self, model: str) -> list[str]:
        """Configuration, model and settings, as every command takes them."""
        path = demo_model_folder() if model == DEMO_MODEL else Path(model).absolute()
        return [self.config, f"model.path={path}", *self.overrides]

    def run(self, launcher: Sequence[str], words: Sequence[str], cache: str = "profiles") -> str:
        """What a command prints; its errors go to the log."""
        command = [*launcher, sys.executable, "-m", "mpipipe", *words]
        self.log.write(f"\n==== {' '.join(command)}\n")
        self.log.flush()
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            timeout=_LIMIT_S,
            check=False,
            env={**os.environ, "MPIPIPE_CACHE": str((self.out / cache).absolute())},
        )
        self.log.write(ended.stdout)
        self.log.flush()
        if ended.returncode:
            sys.exit(f"exit code {ended.returncode} of {' '.join(command)}; see log.txt")
        return ended.stdout

    def rows(self, model: str, num_ranks: int, works: Sequence[str]) -> list[dict[str, Any]]:
        """Measure, then every work; a record of each."""
        words, launcher = self.words(model), mpirun_command(num_ranks)
        self.run(launcher, ["plan", "--measure", *words])
        records = []
        for work in works:
            plan = ["plan", *words, "--stages", str(num_ranks), "--work", work, "--json"]
            by_rates = json.loads(self.run([], plan, cache="no_profiles"))
            path = self.out / "record.jsonl"
            path.unlink(missing_ok=True)
            bench = ["bench", "throughput", *words, "--work", work, "--json", str(path)]
            self.run(launcher, bench)
            record = json.loads(path.read_text().splitlines()[-1])
            records.append(
                {
                    **record,
                    "model": Path(model).name,
                    "ranks": num_ranks,
                    "by_rates": by_rates["forecast"],
                }
            )
        return records


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    compared, rates_per_s = record["compared"], record["by_rates"]["tokens_per_s"]
    speed, whole = compared["tokens_per_s"], compared["generate_s"]
    cells = [
        record["model"],
        record["ranks"],
        record["work"],
        f"{speed['measured']:,.1f}",
        f"{rates_per_s:,.1f}",
        f"{rates_per_s / speed['measured'] - 1:+.1%}",
        f"{speed['predicted']:,.1f}",
        f"{speed['predicted'] / speed['measured'] - 1:+.1%}",
        f"{whole['measured']:.2f}",
        f"{whole['predicted']:.2f}",
        f"{whole['predicted'] / whole['measured'] - 1:+.1%}",
        worst(compared, "memory_bytes_"),
        worst(compared, "decode_step_s_"),
        record["plan"]["split"],
    ]
    return f"| {' | '.join(map(str, cells))} |"


def worst(compared: dict[str, Any], prefix: str) -> str:
    """By how much the farthest of the stages was predicted wrong."""
    errors = [
        each["predicted"] / each["measured"] - 1
        for name, each in compared.items()
        if name.startswith(prefix)
    ]
    return f"{max(errors, key=abs):+.1%}" if errors else "-"


def main() -> None:
    """Run all, and print the table."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]
    with (args.out / "log.txt").open("w") as log, (args.out / "records.jsonl").open("w") as kept:
        bench = Bench(args.config, args.overrides, args.out, log)
        for num_ranks in map(int, args.ranks.split(",")):
            for model in args.models.split(","):
                for record in bench.rows(model, num_ranks, args.works.split(",")):
                    kept.write(json.dumps(record) + "\n")
                    kept.flush()
                    lines.append(row(record))
                    print(lines[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
