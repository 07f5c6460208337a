"""Where the note of compiled kernels is, and what forecasts learn from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpipipe.planning.compiled_kernels import (
    are_kernels_compiled,
    compiled_note,
    stages_on_host,
    triton_cache,
)
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resources import RankResources
from mpipipe.topology.gpu import GpuFacts
from tests.unit.planned_rank import make_rank, with_gpu
from tests.unit.test_plan import make_plan


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


def test_the_cache_is_where_triton_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOME", "/shared")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert triton_cache() == Path("/shared/.triton/cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/kernels")
    assert triton_cache() == Path("/kernels")


# ---- whether all is compiled ---------------------------------------------------------------------

H200 = GpuFacts(index=0, name="NVIDIA H200", capability=90, num_processors=132)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelinePlan:
    """Of two stages on two hosts with GPUs, whose cache is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    stages = tuple(
        dataclasses.replace(stage, host=host, rank=rank)
        for rank, (stage, host) in enumerate(zip(make_plan().stages, "ab", strict=True))
    )
    return dataclasses.replace(make_plan(), model_path=str(tmp_path), device="cuda", stages=stages)


def gpus() -> list[RankResources]:
    return [make_rank(rank, host, gpu=H200) for rank, host in enumerate("ab")]


def compile_for(plan: PipelinePlan, number: int) -> None:
    compiled_note(plan, (number,), (9, 0), 132).touch()


def test_kernels_are_compiled_when_those_of_every_host_are(plan: PipelinePlan) -> None:
    assert not are_kernels_compiled(plan, gpus())
    compile_for(plan, 0)
    assert not are_kernels_compiled(plan, gpus())
    compile_for(plan, 1)
    assert are_kernels_compiled(plan, gpus())
    assert not are_kernels_compiled(dataclasses.replace(plan, device="cpu"), gpus())


@pytest.mark.parametrize("told", [{"num_processors": 0}, {"num_processors": 114}])
def test_kernels_for_gpus_that_are_others_or_do_not_tell_are_not_known(
    told: dict[str, int], plan: PipelinePlan
) -> None:
    compile_for(plan, 0)
    compile_for(plan, 1)
    one, two = gpus()
    assert not are_kernels_compiled(plan, [one, with_gpu(two, **told)])


def test_kernels_of_a_model_that_is_gone_and_without_a_home_are_not_known(
    plan: PipelinePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home folder")

    gone = dataclasses.replace(plan, model_path=f"{plan.model_path}/gone")
    assert not are_kernels_compiled(gone, gpus())
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert not are_kernels_compiled(plan, gpus())
