"""Experiments with planted numbers, as `mpipipe bench` would have written them; and a run's folder.

Everything is a formula of case and repeat: no clock, no chance.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpipipe.experiments.record import (
    Arm,
    Case,
    Ceiling,
    ExperimentName,
    Flag,
    Matrix,
    Outcome,
    ProgressSample,
    Record,
    RunSlot,
)
from mpipipe.plain_values import to_json

__all__ = [
    "NOISE",
    "Planted",
    "arrangements",
    "batch",
    "make_run_folder",
    "strong",
    "weak",
    "write",
]

REPEATS = 5
# By repeat, turned by one place from case to case: every case has all of them.
NOISE = (0.98, 1.01, 1.0, 0.99, 1.02)
NUM_TOKENS = 6000  # of a run
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Planted:
    """A case and what its runs come to."""

    arm: Arm
    num_stages: int
    speed: float  # tokens per second, before the noise
    batch: int | None = None
    num_prompts: int = 60
    num_nodes: int = 1
    outcome: Outcome = "ok"
    reason: str = ""
    failed_repeats: tuple[int, ...] = ()  # those with `outcome`; the others are ok
    flags: Mapping[int, tuple[Flag, ...]] = dataclasses.field(default_factory=dict)
    tokens: Mapping[int, str] = dataclasses.field(default_factory=dict)  # hash, where another
    energy_j: float | None = None
    gpu: str = ""
    label: str = ""  # the name, where another case has the same size
    num_replicas: int = 1
    num_lanes: int = 1

    @property
    def name(self) -> str:
        """Of the case."""
        if self.label:
            return self.label
        size = self.batch if self.arm == "batch" else f"n{self.num_stages}"
        return f"{self.arm}_{size}"

    @property
    def case(self) -> Case:
        """As the matrix has it."""
        return Case(
            self.name, self.arm, self.num_stages, self.num_nodes, self.num_replicas, self.batch,
            self.num_prompts, num_lanes=self.num_lanes,
        )  # fmt: skip


def strong() -> list[Planted]:
    """1, 2 and 4 stages; the last one of the second arm has two runs without a result."""
    return [
        Planted("memory-filling", 1, 100.0),
        Planted("memory-filling", 2, 152.0),
        Planted("memory-filling", 4, 260.0, flags={1: ("foreign load",)}),
        Planted("fixed-total", 1, 100.0, batch=16),
        Planted("fixed-total", 2, 130.0, batch=16),
        Planted(
            "fixed-total", 4, 140.0, batch=16, outcome="timeout", failed_repeats=(2, 4),
            reason="it did not end within 600 s (--timeout)",
        ),
    ]  # fmt: skip


def weak() -> list[Planted]:
    """1, 2 and 4 stages; one run of the last made other tokens."""
    return [
        Planted("weak", 1, 100.0, batch=8, num_prompts=20),
        Planted("weak", 2, 181.0, batch=16, num_prompts=40),
        Planted("weak", 4, 330.0, batch=32, num_prompts=80, tokens={3: "f00d"}),
    ]


def batch(scale: float = 1.0) -> list[Planted]:
    """Batches of 1 to 32 on two GPUs, of which the last is too large; `scale`: of all speeds."""
    speeds = {1: 40.0, 2: 72.0, 4: 118.0, 8: 150.0, 16: 152.0}
    rows = [
        Planted("batch", 2, speed * scale, batch=size, num_nodes=2, energy_j=1200.0, gpu="Tesla T4")
        for size, speed in speeds.items()
    ]
    return [
        *rows,
        Planted(
            "batch", 2, 0.0, batch=32, num_nodes=2, outcome="out_of_memory",
            failed_repeats=(1, 2, 3, 4, 5), gpu="Tesla T4",
            reason="memory ran out on rank 1 (CUDA): 2.0 GiB more were needed for the KV cache",
        ),
    ]  # fmt: skip


def arrangements() -> list[Planted]:
    """Four ranks, in three ways."""
    return [
        Planted("arrangements", 4, 100.0, label="r1_n4_t1"),
        Planted("arrangements", 2, 80.0, num_lanes=2, label="r1_n2_t2"),
        Planted("arrangements", 2, 150.0, num_replicas=2, label="r2_n2_t1"),
    ]


def write(folder: Path, experiment: ExperimentName, planted: Sequence[Planted]) -> Path:
    """Write `experiment.json` and the records; returns the folder."""
    (folder / "records").mkdir(parents=True)
    order = [RunSlot(case.name, repeat) for repeat in range(1, REPEATS + 1) for case in planted]
    matrix = Matrix(
        schema=1,
        experiment=experiment,
        config="configs/demo.toml",
        words=("generation.max_new_tokens=100",),
        settings={"generation.max_new_tokens": 100},
        config_hash="c0ffee",
        prompts_hash="9ab",
        cases=tuple(case.case for case in planted),
        repeat=REPEATS,
        seed=7,
        order=tuple(order),
        timeout_s=600.0,
        command=(
            "mpipipe",
            "bench",
            experiment,
            "configs/demo.toml",
            "--out",
            f"runs/{experiment}",
        ),
        version="0.9",
    )
    (folder / "experiment.json").write_text(to_json(matrix, indent=2) + "\n")
    for number, slot in enumerate(order):
        index = next(i for i, case in enumerate(planted) if case.name == slot.case)
        found = record(experiment, planted[index], slot.repeat, number, index)
        (folder / "records" / f"{found.name}.json").write_text(found.to_json())
    return folder


def record(
    experiment: ExperimentName, planted: Planted, repeat: int, order: int, index: int
) -> Record:
    """One run: its speed is the planted one times a noise of the case and repeat."""
    speed = planted.speed * NOISE[(repeat - 1 + index) % len(NOISE)]
    failed = repeat in planted.failed_repeats
    wall_s = 600.0 if failed else NUM_TOKENS / speed + 20.0
    return Record(
        schema=1,
        experiment=experiment,
        case=planted.case,
        repeat=repeat,
        order=order,
        seed=7,
        command=(
            "mpiexec", "-n", str(planted.num_stages), "mpipipe", "run", "configs/demo.toml",
            f"output.dir=runs/{planted.name}_r{repeat}",
        ),
        config_hash="c0ffee",
        commit="1234567",
        versions={"torch": "2.13.0", "mpipipe": "0.9"},
        hosts=tuple(f"node{n % planted.num_nodes}" for n in range(planted.num_stages)),
        gpus=(planted.gpu,) * planted.num_stages if planted.gpu else (),
        started=f"2026-11-27T09:{order:02d}:00+00:00",
        outcome=planted.outcome if failed else "ok",
        reason=planted.reason if failed else "",
        exit_code=None if failed else 0,
        wall_s=wall_s,
        metrics=None if failed else metrics(planted, speed),
        samples=() if failed else samples(speed),
        tokens_hash=None if failed else planted.tokens.get(repeat, f"hash{planted.num_prompts}"),
        flags=planted.flags.get(repeat, ()),
        energy_j=planted.energy_j,
        ceiling=Ceiling(
            tokens_per_s=None if planted.arm != "batch" else 200.0,
            model_tokens_per_s=50.0 * planted.num_stages,
            reason="every stage streams its weights once per step",
        ),
        num_places=planted.batch or 12 * planted.num_stages,
        sm_clock_mhz=1590.0 if planted.gpu else None,
        cpu_percent=95.0 * NOISE[repeat - 1],
        gpu_percent=80.0 if planted.gpu else None,
        run_folder=f"runs/{planted.name}_r{repeat}",
    )  # fmt: skip


def samples(speed: float) -> tuple[ProgressSample, ...]:
    """Every 5 s: half of the speed in the first, then all of it."""
    last_s = int(NUM_TOKENS / speed)
    return (
        ProgressSample(0.0, 0),
        *(ProgressSample(float(t), int(speed * (t - 2.5))) for t in range(5, last_s, 5)),
    )


def metrics(planted: Planted, speed: float) -> dict[str, Any]:
    """A run's metrics.json; times follow from the speed."""
    generate_s = NUM_TOKENS / speed
    return {
        "schema": 1,
        "run": "0123456789ab",
        "attempt": 1,
        "state": "done",
        "phases": {
            "boot_s": 6.0, "load_s": 12.0, "generate_s": generate_s, "shutdown_s": 2.0,
            "wall_s": generate_s + 20.0,
        },
        "requests": {
            "num_completed": planted.num_prompts, "num_failed": 0, "num_prompt_tokens": 1200,
            "num_output_tokens": NUM_TOKENS, "ttft_p50_s": 40.0 / speed, "ttft_p95_s": 0.9,
            "latency_p50_s": 5.0, "latency_p95_s": 9.0,
        },
        "output_tokens_per_s": speed,
        "total_tokens_per_s": speed * 1.2,
        "bubble_ratio": 0.3,
        "itl_p50_s": 4.0 / speed,
        "itl_p95_s": 6.0 / speed,
        "energy_j": planted.energy_j,
        "time": {
            "preprocessing_s": 0.25, "io_read_s": 1.5, "io_write_s": 0.5,
            "communication_s": 0.08 * generate_s,
        },
        "ranks": [rank(planted, number, generate_s) for number in range(planted.num_stages)],
        "attempts": [{"attempt": 1, "state": "done", "wall_s": generate_s + 20.0}],
    }  # fmt: skip


