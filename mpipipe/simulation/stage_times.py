"""How long a step takes on each stage and on each edge: what a simulation is told, not measured.

`ScriptedTimes` are constants, `recorded_run` learns them from a run, and `planned_times` takes them
from the planner's predictor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["HeadTimes", "ScriptedTimes", "StageTimes", "StepWork"]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes. Equal work takes equal time."""

    rows: int = 0  # sequences that decode one token
    context_tokens: int = 0  # mean tokens in the cache of one of them, the new one included
    chunk_tokens: int = 0  # of prompts
    # Mean tokens before a prompt token in its sequence: half of the chunk, and what is computed.
    chunk_context_tokens: int = 0
    num_sampled: int = 0  # tokens drawn at the end, those of the rows included

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden state on every edge."""
        return self.rows + self.chunk_tokens


class StageTimes(Protocol):
    """The times of one replica's stages and edges, in seconds."""

    def compute_s(self, work: StepWork, step: int) -> tuple[float, ...]:
        """What `work`, that of the step with this number, takes on each stage."""
        ...

    def hops_s(self, num_tokens: int) -> tuple[float, ...]:
        """What hidden states of so many tokens take from each stage but the last to the next."""
        ...

    @property
    def ids_s(self) -> float:
        """What sampled ids take from the last stage to the first; 0 of a single stage."""
        ...


@dataclass(frozen=True, slots=True)
class HeadTimes:
    """What heads take beside computing, in seconds; a process does one thing after the other."""

    step_s: float = 0.0  # to decide on a step and send it to all stages
    message_s: float = 0.0  # on the way to another rank, of any message
    notice_s: float = 0.0  # from the arrival of ids on stage 0 until the scheduler has them
    # Of rank 0, dispatching to replicas: for each message sent or received, and for each request
    # that is in it.
    dispatch_message_s: float = 0.0
    dispatch_request_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScriptedTimes:
    """Constant times for every step, and one for every token of a prompt.

    Attributes:
        decode_s: of a decode step, by stage.
        prefill_s: of a prompt token, by stage.
        hop_s: of one hop, whatever it carries.
    """

    decode_s: Sequence[float]
    prefill_s: Sequence[float] = ()
    hop_s: float = 0.0

    def compute_s(self, work: StepWork, step: int) -> tuple[float, ...]:  # noqa: ARG002 - of any
        """As `StageTimes`: the parts of a mixed step add up."""
        each_s = self.prefill_s or (0.0,) * len(self.decode_s)
        return tuple(
            decode_s * (work.rows > 0) + token_s * work.chunk_tokens
            for decode_s, token_s in zip(self.decode_s, each_s, strict=True)
        )

    def hops_s(self, num_tokens: int) -> tuple[float, ...]:  # noqa: ARG002 - of any size
        """As `StageTimes`."""
        return (self.hop_s,) * (len(self.decode_s) - 1)

    @property
    def ids_s(self) -> float:
        """As `StageTimes`."""
        return self.hop_s if len(self.decode_s) > 1 else 0.0
