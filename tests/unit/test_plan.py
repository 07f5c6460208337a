from __future__ import annotations

from dataclasses import replace

import pytest

from mpipipe.errors import PlanError
from mpipipe.planning.explain import plan_lines, plan_rows
from mpipipe.planning.plan import DraftPlan, PipelinePlan, Resolved, StagePlan


def make_plan() -> PipelinePlan:
    return PipelinePlan(
        model_path="/models/smol",
        model_type="llama",
        architecture="LlamaForCausalLM",
        dtype="float32",
        num_layers=30,
        hidden_size=576,
        stages=(
            StagePlan(0, 0, "node1", 0, 18, True, False, 300 * 2**20, 0.5),
            StagePlan(1, 1, "node2", 18, 30, False, True, 50 * 2**20, 0.5),
        ),
        num_slots=2,
        max_sequences_per_slot=32,
        max_tokens_per_step=512,
        page_size_tokens=16,
        num_kv_pages=100,
        max_context_tokens=8192,
        kv_cache="paged",
        transport="mpi",
        device="cpu",
        attention="sdpa",
        threads_per_rank=1,
        resolved=(Resolved("pipeline.split", "[18, 12]", "balanced by cost"),),
    )


def test_json_round_trip_keeps_the_plan_and_its_hash() -> None:
    plan = make_plan()
    again = PipelinePlan.from_json(plan.to_json())
    assert again == plan
    assert again.content_hash() == plan.content_hash()


def test_any_change_changes_the_hash() -> None:
    plan = make_plan()
    assert replace(plan, num_slots=3).content_hash() != plan.content_hash()
    stage = replace(plan.stages[1], host="node3")
    assert replace(plan, stages=(plan.stages[0], stage)).content_hash() != plan.content_hash()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": [{}], "resolved": []}'])
def test_a_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a pipeline plan"):
        PipelinePlan.from_json(text)


def test_head_last_and_stage_of_rank() -> None:
    plan = make_plan()
    assert (plan.num_stages, plan.head_rank, plan.stages[-1].rank) == (2, 0, 1)
    assert plan.stage_of_rank(1).num_layers == 12
    with pytest.raises(PlanError, match="rank 2 has no stage"):
        plan.stage_of_rank(2)


def test_rows_show_every_stage_and_the_reason_of_every_auto() -> None:
    rows = {name: (value, reason) for name, value, reason in plan_rows(make_plan())}
    assert rows["stage 0"] == (
        "embedding + layers 0–17 (18)",
        "rank 0 on node1, 0.29 GiB of weights, 50.0% of a round",
    )
    assert rows["stage 1"][0] == "layers 18–29 (12) + LM head"
    assert rows["stage 1"][1].startswith("rank 1 on node2, 50.0 MiB")
    assert rows["pipeline.split"] == ("[18, 12]", "balanced by cost")
    assert rows["pipeline.num_slots"] == ("2", "as configured")
    assert rows["pipeline.lookahead"] == ("0", "as configured")
    assert "memory.cuda_graphs" not in rows  # says nothing on a CPU


def test_rows_say_whether_drafts_are_made_and_prefixes_are_shared() -> None:
    why = Resolved("pipeline.num_speculative_tokens", "7", "where text recurs")
    drafts = DraftPlan(7, (1, 8), (0.1, 0.2), 0.0, 0.0, False)
    plans = (
        replace(make_plan(), drafts=drafts, max_sharing_tokens=8192, resolved=(why,)),
        replace(make_plan(), max_sharing_tokens=4096),
        make_plan(),
    )
    told = [{name: row for name, *row in plan_rows(plan)} for plan in plans]
    assert told[0]["pipeline.num_speculative_tokens"] == ["7", "where text recurs"]
    assert told[2]["pipeline.num_speculative_tokens"] == ["0", "as configured"]
    sharing = [rows["memory.share_prefixes"][0] for rows in told]
    assert sharing == ["true", "up to 4096 tokens", "false"]


def test_rows_of_a_gpu_plan_say_whether_graphs_are_captured() -> None:
    rows = {name: value for name, value, _ in plan_rows(replace(make_plan(), device="cuda"))}
    assert rows["memory.cuda_graphs"] == "false"


def test_lines_begin_with_the_hash_and_align_the_columns() -> None:
    plan = make_plan()
    heading, *lines = plan_lines(plan)
    assert plan.content_hash() in heading
    assert "30 layers on 2 stages" in heading
    rows = plan_rows(plan)
    assert len(lines) == len(rows)
    assert {line.index(row[2]) for line, row in zip(lines, rows, strict=True)} == {
        lines[0].index(rows[0][2])
    }