def rank(planted: Planted, number: int, generate_s: float) -> dict[str, Any]:
    """Of one stage: 70 % compute; the others' parts add up to the rest."""
    shares = {
        "compute": 0.7, "wait": 0.1, "transfer": 0.05, "send": 0.03, "idle": 0.07, "overhead": 0.05,
    }  # fmt: skip
    return {
        "rank": number,
        "host": f"node{number % planted.num_nodes}",
        "load_s": 10.0 + number,
        "peak_rss_bytes": (2 + number) * GIB,
        "gpu_peak_bytes": 12 * GIB if planted.gpu else 0,
        "boot": [
            {"name": "imports", "start_s": 0.0, "seconds": 3.0},
            {"name": "read prompts", "start_s": 3.0, "seconds": 0.25},
            {"name": "read weights", "start_s": 4.0, "seconds": 1.25 + number},
        ],
        "stage": {
            "stage": number,
            "overall": {
                **{f"{part}_s": share * generate_s for part, share in shares.items()},
                "wall_s": generate_s,
                "bubble_ratio": 0.3,
            },
        },
    }


# ---- a run folder --------------------------------------------------------------------------------


def make_run_folder(folder: Path, *, num_steps: int = 60, killed: bool = False) -> Path:
    """Two stages whose steps take 40 ms each and alternate; the second rank's clock is 5 s ahead.

    killed: without metrics.json, and the last line of the steps is torn.
    """
    folder.mkdir(parents=True)
    planted = Planted("batch", 2, 100.0, batch=2)
    if not killed:
        (folder / "metrics.json").write_text(json.dumps(metrics(planted, 100.0)))
    (folder / "manifest.json").write_text(json.dumps(_manifest()))
    for number in range(2):
        lines = [step(number, index) for index in range(num_steps)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"steps_rank_{number}.jsonl").write_text(text + ('{"step": 9' if killed else ""))
    _write_lines(
        folder / "samples_rank_0.jsonl",
        [
            {"attempt": 1, "rank": 0, "t_s": 100.0 + 5 * n, "num_output_tokens": 500 * n,
             "cpu_percent": 90.0, "gpu": {"utilisation": 60}}
            for n in range(4)
        ],
    )  # fmt: skip
    _write_lines(folder / "requests.jsonl", [{"attempt": 1, "admitted_s": 100.0}])
    _write_lines(
        folder / "clock.jsonl",
        [{"attempt": 1, "t_s": 100.0, "of_rank": 1, "offset_s": -5.0, "error_s": 1e-5}],
    )
    return folder


