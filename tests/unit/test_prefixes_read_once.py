"""Where GPUs read the pages that rows share once for all of them, as plans decide it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpipipe.config.schema import AUTO, Auto, Config, MemoryConfig, PipelineConfig
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.workload import Workload
from mpipipe.types import AttentionName
from tests.unit.model_specs import OPENLLAMA_3B
from tests.unit.test_gpu_plan import h200
from tests.unit.test_resolve import ranks

LENGTHS = ((1_152, 128),) * 8
UNLIKE = Workload(num_requests=8, lengths=LENGTHS)
ALIKE = replace(UNLIKE, shared_ratio=0.7)
BARELY = replace(UNLIKE, shared_ratio=16 / (8 * 1_152))  # two prompts with a page in common
SETTING = "memory.read_prefixes_once"


def plan(
    workload: Workload,
    *,
    attention: Auto | AttentionName = AUTO,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 - it is frozen
) -> PipelinePlan:
    config = replace(
        Config(),
        memory=memory,
        pipeline=PipelineConfig(attention=attention),
    )
    return make_plan(config, OPENLLAMA_3B, h200(2), "/models/m", workload)


def reasons(made: PipelinePlan) -> list[str]:
    return [entry.reason for entry in made.resolved if entry.setting == SETTING]


@pytest.mark.parametrize("workload", [ALIKE, Workload()], ids=["alike", "unknown"])
def test_gpus_read_once_what_prompts_share_or_may_share(workload: Workload) -> None:
    made = plan(workload)
    assert made.read_prefixes_once
    assert reasons(made) == []


@pytest.mark.parametrize("workload", [UNLIKE, BARELY], ids=["unlike", "barely"])
def test_it_is_off_where_no_group_could_spare_enough(workload: Workload) -> None:
    made = plan(workload)
    assert not made.read_prefixes_once
    assert reasons(made) == [
        "the prompts have too little in common for the CUDA graphs that it takes"
    ]


def test_other_attention_says_that_it_reads_each_row() -> None:
    made = plan(ALIKE, attention="sdpa")
    assert not made.read_prefixes_once
    assert reasons(made) == ["sdpa attention reads the pages of each row; triton could do it"]


@pytest.mark.parametrize(
    "memory", [MemoryConfig(share_prefixes=False), MemoryConfig(read_prefixes_once=False)]
)
def test_what_is_switched_off_is_off_and_needs_no_reason(memory: MemoryConfig) -> None:
    made = plan(ALIKE, memory=memory)
    assert not made.read_prefixes_once
    assert reasons(made) == []


def test_cpus_say_nothing_of_it() -> None:
    made = make_plan(Config(), OPENLLAMA_3B, ranks("a", memory=1 << 36), "/models/m", ALIKE)
    assert not made.read_prefixes_once
    assert reasons(made) == []
