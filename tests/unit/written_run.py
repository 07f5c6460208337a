"""A run folder as schema 1 has it, written for tests: a few ranks, a few hundred steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN = "0123456789ab"
# Rank 1's clock is ahead by so much: add its offset for rank 0's clock.
AHEAD_S = 100.0
USUAL: Mapping[str, float] = {
    "idle_s": 0.0001,
    "wait_s": 0.0004,
    "transfer_s": 0.0001,
    "compute_s": 0.002,
    "overhead_s": 0.0003,
    "send_s": 0.0001,
}
BOOT = {
    "process": 0.1,
    "imports": 2.0,
    "mpi": 0.3,
    "configuration": 0.1,
    "handshake": 0.1,
    "read prompts": 0.1,
    "tokenizer": 0.2,
    "tokenise": 0.1,
    "plan": 0.1,
    "read weights": 0.5,
    "convert weights": 0.3,
    "cache": 0.1,
    "edges": 0.1,
    "wait": 0.2,
    "ready": 0.1,
}


def identity(rank: int, t_s: float, attempt: int = 1) -> dict[str, Any]:
    return {
        "run": RUN,
        "attempt": attempt,
        "job": None,
        "replica": 0,
        "rank": rank,
        "stage": rank,
        "t_s": t_s,
    }


@dataclass
class WrittenRun:
    """What to write; `write` does it. Times are rank 0's until they are written."""

    folder: Path
    num_ranks: int = 2
    num_steps: int = 400
    attempt: int = 1
    boot_s: dict[int, dict[str, float]] = field(default_factory=dict)  # rank → changes of BOOT
    read_bytes: int = 100_000_000
    parts: dict[int, dict[str, float]] = field(default_factory=dict)  # rank → changes of USUAL
    # (rank, step) → changes of that step's parts
    odd: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    cpu_share: dict[int, float] = field(default_factory=dict)  # CPU time over compute; 1.05
    switches_per_s: dict[int, float] = field(default_factory=dict)
    run_delay_share: dict[int, float] = field(default_factory=dict)  # of the generate phase
    node_cpu_percent: float = 60.0
    requests: Sequence[tuple[int, float, float, int]] | None = None  # slot, from, to, tokens
    events: Sequence[tuple[int, float, dict[str, Any]]] = ()  # rank, seconds of generating, fields
    num_messages: int = 0  # of the head to each other rank, and back, at the times of its steps
    num_slots: int = 2
    device: str = "cpu"

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        ends = [self._write_rank(rank) for rank in range(self.num_ranks)]
        self.generate_s = max(end - begin for begin, end in ends)
        self._write_requests(*ends[0])
        self._append("clock.jsonl", self._clock_lines(*ends[0]))
        self._write_documents(ends)
        return self.folder

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(row) for row in (self.folder / name).read_text().splitlines()]

    # ---- parts -----------------------------------------------------------------------------------

    def _append(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        with (self.folder / name).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _ahead(self, rank: int) -> float:
        return AHEAD_S * rank

    def _write_rank(self, rank: int) -> tuple[float, float]:
        begin_s, boot = self._boot(rank)
        steps, end_s = self._steps(rank, begin_s)
        self._append(f"steps_rank_{rank}.jsonl", steps)
        self._append(f"samples_rank_{rank}.jsonl", self._samples(rank, begin_s, end_s, steps))
        log = [
            *boot,
            self._event(rank, begin_s, event="generating"),
            *(
                self._event(rank, begin_s + after_s, **fields)
                for of_rank, after_s, fields in self.events
                if of_rank == rank
            ),
            self._event(rank, end_s, event="generated"),
            self._event(rank, end_s + 0.2, event="ended"),
        ]
        self._append(f"rank_{rank}.log", log)
        if self.num_messages:
            self._append(f"messages_rank_{rank}.jsonl", self._messages(rank, begin_s))
        return begin_s, end_s

    def _event(self, rank: int, t_s: float, **fields: Any) -> dict[str, Any]:
        return {
            **identity(rank, t_s + self._ahead(rank), self.attempt),
            "time": f"2026-11-27T10:00:{t_s % 60:09.6f}Z",
            "level": "info",
            "host": f"node{rank}",
            **fields,
        }

    def _boot(self, rank: int) -> tuple[float, list[dict[str, Any]]]:
        now_s = 10.0 * self.attempt
        ahead_s = self._ahead(rank)
        lines = []
        for name, seconds in {**BOOT, **self.boot_s.get(rank, {})}.items():
            fields = {
                "event": "boot",
                "name": name,
                "start_s": now_s + ahead_s,
                "end_s": now_s + seconds + ahead_s,
            }
            if name == "read weights":
                fields["bytes"] = self.read_bytes
            now_s += seconds
            lines.append(self._event(rank, now_s, **fields))
        return now_s, lines

    def _steps(self, rank: int, begin_s: float) -> tuple[list[dict[str, Any]], float]:
        now_s, lines = begin_s, []
        for step in range(self.num_steps):
            parts = {**USUAL, **self.parts.get(rank, {}), **self.odd.get((rank, step), {})}
            lines.append(
                {
                    **identity(rank, now_s + sum(parts.values()) + self._ahead(rank), self.attempt),
                    "step": step,
                    "slot": step % self.num_slots,
                    "phase": "prefill" if step < self.num_slots else "decode",
                    "num_rows": 4,
                    "num_tokens": 40 if step < self.num_slots else 4,
                    "start_s": now_s + self._ahead(rank),
                    **parts,
                    "bytes_in": 46_000,
                    "bytes_out": 46_000,
                }
            )
            now_s += sum(parts.values())
        return lines, now_s

    def _samples(
        self, rank: int, begin_s: float, end_s: float, steps: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        share = self.cpu_share.get(rank, 1.05)
        computed_s = sum(step["compute_s"] for step in steps)
        percent = 100 * share * computed_s / (end_s - begin_s)
        rate, delay = self.switches_per_s.get(rank, 5.0), self.run_delay_share.get(rank)
        head = rank == 0
        return [
            {
                **identity(rank, t_s + self._ahead(rank), self.attempt),
                "num_output_tokens": round(1600 * done) if head else None,
                "num_running": 8 if head else None,
                "num_waiting": 0 if head else None,
                "kv_pages_used": 12 if head else None,
                "num_kv_pages": 64 if head else None,
                "num_steps": round(self.num_steps * done),
                "cpu_percent": percent,
                "node_cpu_percent": self.node_cpu_percent,
                "rss_bytes": 500_000_000,
                "io_read_bytes": 1000,
                "io_write_bytes": round(1e6 * done),
                "net_rx_bytes": 0,
                "net_tx_bytes": 0,
                "num_involuntary_switches": round(rate * (t_s - begin_s)),
                **({} if delay is None else {"run_delay_s": delay * (t_s - begin_s)}),
                "gpu": None,
            }
            for done in (0.0, 0.5, 1.0)
            for t_s in (begin_s + done * (end_s - begin_s),)
        ]

    def _write_requests(self, begin_s: float, end_s: float) -> None:
        whole_s = end_s - begin_s
        spans = self.requests
        if spans is None:
            spans = [(index % self.num_slots, 0.0, 1.0, 50) for index in range(8)]
        lines = []
        for index, (slot, since, until, num_tokens) in enumerate(spans):
            admitted_s, finished_s = begin_s + since * whole_s, begin_s + until * whole_s
            lines.append(
                {
                    **identity(0, finished_s, self.attempt),
                    "id": f"p{index}",
                    "index": index,
                    "slot": slot,
                    "arrived_s": begin_s,
                    "admitted_s": admitted_s,
                    "first_token_s": admitted_s + 0.01,
                    "finished_s": finished_s,
                    "queue_s": admitted_s - begin_s,
                    "ttft_s": admitted_s + 0.01 - begin_s,
                    "latency_s": finished_s - begin_s,
                    "num_prompt_tokens": 10,
                    "num_output_tokens": num_tokens,
                    "num_preemptions": 0,
                    "itl_p50_s": 0.004,
                    "itl_p95_s": 0.006,
                    "finish_reason": "length",
                    "error_kind": None,
                }
            )
        self._append("requests.jsonl", lines)

    def _messages(self, rank: int, begin_s: float) -> list[dict[str, Any]]:
        """Of the head with each other rank: a step's message, 20 µs on its way, and an answer."""
        lines = []
        for number in range(self.num_messages):
            sent_s = begin_s + 0.003 * number
            for peer in range(1, self.num_ranks) if rank == 0 else (0,):
                ways = ("sent", "received") if rank == 0 else ("received", "sent")
                kinds = ("StepScheduled", "StepTimes")
                ends_s = (sent_s, sent_s + 0.001) if rank == 0 else (sent_s + 2e-5, sent_s + 9e-4)
                for way, kind, at_s in zip(ways, kinds, ends_s, strict=True):
                    lines.append(
                        {
                            **identity(rank, at_s + self._ahead(rank), self.attempt),
                            "way": way, "kind": kind, "peer": peer, "number": number, "bytes": 56,
                        }
                    )  # fmt: skip
        return lines

    def _clock_lines(self, begin_s: float, end_s: float) -> list[dict[str, Any]]:
        return [
            {
                **identity(0, t_s, self.attempt),
                "of_rank": rank,
                "offset_s": -self._ahead(rank),
                "error_s": 0.0 if rank == 0 else 8e-6,
            }
            for t_s in (begin_s, end_s)
            for rank in range(self.num_ranks)
        ]

    def _write_documents(self, ends: Sequence[tuple[float, float]]) -> None:
        attempts = [
            {"attempt": number, "started": "2026-11-27T10:00:00+00:00", "unix_s": 0.0, "t_s": 0.0,
             "job": None, "hosts": ["node0", "node1"], "num_kept": 0}
            for number in range(1, self.attempt + 1)
        ]  # fmt: skip
        manifest = {
            "schema": 1, "run": RUN, "mpipipe": "0.1", "started": "2026-11-27T10:00:00+00:00",
            "argv": ["mpipipe", "run"], "git": None, "attempts": attempts,
            "config": {"name": "test"}, "plan": {"num_slots": self.num_slots,
            "device": self.device}, "hashes": {}, "nodes": [], "hosts": [],
            "launch": {"num_ranks": self.num_ranks}, "environment": {"OMP_NUM_THREADS": "1"},
            "doctor": None, "versions": {"python": "3.12"},
        }  # fmt: skip
        (self.folder / "manifest.json").write_text(json.dumps(manifest))
        ranks = []
        for rank, (begin_s, end_s) in enumerate(ends):
            steps = [
                line
                for line in self.lines(f"steps_rank_{rank}.jsonl")
                if line["attempt"] == self.attempt
            ]
            parts = {name: sum(step[name] for step in steps) for name in USUAL}
            overall = {**parts, "wall_s": end_s - begin_s}
            stage = {"stage": rank, "num_steps": self.num_steps, "overall": overall}
            ranks.append({"rank": rank, "host": f"node{rank}", "stage": stage})
        metrics = {
            "schema": 1, "run": RUN, "attempt": self.attempt, "state": "done",
            "phases": {"generate_s": self.generate_s}, "requests": {"num_completed": 8},
            "output_tokens_per_s": 400.0, "total_tokens_per_s": 500.0, "bubble_ratio": 0.3,
            "ranks": ranks, "time": {"preprocessing_s": 0.4, "io_read_s": 0.5, "io_write_s": 0.01,
            "communication_s": 0.1}, "itl_p50_s": 0.004, "itl_p95_s": 0.006, "energy_j": None,
            "total": {},
            "attempts": [{"attempt": number, "state": "done" if number == self.attempt
            else "interrupted"} for number in range(1, self.attempt + 1)],
        }  # fmt: skip
        (self.folder / "metrics.json").write_text(json.dumps(metrics))