def step(number: int, index: int) -> dict[str, Any]:
    """Step `index` on stage `number`: 10 ms idle or wait, 30 ms compute."""
    start_s = 100.0 + 5.0 * number + 0.04 * index + 0.02 * number
    return {
        "run": "0123456789ab", "attempt": 1, "rank": number, "stage": number, "t_s": start_s,
        "step": index, "slot": index % 2, "phase": "decode", "num_rows": 1, "num_tokens": 1,
        "start_s": start_s, "idle_s": 0.005, "wait_s": 0.005, "transfer_s": 0.0,
        "compute_s": 0.03, "overhead_s": 0.0, "send_s": 0.0, "bytes_in": 0, "bytes_out": 64,
    }  # fmt: skip


def _manifest() -> dict[str, Any]:
    return {
        "schema": 1,
        "run": "0123456789ab",
        "mpipipe": "0.9",
        "started": "2026-11-27T09:00:00+00:00",
        "argv": ["mpipipe", "run", "configs/demo.toml"],
        "git": {"commit": "1234567", "dirty": True},
        "config": {
            "pipeline": {"num_stages": 2, "num_slots": 2, "max_sequences_per_slot": 4},
        },
        "nodes": [
            {"host": "node0", "cpu_model": "EPYC", "num_cores": 2, "memory_bytes": 16 * GIB,
             "kernel": "6.1", "gpus": [], "container": None},
        ],
        "hosts": [{"rank": 0, "host": "node0"}, {"rank": 1, "host": "node0"}],
        "launch": {"num_nodes": 1, "num_ranks": 2, "launcher": "mpich", "mpi": "MPICH 5"},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "environment": {"OMP_NUM_THREADS": "1"},
        "attempts": [{"attempt": 1}],
    }  # fmt: skip


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
