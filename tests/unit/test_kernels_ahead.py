"""Which rank has the process that compiles kernels, and when it is not asked."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from mpipipe.plain_values import to_json
from mpipipe.planning import compiled_kernels
from mpipipe.planning.plan import KvInHost, PipelinePlan
from mpipipe.runtime import kernels_ahead as module
from mpipipe.runtime.kernel_process import Compiled
from mpipipe.runtime.kernels_ahead import KernelProcess, kernels_ahead
from tests.unit.test_plan import make_plan


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A host with a GPU, Triton and four cores; what is started there."""
    monkeypatch.setattr(module, "driver_in_sight", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(module, "told_local_rank", lambda _: 0)
    found: list[int] = []

    def start(_: object, num_processes: int) -> KernelProcess | None:
        found.append(num_processes)
        return None

    monkeypatch.setattr(module, "_start", start)
    return found


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_one_rank_of_a_host_with_gpus_has_it(device: str, started: list[int]) -> None:
    with kernels_ahead(device):
        assert started == [3]  # a core is the rank's


def test_ranks_of_an_unknown_number_have_it(
    started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "told_local_rank", lambda _: None)
    with kernels_ahead("auto"):
        assert started


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("driver_in_sight", lambda: False),
        ("told_local_rank", lambda _: 1),
    ],
)
def test_others_have_none(
    name: str, found: object, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, found)
    with kernels_ahead("auto") as process:
        assert process is None
    assert not started


def test_a_run_on_cpus_has_none(started: list[int]) -> None:
    with kernels_ahead("cpu") as process:
        assert process is None
    assert not started


def test_a_rank_with_one_core_keeps_it(started: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    with kernels_ahead("cuda"):
        assert not started


# ---- what was compiled before --------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelinePlan:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return dataclasses.replace(make_plan(), model_path=str(tmp_path))


def answer(plan: PipelinePlan, compiled: Compiled, processors: int = 132) -> Compiled | None:
    """What a process says that gives this answer to any order; None: it was not asked."""
    code = f"import sys; sys.stdin.readline(); print({to_json(compiled)!r})"
    popen = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        start_new_session=True,
    )
    process = KernelProcess(popen, 1)
    try:
        process.order(plan, (0, 1), (9, 0), processors)
        answered = process.wait(20.0)
        assert process.found_compiled == (answered is None)  # not what it has compiled itself
        return answered
    finally:
        process.close()


def test_what_was_compiled_for_a_plan_is_not_compiled_again(plan: PipelinePlan) -> None:
    compiled = Compiled(19, 5.0)
    assert answer(plan, compiled) == compiled
    assert answer(plan, compiled) is None
    alike = dataclasses.replace(plan, num_kv_pages=plan.num_kv_pages + 1, resolved=())
    assert answer(alike, compiled) is None
    in_host = KvInHost(layers=(0,))
    stages = tuple(dataclasses.replace(stage, kv_in_host=in_host) for stage in plan.stages)
    offloaded = dataclasses.replace(plan, stages=stages, num_host_pages=8)
    assert answer(offloaded, compiled) is None  # a dry run knows no host memory
    others = [
        dataclasses.replace(plan, max_tokens_per_step=plan.max_tokens_per_step + 1),
        dataclasses.replace(plan, read_prefixes_once=not plan.read_prefixes_once),
        dataclasses.replace(plan, stages=plan.stages[::-1]),
    ]
    for other in others:
        assert answer(other, compiled) == compiled
    assert answer(plan, compiled, processors=114) == compiled


def test_it_is_compiled_again_if_the_cache_or_the_model_is_another(plan: PipelinePlan) -> None:
    compiled = Compiled(19, 5.0)
    assert answer(plan, compiled) == compiled
    (Path(plan.model_path) / "config.json").write_text('{"head_dim": 64}', encoding="utf-8")
    assert answer(plan, compiled) == compiled
    assert answer(plan, compiled) is None
    for note in (Path(plan.model_path) / "cache").iterdir():
        note.unlink()
    assert answer(plan, compiled) == compiled


def test_an_order_needs_no_package_of_that_name_and_no_home(
    plan: PipelinePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled(19, 5.0)

    def unknown(names: Iterable[str]) -> dict[str, str | None]:
        return dict.fromkeys(names)

    def homeless() -> Path:
        raise RuntimeError("no home folder")

    monkeypatch.setattr(compiled_kernels, "package_versions", unknown)
    assert answer(plan, compiled) == compiled
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(Path, "home", homeless)
    assert answer(plan, compiled) == compiled


def test_what_came_to_nothing_is_tried_again(plan: PipelinePlan) -> None:
    compiled = Compiled(19, 5.0, "ptxas is missing")
    assert answer(plan, compiled) == compiled
    assert answer(plan, compiled) == compiled


def test_a_plan_without_kernels_of_ours_is_not_asked_for_twice(plan: PipelinePlan) -> None:
    """What its first run compiled is in Triton's cache: forecasts count it as compiled."""
    compiled = Compiled(0, 0.1)
    assert answer(plan, compiled) == compiled
    assert answer(plan, compiled) is None
