"""What optional attention backends compile with: looked for, not tried. Pure but for `PATH`.

Asked by `plan` on a login node, without torch, and by every rank; so both say the same.
`models.kernels.probe` tries whether a kernel then runs.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path

__all__ = ["flashinfer_is_usable", "has_c_compiler"]


def has_c_compiler(environ: Mapping[str, str]) -> bool:
    """Whether Triton finds a C compiler for its launchers: `$CC`, where set, else gcc or clang."""
    names = (environ["CC"],) if environ.get("CC") else ("gcc", "clang")
    return any(shutil.which(name, path=environ.get("PATH")) for name in names)


def flashinfer_is_usable(environ: Mapping[str, str]) -> bool:
    """Whether FlashInfer is installed with its compiled kernels, or with nvcc to compile them."""
    if importlib.util.find_spec("flashinfer") is None:
        return False
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return True
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or "/usr/local/cuda"
    in_path = shutil.which("nvcc", path=environ.get("PATH"))
    return in_path is not None or (Path(home) / "bin/nvcc").exists()
