"""Compile kernels before anything launches them, in several processes, without a GPU.

Triton compiles a kernel when it is launched first: 0.3 to 0.5 s each on one core, 9 to 13 s for
what a stage uses. What it compiles follows from the arguments' types, strides and constants alone.
So the stage is run on tensors without memory (the meta device), with `recorded_launches` in the
place of the GPU, and forked processes compile what was recorded into Triton's cache
(`TRITON_CACHE_DIR`), where ranks find it by the same key.

For a process of its own (`runtime.kernel_process`), which has neither MPI nor CUDA, and no thread
that holds a lock when others are forked.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from mpipipe.models.kernels.launch import meta_stands_for

if TYPE_CHECKING:
    from mpipipe.models.kernels.launch import GpuFacts

__all__ = ["Launch", "compile_launches", "recorded_launches"]

Launch = tuple[Any, str]  # a kernel (triton.JITFunction), and its specialisation in Triton's JSON


class _AbsentGpu:
    """What Triton asks its driver while it prepares a launch."""

    def __init__(self, gpu: GpuFacts) -> None:
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def recorded_launches(gpu: GpuFacts) -> Iterator[list[Launch]]:
    """Inside, kernels on meta tensors are neither compiled nor launched but listed, each once.

    From here on this process compiles for `gpu`, and meta tensors stand for tensors on it.
    """
    launches: dict[tuple[str, str], Launch] = {}

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:  # noqa: A002 - Triton's name
        launches[(fn.name, key)] = (fn.jit_function, compile["specialization_data"])
        return True  # do not compile

    meta_stands_for(gpu)
    triton.runtime.driver.set_active(_AbsentGpu(gpu))
    found: list[Launch] = []
    triton.knobs.runtime.jit_cache_hook = record
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        found += launches.values()


def compile_launches(launches: Sequence[Launch], num_processes: int) -> None:
    """Bring every kernel of `launches` into Triton's cache; what it holds already costs little.

    Not with `multiprocessing.Pool`: it ends its processes by SIGTERM, which they ignore as their
    parent does, and it waits for ever for the work of one that was killed.

    Raises:
        Exception: what Triton raised in one of the processes, or one of them was killed.
    """
    if not launches:
        return
    fork = multiprocessing.get_context("fork")  # children share what is imported
    # The longest first, by their source: attention takes 2 s, norms 0.2 s, and one that is begun
    # last would be waited for.
    _Shared.launches = sorted(launches, key=lambda launch: -len(launch[0].src))
    with ProcessPoolExecutor(min(num_processes, len(launches) + 1), mp_context=fork) as pool:
        for _ in pool.map(_compile, range(-1, len(launches))):
            pass


class _Shared:
    """What forked processes see of their parent."""

    launches: Sequence[Launch] = ()


def _compile(number: int) -> None:
    if number < 0:
        _build_driver()
        return
    kernel, specialization = _Shared.launches[number]
    _build_launcher(kernel.preload(specialization))


def _build_driver() -> None:
    """Triton's bridge to CUDA, in C, which a process without a driver cannot link."""
    with suppress(AssertionError, OSError, RuntimeError, ImportError):
        nvidia.CudaUtils()


def _build_launcher(compiled: Any) -> None:
    """Triton up to 3.6 compiles a function in C for each kernel, too."""
    if hasattr(nvidia, "make_launcher"):
        with suppress(AssertionError, OSError, RuntimeError, ImportError):
            nvidia.CudaLauncher(compiled.src, compiled.metadata)
