"""Signals of a run, with a compiler in the process that takes one of them for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, threading
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpipipe.runtime.stop_switch import StopSwitch, stop_signals


@triton.jit
def add_one(x, y, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


class Switch(StopSwitch):
    def signalled(self, number):
        print(signal.Signals(number).name, flush=True)
        taken.set()


taken = threading.Event()
types = {"x": "*fp32", "y": "*fp32", "n": "i32", "block": "constexpr"}
with stop_signals(Switch()):
    source = ASTSource(fn=add_one, signature=types, constexprs={(3,): 128})
    triton.compile(source, target=GPUTarget("cuda", 80, 32))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        taken.clear()
        os.kill(os.getpid(), number)
        assert taken.wait(20), number
"""


def test_every_signal_arrives_after_a_kernel_was_compiled(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = tmp_path / "program.py"  # Triton reads the source of a kernel
    program.write_text(PROGRAM)
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"]
