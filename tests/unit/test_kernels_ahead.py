"""Which rank has the process that compiles kernels, and for which stages."""

from __future__ import annotations

import dataclasses

import pytest

from mpipipe.runtime import kernels_ahead as module
from mpipipe.runtime.kernels_ahead import KernelProcess, kernels_ahead, stages_on_host
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


def test_stages_that_hold_the_same_ends_launch_the_same_kernels() -> None:
    first, last = make_plan().stages
    inner = [dataclasses.replace(first, stage=number, has_embedding=False) for number in (1, 2)]
    stages = (
        dataclasses.replace(first, host="here"),
        *(dataclasses.replace(stage, host="here") for stage in inner),
        dataclasses.replace(last, stage=3, host="elsewhere"),
    )
    plan = dataclasses.replace(make_plan(), stages=stages)
    assert stages_on_host(plan, "here") == (0, 1)
    assert stages_on_host(plan, "elsewhere") == (3,)
