"""What is compiled ahead of a run is what its launches ask for. Needs no GPU: ptxas is Triton's."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.checkpoint.spec import read_spec
from mpipipe.metrics.log import NullLog
from mpipipe.models.kernels import ahead
from mpipipe.plain_values import to_json
from mpipipe.planning.compiled_kernels import compiled_note
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.startup import startup_by_rates
from mpipipe.planning.workload import Workload
from mpipipe.runtime import kernels_ahead as module
from mpipipe.runtime.kernels_ahead import KernelProcess
from mpipipe.runtime.session import Session
from mpipipe.topology.gpu import GpuFacts
from mpipipe.types import QuantizeName
from tests.contract.engine_pipeline import engine_plan
from tests.contract.tiny_models import NUM_LAYERS, TinyModel, split
from tests.unit.planned_rank import make_rank

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is nothing to compile with"
)
GPU = (9, 0), 132
LIMIT_S = 240.0

# What a rank does, but for the driver: the stage's launches, by the same calls, with the cache that
# was filled ahead. `warmup` compiles what a launch would, and launches nothing.
_LAUNCH = """
import sys
import triton
from triton.runtime.jit import JITFunction
from mpipipe.models.kernels import rowwise
from mpipipe.models.kernels.ahead import recorded_launches
from mpipipe.models.kernels.launch import GpuFacts
import torch

with recorded_launches(GpuFacts((9, 0), 132)):
    pass
launch = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **more: launch(self, *args, warmup=True, **more)
rows = torch.empty(int(sys.argv[1]), 48, dtype=torch.bfloat16, device="meta")
rowwise.rms_norm(rows, rows[0], 1e-6)
"""

# Steps of any kind, on tensors without memory, whose views lie where those of a GPU would: which
# kernels they launch that a dry run does not.
_STEPS = """
import random
import sys
import torch
from mpipipe.kv_cache.layout import SequenceLens
from mpipipe.models.kernels.ahead import recorded_launches
from mpipipe.models.kernels.launch import GpuFacts
from mpipipe.plain_values import from_json
from mpipipe.planning.plan import PipelinePlan
from mpipipe.stage import dry_run as module

torch.Tensor.data_ptr = lambda self: self.storage_offset() * self.element_size()
plan = from_json(PipelinePlan, sys.argv[1])
gpu = GpuFacts((9, 0), 132)
module.prepare()
known = set(sys.modules)
with recorded_launches(gpu) as ahead:
    assert module.dry_run(plan, plan.stages[0])
    print(*(set(sys.modules) - known) & {"sympy", "torch._dynamo"}, end="")  # seconds
    model = module._dry_model(plan, plan.stages[0])
draw = random.Random(0)
lengths = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 511, 512]
with torch.inference_mode(), recorded_launches(gpu) as launches:
    for step in range(300):
        num_decodes = draw.choice((0, 0, 0, 1, 2, 3, 4, 5, 7, 8, 11, 16))
        chunks = [1] * num_decodes + draw.choices(lengths, k=draw.randrange(not num_decodes, 10))
        chunks = chunks[: plan.max_sequences_per_slot]
        row, entries = 0, []
        for number, length in enumerate(chunks):
            held = draw.choice((0, 1, 15, 16, 100, plan.max_sequence_tokens - length))
            entries.append((SequenceLens(number, row, length, held + length), range(99)))
            row += length
        module._prefill(plan, model, entries)
for kernel, specialization in set(launches) - set(ahead):
    print(kernel.__name__, specialization)
"""


# The same launch while late kernels are told.
_LATE = (
    _LAUNCH.rsplit("rows =", 1)[0]
    + """
from mpipipe.metrics.log import NullLog
from mpipipe.runtime.late_kernels import late_kernels_told

class Told(NullLog):
    def warning(self, event, **fields):
        print(event, fields["kernel"], fields["seconds"] > 0)

rows = torch.empty(3, 48, dtype=torch.bfloat16, device="meta")
with late_kernels_told(Told()):
    rowwise.rms_norm(rows, rows[0], 1e-6)
rowwise.gated_silu(rows)
"""
)


@pytest.fixture
def plan(tiny: Callable[[str], TinyModel]) -> PipelinePlan:
    stages = [dataclasses.replace(stage, host="here") for stage in split(1)]
    return dataclasses.replace(
        engine_plan(1),
        model_path=str(tiny("llama").folder),
        dtype="bfloat16",
        attention="triton",
        num_layers=NUM_LAYERS,
        stages=tuple(stages),
        max_sequences_per_slot=2,
    )


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(tmp_path / "kernels")}


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[KernelProcess]:
    started = module._start(environ, 2)
    assert started is not None
    with closing(started):
        yield started


def entries(environ: dict[str, str]) -> set[str]:
    return set(os.listdir(environ["TRITON_CACHE_DIR"]))


def test_a_launch_finds_what_the_process_compiled(
    plan: PipelinePlan, environ: dict[str, str], process: KernelProcess
) -> None:
    process.order(plan, [0], *GPU)
    compiled = process.wait(LIMIT_S)
    assert compiled is not None
    assert compiled.problem == ""
    assert compiled.num_kernels >= 9  # norms, rotation, both attentions, SiLU, linear, rows, ids
    found = entries(environ)
    assert len(found) >= compiled.num_kernels
    for rows, is_new in (("2", False), ("1", False)):
        command = [sys.executable, "-c", _LAUNCH, rows]
        subprocess.run(command, env=environ, check=True, timeout=LIMIT_S)
        assert (entries(environ) != found) == is_new


def test_nothing_is_compiled_for_what_is_not_known_ahead(
    plan: PipelinePlan, process: KernelProcess
) -> None:
    process.order(dataclasses.replace(plan, attention="sdpa"), [0], *GPU)
    compiled = process.wait(LIMIT_S)
    assert compiled is not None
    assert (compiled.num_kernels, compiled.problem) == (0, "")
    assert process.wait() is None  # one order, one answer


def test_a_process_without_an_order_ends_with_its_rank(process: KernelProcess) -> None:
    assert process.wait() is None
    process.close()
    assert process._process.returncode is not None


def test_a_failure_is_told(plan: PipelinePlan, process: KernelProcess, tmp_path: Path) -> None:
    process.order(dataclasses.replace(plan, model_path=str(tmp_path / "gone")), [0], *GPU)
    compiled = process.wait(LIMIT_S)
    assert compiled is not None
    assert "gone" in compiled.problem


def test_a_process_that_takes_too_long_is_not_waited_for(
    plan: PipelinePlan, process: KernelProcess
) -> None:
    os.kill(process._process.pid, signal.SIGSTOP)  # however long it is until the next line
    process.order(plan, [0], *GPU)
    compiled = process.wait(0.0)
    assert compiled is not None
    assert "after so long" in compiled.problem


def test_a_process_that_dies_is_told(plan: PipelinePlan, process: KernelProcess) -> None:
    process._process.kill()
    process.order(plan, [0], *GPU)
    compiled = process.wait(LIMIT_S)
    assert compiled is not None
    assert "ended" in compiled.problem


class _Kernel:
    """In the place of Triton's."""

    def __init__(self, src: str = "") -> None:
        self.src = src

    def preload(self, specialization: str) -> str:
        return specialization


