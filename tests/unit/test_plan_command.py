"""`mpipipe plan`: the answer for machines that are not here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpipipe.cli import plan as plan_cli
from mpipipe.cli.plan import PlanRequest, plan_command
from mpipipe.errors import ConfigError
from mpipipe.plain_values import from_json
from mpipipe.planning.compiled_kernels import compiled_note
from mpipipe.planning.plan import PipelinePlan
from mpipipe.topology.gpu import GpuFacts

ROOT = Path(__file__).resolve().parents[2]
OPENLLAMA_7B = ROOT / "configs/shapes/openllama_7b"
LLAMA_3_8B = ROOT / "configs/shapes/llama3_8b"
ONE_SCREEN = 30


def answer(
    capsys: pytest.CaptureFixture[str], model: Path, *overrides: str, code: int = 0, **asked: Any
) -> dict[str, Any]:
    assert plan_command(model, overrides, PlanRequest(as_json=True, **asked)) == code
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_does_openllama_7b_fit_two_t4s(capsys: pytest.CaptureFixture[str]) -> None:
    """In one screen: what is where, how fast, with which batch, what holds it back, what helps."""
    request = PlanRequest(gpus="2 x t4", num_nodes=2, work="64x512x128")
    assert plan_command(OPENLLAMA_7B, [], request) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) <= ONE_SCREEN
    assert lines[0] == (
        "openllama_7b (LlamaForCausalLM, 32 layers), float16: fits 2 x t4 on 2 nodes over 10GbE"
    )
    stages = [line for line in lines if "of node" in line]
    assert [line.split()[:5] for line in stages] == [
        ["0", "t4", "of", "node0", "emb+0–15"],
        ["1", "t4", "of", "node1", "16–31+head"],
    ]
    for label in ("tokens/s", "batch", "wall-clock", "energy", "bottleneck", "would help", "rates"):
        assert any(line.startswith(label) for line in lines), label
    assert "2 slots of up to 32 rows" in told.out
    assert "for kernels that are not known to be compiled: see `mpipipe warm`)" in " ".join(
        told.out.split()
    )
    assert "holds no weights: planned from its config.json alone" in told.err


def test_a_stage_of_one_layer_and_little_energy_are_told_plainly(
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = PlanRequest(gpus="2 x h100", work="8x64x8")
    split = ["pipeline.split=[1, 29]", "pipeline.num_stages=2"]
    assert plan_command(ROOT / "configs/shapes/smollm2_135m", split, request) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines if "of node" in line] == ["emb+0", "1–29+head"]
    (energy,) = (line for line in lines if line.startswith("energy"))
    assert float(energy.split()[1]) >= 1
    assert energy.split()[2] == "J"


def test_one_more_rank_on_cpus_is_not_told_as_one_more_of_the_hosts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = PlanRequest(num_stages=2, work="64x64x64")
    plan_command(ROOT / "configs/shapes/smollm2_135m", [], asked)
    told = " ".join(capsys.readouterr().out.split())
    assert "1 more rank, on another host like this, 3 ranks in all" in told


def test_json_carries_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, OPENLLAMA_7B, gpus="2 x t4", work="64x512x128")
    assert found["fits"]
    assert found["machine"] == "2 x t4 on 1 node"
    assert found["prompts"] == {
        "num_prompts": 64,
        "num_rejected": 0,
        "num_prompt_tokens": 32_768,
        "num_output_tokens": 8_192,
        "source": "--work",
    }
    forecast, stages = found["forecast"], found["plan"]["stages"]
    assert len(forecast["stages"]) == len(stages) == 2
    assert forecast["tokens_per_s"] == pytest.approx(8_192 / forecast["generating_s"])
    assert found["wall_clock_s"] == pytest.approx(
        forecast["startup_s"] + forecast["prefill_s"] + forecast["decode_s"]
    )
    assert 0 < forecast["compile_s"] < forecast["startup_s"], "of these GPUs nothing is known"
    assert forecast["energy_j"] > 0
    assert found["bottleneck"]["resource"] == "memory bandwidth"
    assert 1 <= len(found["advice"]) <= 3
    gains = [advice["gain"] for advice in found["advice"]]
    assert gains == sorted(gains, reverse=True)


def test_each_advice_is_what_a_plan_with_it_forecasts(capsys: pytest.CaptureFixture[str]) -> None:
    now = answer(capsys, LLAMA_3_8B, gpus="h100, 3 x t4", num_nodes=2, work="512xmixed")
    by_change = {advice["change"]: advice for advice in now["advice"]}
    assert next(iter(by_change)) == "without the T4, with 1 in all"
    alone = answer(capsys, LLAMA_3_8B, gpus="h100", work="512xmixed")
    advised = by_change["without the T4, with 1 in all"]["tokens_per_s"]
    # It keeps the float16 of no T4, and an H100 alone takes bfloat16: the same bytes and rates.
    assert alone["forecast"]["tokens_per_s"] == pytest.approx(advised, rel=1e-6)


def test_unlike_cards_get_layers_by_their_speed(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": "h100, 3 x t4", "num_nodes": 2, "work": "512xmixed"}
    found = answer(capsys, LLAMA_3_8B, **asked)
    split = [s["last_layer"] - s["first_layer"] for s in found["plan"]["stages"]]
    assert split == [29, 1, 1, 1]
    even = answer(capsys, LLAMA_3_8B, "pipeline.split=8,8,8,8", **asked)
    (advice,) = [a for a in even["advice"] if a["change"] == "pipeline.split=auto"]
    assert advice["tokens_per_s"] == pytest.approx(found["forecast"]["tokens_per_s"])
    assert advice["gain"] > 3


def test_replicas_are_planned_compared_and_advised(capsys: pytest.CaptureFixture[str]) -> None:
    model = ROOT / "configs/shapes/openllama_3b"
    asked: dict[str, Any] = {"gpus": "4 x h100", "work": "512x512x128"}
    one = answer(capsys, model, **asked)
    (best,) = [each for each in one["advice"] if each["change"].startswith("pipeline.replicas")]
    assert best["change"] == "pipeline.replicas=4, of 1 stage"
    fixed = answer(capsys, model, "pipeline.num_stages=4", **asked)
    freed = [each["change"] for each in fixed["advice"]]
    assert "pipeline.replicas=4, of 1 stage, pipeline.num_stages=auto" in freed
    four = answer(capsys, model, "pipeline.replicas=4", **asked)
    assert four["forecast"]["tokens_per_s"] == pytest.approx(best["tokens_per_s"])
    assert [each["ranks"] for each in four["replicas"]] == [[0], [1], [2], [3]]
    two = answer(capsys, model, "pipeline.replicas=auto", "pipeline.num_stages=2", **asked)
    assert [each["ranks"] for each in two["replicas"]] == [[0, 1], [2, 3]]
    assert len(two["forecast"]["stages"]) == 4
    plan_command(model, ["pipeline.replicas=4"], PlanRequest(**asked))
    told = capsys.readouterr().out
    assert "and 3 more replicas like them" in told
    assert "4 replicas with 1 slot of up to 128 rows" in told


def test_stages_lanes_and_replicas_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": "4 x h100", "work": "256x512x128"}
    ways = answer(capsys, LLAMA_3_8B, compares=True, **asked)["arrangements"]
    shapes = [(way["replicas"], way["stages"], way["lanes"]) for way in ways]
    assert sorted(shapes) == [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
    speeds = [way["tokens_per_s"] for way in ways]
    assert speeds == sorted(speeds, reverse=True)
    quick = min(ways, key=lambda way: way["request_s"])
    assert (quick["stages"], quick["lanes"]) == (1, 4)  # every rank works on each token
    words = ["pipeline.replicas=2", "pipeline.tensor_parallel=2"]
    chosen = answer(capsys, LLAMA_3_8B, *words, **asked)
    told = next(way for way in ways if (way["replicas"], way["lanes"]) == (2, 2))
    assert chosen["forecast"]["tokens_per_s"] == pytest.approx(told["tokens_per_s"])
    plan_command(LLAMA_3_8B, [], PlanRequest(compares=True, **asked))
    lines = capsys.readouterr().out.splitlines()
    best = f"pipeline.replicas={ways[0]['replicas']} pipeline.num_stages={ways[0]['stages']} "
    assert any(line.startswith("throughput") and best in line for line in lines)
    latency = "pipeline.replicas=1 pipeline.num_stages=1 pipeline.tensor_parallel=4"
    assert any(line.startswith("latency") and latency in line for line in lines)


def test_lanes_that_do_not_divide_the_heads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(LLAMA_3_8B, [], PlanRequest(compares=True, gpus="3 x h100", work="8x512x128"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "does not divide" in line]
    assert line.split()[:4] == ["1", "1", "3", "–"]


def test_lanes_are_shown_and_advised(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": "2 x h100", "work": "1x512x128"}
    alone = answer(capsys, LLAMA_3_8B, **asked)
    (advised,) = [a for a in alone["advice"] if a["change"] == "pipeline.tensor_parallel=2"]
    both = answer(capsys, LLAMA_3_8B, "pipeline.tensor_parallel=2", **asked)
    assert both["forecast"]["tokens_per_s"] == pytest.approx(advised["tokens_per_s"])
    assert both["forecast"]["energy_j"] > 0
    assert [stage["lane_ranks"] for stage in both["plan"]["stages"]] == [[0, 1]]
    plan_command(LLAMA_3_8B, ["pipeline.tensor_parallel=2"], PlanRequest(**asked))
    assert "2 x h100 of node0" in capsys.readouterr().out


def test_replicas_on_unlike_cards_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    model = ROOT / "configs/shapes/openllama_3b"
    plan_command(model, ["pipeline.replicas=2"], PlanRequest(gpus="h100, t4"))
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told if "of node0" in line] == [
        ["0.0", "h100"],
        ["1.0", "t4"],
    ]


def test_too_few_rows_are_told_and_how_many_are_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = "pipeline.max_sequences_per_slot"
    now = answer(capsys, LLAMA_3_8B, f"{rows}=8", gpus="2 x h100", work="512x512x128")
    best = now["advice"][0]
    assert best["change"] == f"{rows}=64"
    assert best["gain"] > 2
    more = answer(capsys, LLAMA_3_8B, best["change"], gpus="2 x h100", work="512x512x128")
    assert more["forecast"]["tokens_per_s"] == pytest.approx(best["tokens_per_s"])
    assert more["forecast"]["rows_per_slot"] == pytest.approx(64)


def test_a_slow_network_is_the_bottleneck_and_a_faster_one_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {"gpus": "4 x h100", "num_nodes": 4, "work": "256x512x16"}
    slow = answer(capsys, OPENLLAMA_7B, **asked, link="1GbE")
    fast = answer(capsys, OPENLLAMA_7B, **asked, link="HDR")
    assert slow["bottleneck"]["resource"] == "link between hosts (1GbE)"
    assert any("10GbE between the hosts" in advice["change"] for advice in slow["advice"])
    assert fast["forecast"]["tokens_per_s"] > 5 * slow["forecast"]["tokens_per_s"]


def test_the_link_on_a_node_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"gpus": "4 x h100", "work": "256x512x16"}
    nvlink, pcie = (answer(capsys, LLAMA_3_8B, **asked, link=link) for link in (None, "PCIe3"))
    ratio = pcie["forecast"]["tokens_per_s"] / nvlink["forecast"]["tokens_per_s"]
    assert 0.7 < ratio < 0.98


def test_what_does_not_fit_is_told_by_how_much_and_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["memory.host_bytes=0"]
    assert plan_command(OPENLLAMA_7B, overrides, PlanRequest(gpus="t4")) == 2
    told = capsys.readouterr().out
    assert "does not fit t4 on 1 node" in told
    assert "too little" in told
    found = answer(capsys, OPENLLAMA_7B, *overrides, code=2, gpus="t4")
    assert not found["fits"]
    assert "0.86 GiB too little" in found["problem"]
    changes = {advice["change"]: advice["tokens_per_s"] for advice in found["would_fit"]}
    assert set(changes) >= {"1 more T4, 2 in all", "model.quantize=int8"}
    smaller = answer(capsys, OPENLLAMA_7B, *overrides, "model.quantize=int8", gpus="t4")
    assert smaller["forecast"]["tokens_per_s"] == pytest.approx(changes["model.quantize=int8"])


@pytest.mark.parametrize(
    ("gpus", "override", "problem", "change"),
    [
        ("40 x h100", "", "40 stages", "pipeline.replicas=auto"),
        ("2 x t4", "model.quantize=fp8", "8-bit floats need 8.9", "model.quantize=int8"),
        ("2 x t4", "memory.num_kv_pages=9000", "of KV cache", "memory.num_kv_pages=auto"),
        ("2 x t4", "pipeline.split=1,1", "adds up to 2 layers", "pipeline.split=auto"),
    ],
)
def test_what_would_fit_follows_from_what_does_not(
    capsys: pytest.CaptureFixture[str], gpus: str, override: str, problem: str, change: str
) -> None:
    words = [override] if override else []
    found = answer(capsys, OPENLLAMA_7B, *words, code=2, gpus=gpus, work="64x512x128")
    assert problem in found["problem"]
    assert change in [each["change"] for each in found["would_fit"]]


def test_what_does_not_fit_the_card_is_offloaded_and_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan_command(OPENLLAMA_7B, [], PlanRequest(gpus="t4", work="64x512x128")) == 0
    told = capsys.readouterr().out
    assert "GiB host" in told
    assert "link to host memory and disk" in told
    less = answer(capsys, OPENLLAMA_7B, code=2, gpus="t4", work="64x512x128", host_memory="2GiB")
    assert not less["fits"]


def test_reasons_are_told_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(LLAMA_3_8B, [], PlanRequest(gpus="2 x t4", with_reasons=True))
    told = capsys.readouterr().out
    assert "whose only 16-bit type is float16" in told
    assert "fits 2 x t4" in told


def test_numbers_that_the_cards_lack_are_replaced_and_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["model.dtype=bfloat16", "model.weights=random"]
    work: dict[str, Any] = {"gpus": "h100, t4", "work": "64x512x128"}
    assert plan_command(OPENLLAMA_7B, asked, PlanRequest(**work)) == 0
    told = capsys.readouterr().out
    assert "32 layers), float16: fits h100, t4" in told
    assert "needs       model.dtype=float16: T4 cannot compute in bfloat16" in told
    found = answer(capsys, OPENLLAMA_7B, *asked, **work)
    in_half = answer(capsys, OPENLLAMA_7B, asked[1], "model.dtype=float16", **work)
    assert found["forecast"] == in_half["forecast"]
    assert plan_command(OPENLLAMA_7B, asked, PlanRequest(gpus="2 x l4", work="64x512x128")) == 0
    told = capsys.readouterr().out
    assert "bfloat16: fits" in told
    assert "needs" not in told


def test_the_configuration_does_not_say_which_devices_are_described(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ['pipeline.device="cpu"']
    assert plan_command(OPENLLAMA_7B, overrides, PlanRequest(gpus="2 x l4")) == 0
    told = capsys.readouterr()
    assert "planned for the GPUs of --gpus" in told.err
    assert "l4 of node0" in told.out


@pytest.mark.parametrize(
    ("overrides", "problem", "change"),
    [
        (
            ["pipeline.num_stages=2"],
            "pipeline.num_stages = 2, but there are 3 ranks, and every stage is one rank",
            "1 more T4, 4 in all, pipeline.num_stages=auto",
        ),
        (
            ["pipeline.split=[10,22]", "pipeline.num_slots=4"],
            "pipeline.split = [10, 22] has 2 entries for 3 stages",
            "1 more T4, 4 in all, pipeline.num_slots=auto, pipeline.split=auto",
        ),
        (
            ["pipeline.num_stages=2", "pipeline.replicas=auto"],
            "there are 3 ranks, which are no whole number of pipelines of pipeline.num_stages = 2",
            "pipeline.num_stages=auto",
        ),
        (
            ["pipeline.tensor_parallel=2"],
            "pipeline.tensor_parallel = 2, but there are 3 ranks: start a multiple of 2 ranks",
            "pipeline.tensor_parallel=1",
        ),
        (
            ["pipeline.replicas=4"],
            "pipeline.replicas = 4, but there are 3 ranks, and every replica takes one at least",
            "pipeline.replicas=1",
        ),
    ],
)
def test_a_number_of_gpus_that_a_run_would_refuse_does_not_fit(
    capsys: pytest.CaptureFixture[str], overrides: list[str], problem: str, change: str
) -> None:
    found = answer(capsys, OPENLLAMA_7B, *overrides, code=2, gpus="3 x t4", work="8x64x8")
    assert found["problem"].startswith(problem)
    assert change in [each["change"] for each in found["would_fit"]]


def test_the_ways_to_use_the_gpus_are_compared_where_the_configuration_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["pipeline.num_stages=3"]
    found = answer(
        capsys, OPENLLAMA_7B, *words, code=2, gpus="2 x l4", work="8x64x8", compares=True
    )
    ways = [(way["replicas"], way["stages"], way["lanes"]) for way in found["arrangements"]]
    assert sorted(ways) == [(1, 1, 2), (1, 2, 1), (2, 1, 1)]
    request = PlanRequest(gpus="2 x l4", work="8x64x8", compares=True)
    assert plan_command(OPENLLAMA_7B, words, request) == 2
    told = capsys.readouterr().out
    assert told.index("problem") < told.index("would fit") < told.index("\nthroughput")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"num_nodes": 2}, r"--nodes describes a machine: give --gpus"),
        ({"link": "HDR"}, r"--link describes a machine"),
        ({"host_memory": "1GiB"}, r"--host-memory describes a machine"),
        ({"gpus": "t4", "num_stages": 2}, r"leave out --stages"),
        ({"gpus": "t4", "host_memory": "lots"}, r"--host-memory 'lots' does not fit"),
        ({"gpus": "t4", "link": "string"}, r"there is no link 'string'"),
        ({"gpus": "t4", "work": "9x9000x8"}, r"no prompt fits a context of 2048 tokens"),
        ({"gpus": "t4", "work": "9"}, r"not of the form PROMPTSxINPUTxOUTPUT"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_command(OPENLLAMA_7B, [], PlanRequest(**asked))


def test_other_figures_of_a_card_change_the_forecast(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "gpus.toml"
    table.write_text("[gpus.t4]\nmemory_gb_per_s = 640\nproduct_share = 0.8\n")
    known = answer(capsys, OPENLLAMA_7B, gpus="2 x t4", work="64x512x128")
    other = answer(capsys, OPENLLAMA_7B, gpus="2 x t4", work="64x512x128", gpu_table=table)
    ratio = other["forecast"]["tokens_per_s"] / known["forecast"]["tokens_per_s"]
    assert 1.7 < ratio <= 2.0


def test_the_command_ends_with_2_where_nothing_fits() -> None:
    command = [sys.executable, "-m", "mpipipe", "plan", str(OPENLLAMA_7B), "--gpus", "t4"]
    found = subprocess.run(
        [*command, "--work", "8x64x8", "memory.host_bytes=0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 2, found.stderr
    assert "does not fit t4 on 1 node" in found.stdout
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("kv_host_bytes", "told"),
    [
        ("auto", "wait in host memory"),
        ("0", "are computed twice"),
    ],
)
def test_sequences_whose_pages_can_move_are_not_said_to_be_computed_twice(
    capsys: pytest.CaptureFixture[str], kv_host_bytes: str, told: str
) -> None:
    words = ["memory.num_kv_pages=1200", f"memory.kv_host_bytes={kv_host_bytes}"]
    request = PlanRequest(gpus="2 x a100-40", work="256x64x1500")
    assert plan_command(OPENLLAMA_7B, words, request) == 0
    lines = " ".join(capsys.readouterr().out.split())
    preempted = re.search(r"so about \d+ (.*?) (and \d+ are computed twice )?wall-clock", lines)
    assert preempted is not None
    assert preempted[1] == told


# ---- prompts -------------------------------------------------------------------------------------


def with_prompts(tmp_path: Path, *lines: object) -> list[str]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(path)]


def test_prompts_are_counted_by_their_bytes_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = with_prompts(
        tmp_path,
        {"prompt": "x" * 400, "max_new_tokens": 10},
        {"prompt": "x" * 800, "max_new_tokens": 20},
        {"messages": [{"role": "user", "content": "x" * 40}], "max_new_tokens": 1},
        {"prompt": "x" * 40_000},
        {"prompt": ""},
    )
    found = answer(capsys, OPENLLAMA_7B, *words, gpus="2 x t4")["prompts"]
    assert found == {
        "num_prompts": 3,
        "num_rejected": 2,  # one too long for the context, one empty
        "num_prompt_tokens": (1 + 100) + (1 + 200) + (1 + 2 * 5 + 10),
        "num_output_tokens": 31,
        "source": "estimated: 4 bytes a token",
    }


def test_a_file_of_prompts_of_which_none_can_be_run_is_refused(tmp_path: Path) -> None:
    words = with_prompts(tmp_path, {"prompt": ""})
    with pytest.raises(ConfigError, match=r"none of the 1 prompts can be run"):
        plan_command(OPENLLAMA_7B, words, PlanRequest(gpus="2 x t4"))


def test_standard_input_is_left_to_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, OPENLLAMA_7B, "-", gpus="2 x t4")["prompts"]
    assert found["num_prompts"] == 512
    assert found["source"] == "assumed: standard input is not read, --work says others"


def test_assumed_prompts_fit_a_short_context(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, OPENLLAMA_7B, "memory.max_context_tokens=100", gpus="2 x t4")["prompts"]
    assert (found["num_prompt_tokens"], found["num_output_tokens"]) == (512 * 80, 512 * 20)


def test_many_prompts_are_counted_by_a_sample(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [{"prompt": "word " * (1 + i % 7), "max_new_tokens": 1 + i % 3} for i in range(3000)]
    words = with_prompts(tmp_path, *lines)
    found = answer(capsys, OPENLLAMA_7B, *words, "prompts.limit=2100", gpus="2 x t4")
    assert found["prompts"]["num_prompts"] == 2100
    assert found["prompts"]["num_output_tokens"] == 4200
    assert found["forecast"]["tokens_per_s"] > 0


# ---- on the machine itself -----------------------------------------------------------------------


def test_kernels_that_this_machine_has_compiled_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu = GpuFacts(
        index=0,
        name="NVIDIA H200",
        uuid="aa",
        capability=90,
        memory_bytes=140 * 2**30,
        free_bytes=139 * 2**30,
        nccl_version="unknown",
        num_processors=132,
    )
    monkeypatch.setattr(plan_cli, "query_host", lambda: ((gpu,), ()))
    monkeypatch.setattr(plan_cli, "driver_in_sight", lambda: True)
    monkeypatch.setattr(plan_cli, "installed_attention_backends", lambda: ("triton",))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path))
    words = ["model.weights=random", "pipeline.device=cuda"]
    new = answer(capsys, LLAMA_3_8B, *words, work="8x64x8")
    plan = from_json(PipelinePlan, json.dumps(new["plan"]))
    compiled_note(plan, (0,), (9, 0), 132).touch()
    known = answer(capsys, LLAMA_3_8B, *words, work="8x64x8")
    assert new["forecast"]["compile_s"] > known["forecast"]["compile_s"] == 0
    assert new["wall_clock_s"] - known["wall_clock_s"] == pytest.approx(
        new["forecast"]["compile_s"]
    )
    plan_command(LLAMA_3_8B, words, PlanRequest(work="8x64x8"))
    assert "mpipipe warm" not in capsys.readouterr().out
