r"""Weights that stream from a disk, read cold: a benchmark beside what the disk gives plainly.

    python launch/bench_disk.py /scratch --json records.jsonl -- mpirun -n 1 mpipipe bench \
        throughput configs/bench_gpu.toml memory.offload_dir=/scratch … --json records.jsonl

Reads a new file in the folder with one thread and with eight, its pages dropped from the cache
before; then runs the command, and drops the pages of its offloaded weights five times a second.
Adds `disk` to each record that the command leaves in `--json`: see `mpipipe.bench.cold_disk`. The
folder needs room for `--size`, and after that for the weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mpipipe.bench.cold_disk import ColdFiles, disk_record, plain_rates
from mpipipe.config.byte_sizes import parse_bytes

_EVERY_S = 0.2


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Weights from a disk, read cold.")
    parser.add_argument("folder", type=Path, help="memory.offload_dir of the command")
    parser.add_argument("--size", default="4GiB", help="of the file that is read plainly")
    parser.add_argument("--json", type=Path, required=True, help="that the command writes")
    parser.add_argument("command", nargs="+", help="behind --")
    return parser.parse_args()


def main() -> int:
    """The exit code of the command."""
    args = parsed()
    try:
        plain = plain_rates(args.folder, parse_bytes(args.size))
    except OSError as error:
        sys.exit(
            f"bench_disk: no file of {args.size} can be written to {args.folder} "
            f"({error.strerror}): choose a folder on a disk with room for it"
        )
    print(
        "plain reads:", ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in plain.items())
    )
    files = ColdFiles(args.folder)
    process = subprocess.Popen(args.command)
    while True:
        try:
            exit_code = process.wait(_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            files.forget()
    if args.json.is_file():
        lines = []
        for line in args.json.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            record["disk"] = disk_record(record, plain, files.read_bytes)
            lines.append(json.dumps(record) + "\n")
        args.json.write_text("".join(lines), encoding="utf-8")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
