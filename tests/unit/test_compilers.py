"""What Triton and FlashInfer compile with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mpipipe.topology.packages import flashinfer_is_usable, has_c_compiler


def program(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch(mode=0o755)
    return folder / name


@pytest.mark.parametrize(
    ("installed", "cc", "found"),
    [
        ((), None, False),
        (("gcc",), None, True),
        (("clang",), None, True),
        (("cc",), None, False),  # Triton does not look for that name
        (("icx",), "icx", True),
        (("gcc",), "icx", False),  # nor for another one where CC names one
    ],
)
def test_the_compiler_is_the_one_that_triton_takes(
    installed: tuple[str, ...], cc: str | None, found: bool, tmp_path: Path
) -> None:
    for name in installed:
        program(tmp_path, name)
    environ = {"PATH": str(tmp_path), **({"CC": cc} if cc else {})}
    assert has_c_compiler(environ) == found


def test_flashinfer_needs_nvcc_or_its_compiled_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    environ = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path / "cuda")}
    program(tmp_path / "cuda/bin", "nvcc")
    assert not flashinfer_is_usable(environ)  # it is not there
    installed.add("flashinfer")
    assert flashinfer_is_usable(environ)
    (tmp_path / "cuda/bin/nvcc").unlink()
    assert not flashinfer_is_usable(environ)
    program(tmp_path / "bin", "nvcc")
    assert flashinfer_is_usable(environ)
    (tmp_path / "bin/nvcc").unlink()
    installed.add("flashinfer_jit_cache")
    assert flashinfer_is_usable(environ)