@pytest.mark.parametrize("is_killed", [False, True])
def test_processes_that_ignore_signals_end_and_one_that_is_killed_is_told(
    is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_driver() -> None:
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ahead, "_build_driver", build_driver)
    monkeypatch.setattr(ahead, "_build_launcher", lambda _: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(BrokenProcessPool) if is_killed else nullcontext():
            ahead.compile_launches([(_Kernel("x" * size), "") for size in range(6)], 4)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [len(kernel.src) for kernel, _ in ahead._Shared.launches] == [5, 4, 3, 2, 1, 0]


def test_it_is_no_rank(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def start(*_: object, env: dict[str, str], **__: object) -> None:
        given.update(env)
        raise OSError("no more processes")

    monkeypatch.setattr("subprocess.Popen", start)
    ranks = {"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "HOME": "/home/me"}
    assert module._start({**environ, **ranks}, 1) is None
    assert not {*ranks} - {"HOME"} & {*given}
    assert (given["HOME"], given["CUDA_VISIBLE_DEVICES"]) == ("/home/me", "")
    assert given["TRITON_CACHE_DIR"] == environ["TRITON_CACHE_DIR"]


@pytest.mark.parametrize(("quantize", "rows"), [("none", 16), ("int8", 1), ("fp8", 1)])
def test_no_step_launches_a_kernel_that_is_not_compiled_ahead(
    quantize: QuantizeName, rows: int, plan: PipelinePlan, environ: dict[str, str]
) -> None:
    """Else it is compiled in the middle of a run. One token of a prompt is a decode's kernel."""
    long = dataclasses.replace(
        plan,
        max_context_tokens=1024,
        max_sequence_tokens=1024,
        page_size_tokens=16,
        num_kv_pages=2048,
        max_tokens_per_step=2048,
        max_sequences_per_slot=rows,
        read_prefixes_once=rows > 1,
        quantize=quantize,
    )
    command = [sys.executable, "-c", _STEPS, to_json(long)]
    ended = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr[-2000:]


def test_a_kernel_that_is_compiled_late_is_told_and_one_that_was_compiled_before_is_not(
    environ: dict[str, str],
) -> None:
    command = [sys.executable, "-c", _LATE]
    told = [
        subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=True
        ).stdout
        for _ in range(2)
    ]
    assert told == ["late_kernel _rms_norm_kernel True\n", ""]


# ---- what a run's forecast knows of it -----------------------------------------------------------


@pytest.mark.parametrize("has_process", [False, True])
@pytest.mark.parametrize("found_compiled", [False, True])
def test_a_run_is_forecast_with_the_kernels_that_were_there_before_it(
    found_compiled: bool,
    has_process: bool,
    plan: PipelinePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process knows. Where a rank has none the note says it: such a start leaves no note."""
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "none"))  # of profiles
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    on_gpu = dataclasses.replace(plan, device="cuda", weights="random")
    if found_compiled or has_process:  # the process has left one by then in any case
        (tmp_path / "kernels").mkdir()
        compiled_note(on_gpu, [0], (9, 0), 132).touch()
    spec = read_spec(Path(plan.model_path))
    gpu = GpuFacts(index=0, name="NVIDIA H200", capability=90, num_processors=132)
    boot: Any = SimpleNamespace(
        ranks=SimpleNamespace(mesh=None, is_head=True),
        resources=(make_rank(0, "here", gpu=gpu),),
        model=SimpleNamespace(spec=spec),
        prepared=SimpleNamespace(tokenizer=None, decode=None, workload=Workload()),
        log=NullLog(),
        kernels=SimpleNamespace(found_compiled=found_compiled) if has_process else None,
    )
    nothing: Any = None
    session = Session(
        boot, plan=on_gpu, worker=nothing, account=nothing, clocks=nothing, load=nothing
    )
    predicted = session.predicting()([(8, 8)], 0.0)
    assert predicted is not None
    start = startup_by_rates(spec, on_gpu, is_compiled=found_compiled)
    assert (predicted.start_s, predicted.load_s) == (start.start_s, start.load_s)
    assert (start.compile_s > 0) != found_compiled
