"""`python -m tests.fuzz --target prompts --inputs 100000 --seed 1`: figures; 1 on a finding."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
import tempfile
from pathlib import Path

from tests.fuzz.engine import Figures, fuzz, names
from tests.fuzz.targets import TARGETS

_SPARE_BYTES = 4 << 30  # an input that makes a parser take more is a finding (MemoryError)
_MEMORY_FOLDER = Path("/dev/shm")


def main() -> int:
    """Fuzz the wanted targets one after the other."""
    arguments = _arguments()
    _limit_memory()
    targets = TARGETS
    if not names(TARGETS, arguments.target):
        from tests.fuzz.text_targets import TEXT_TARGETS  # needs torch and transformers

        targets = TEXT_TARGETS
    chosen = names(targets, arguments.target)
    if not chosen:
        sys.exit(f"there is no target {arguments.target!r}")
    num_findings = 0
    for target in chosen:
        with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
            os.chdir(folder)
            figures = fuzz(target, Path(folder), arguments.inputs, arguments.seed)
            os.chdir("/")
        _tell(figures)
        num_findings += len(figures.findings)
    return 1 if num_findings else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument(
        "--target", default="all", help="a name, a group, or `all` that need no torch"
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _memory_folder() -> Path | None:
    """Where files cost nothing, if there is such a place."""
    return _MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES, hard))


def _tell(figures: Figures) -> None:
    print(figures.line(), flush=True)
    for finding in figures.findings:
        print(f"\n  {finding.kind}\n    input: {finding.reproducer}")
        print("\n".join(f"    {line}" for line in finding.text.splitlines()), flush=True)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
