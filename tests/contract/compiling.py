"""Programs that compile kernels for GPUs that are not there: processes without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["output_of"]

_ROOT = Path(__file__).resolve().parents[2]


def output_of(program: str, *arguments: object, cache: Path) -> list[str]:
    """The lines of a program that ends with "done", which is left out; `cache`: of its kernels."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path_before = environ.get("PYTHONPATH")
    # From a file: Triton reads the source of kernels.
    path = cache.with_suffix(".py")
    path.write_text(program)
    result = subprocess.run(
        [sys.executable, str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={
            **environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), path_before])),
            "TRITON_CACHE_DIR": str(cache),
        },
    )
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert last == "done"
    return lines
