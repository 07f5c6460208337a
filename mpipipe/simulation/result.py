"""What a simulation says: the job, its stages, and what rank 0 had to do beside computing.

Shares and ratios are fractions of 1, `_s` seconds of the simulated job, `_per_s` per second of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["DispatchLoad", "HeadLoad", "SimulationResult", "StageResult"]


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage, the mean over the simulated replicas. The parts add up to the job's length."""

    stage: int
    host: str
    num_layers: int
    compute_s: float
    wait_s: float  # the stage before still computed the input, or the next was not there yet
    transfer_s: float  # the stage before was done, the input was not there
    send_s: float  # held up by sending
    idle_s: float  # nothing was scheduled
    steady_bubble: float | None  # while every slot was filled and decoding; None: it never was

    @property
    def bubble(self) -> float:
        """Share of the time without compute."""
        total_s = self.compute_s + self.wait_s + self.transfer_s + self.send_s + self.idle_s
        return 1 - self.compute_s / total_s if total_s else 0.0


@dataclass(frozen=True, slots=True)
class HeadLoad:
    """What the head of replica 0, on rank 0, sends to its own stages."""

    messages_per_s: float
    bytes_per_s: float
    busy_share: float  # deciding on steps and sending them; 0 where no time was given for it


@dataclass(frozen=True, slots=True)
class DispatchLoad:
    """What rank 0 exchanges with the heads of all replicas."""

    num_messages: int  # both ways
    num_bytes: int
    messages_per_s: float
    bytes_per_s: float
    requests_per_s: float
    busy_share: float  # of rank 0, with the given times a message and a request
    longest_queue_s: float  # that a message waited for rank 0


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """One simulated job."""

    num_replicas: int
    num_simulated_replicas: int  # each of them stands for equally many
    num_stages: int
    num_requests: int
    num_completed: int
    num_prompt_tokens: int
    num_output_tokens: int
    elapsed_s: float  # from the first step to the last completion
    num_steps: int  # of the simulated replicas, as the following counts
    num_preemptions: int
    num_recomputed_tokens: int
    num_shared_tokens: int  # of prompts, not computed: others begin with the same
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    replica_end_spread_s: float  # between the first and the last replica to end
    stages: tuple[StageResult, ...]
    head: HeadLoad
    dispatch: DispatchLoad | None  # None: a single replica
    deadlocks: tuple[str, ...]  # who waits for what; empty: none
    simulation_s: float = 0.0  # what the simulation itself took
    notes: tuple[str, ...] = field(default=())

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the whole job over its length."""
        return self.num_output_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def bubble(self) -> float:
        """Of all stages together."""
        return _mean([stage.bubble for stage in self.stages])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
