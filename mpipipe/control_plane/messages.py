"""The wire vocabulary: one frozen dataclass per message. Read this file first.

Messages travel between ranks as msgpack (see `codec`), tagged by `TAGS`. Fixed facts are sent once
(`RequestOpened`), then only deltas (`StepScheduled`). Fields are plain values: int, float, str,
bytes, bool, None, tuples of these, or other dataclasses.

Changing a message or a tag means raising `PROTOCOL_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.lines import RequestRecord
from mpipipe.planning.resources import RankResources
from mpipipe.types import Request, SamplingParams, TokenLogprobs

__all__ = [
    "PROTOCOL_VERSION", "TAGS", "BarrierEntered", "BarrierReleased", "Broadcast", "ClockAsked",
    "ClockTold", "ClocksCompared", "DecodeScheduled", "DispatchBegan", "DispatchEnded", "Echo",
    "GatherPart", "GenerationBegan", "GenerationEnded", "Heartbeat", "Hello", "LogprobsSampled",
    "Message", "NoMoreRequests", "PagesRestored", "PagesSaved", "PhaseReport", "PhaseVerdict",
    "RankLost", "ReplicaTold", "RequestClosed", "RequestOpened", "RequestsGiven",
    "ScheduledSequence", "SessionEnded", "StepSampled", "StepScheduled", "StepTimes",
    "StopRequested", "VerifiedSequence",
]  # fmt: skip

PROTOCOL_VERSION = 14


# ---- coming together -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """rank → head, first message: who this rank is and what it has.

    The first four fields keep their places in every version, so that a rank of another version can
    be named (`codec`).
    """

    rank: int
    world_size: int
    protocol_version: int
    package_version: str
    config_hash: str
    resources: RankResources

    @property
    def host(self) -> str:
        """Name of the rank's host."""
        return self.resources.host


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """rank → head: its outcome of a boot phase. `error_kind` is None when it went well."""

    phase: str
    rank: int
    error_kind: str | None = None
    error_message: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class PhaseVerdict:
    """head → all: go on, or stop with this (first, lowest-ranked) error."""

    phase: str
    rank: int = -1  # the rank that failed; -1 when all went well
    error_kind: str | None = None
    error_message: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class BarrierEntered:
    """rank → head: this rank is at the barrier `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class BarrierReleased:
    """head → all: every rank is at the barrier `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Broadcast:
    """head → all: one payload under a name."""

    name: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class GatherPart:
    """rank → head: its part of the gather `name`."""

    name: str
    payload: bytes


# ---- generating ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestOpened:
    """head → stages: the fixed facts of a sequence, once, or again where it starts over.

    `rotary_len`: tokens of the forward pass that begins the sequence in transformers' `generate`,
    the prompt's as a rule: what rotary embeddings that depend on the length see (`models.rotary`).
    `num_output_tokens`: how many of the last `prompt_ids` were sampled before it started over.
    """

    sequence_id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    rotary_len: int = 0
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step.

    `num_computed` tokens are already in the KV cache; this step computes the next `num_tokens`.
    The first after `RequestOpened` may begin at any page, behind those that others have filled.
    `new_pages` are appended to the sequence's page table, in the first with those of others.
    `sample`: these are its last known tokens, so the last stage draws the next one.
    """

    sequence_id: int
    num_computed: int
    num_tokens: int
    new_pages: tuple[int, ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class StepScheduled:
    """head → stages: run this micro-batch. Stages run steps in the order they were sent."""

    step: int
    slot: int
    sequences: tuple[ScheduledSequence, ...]
    steady: bool  # every slot is filled and decoding: such steps count for the steady-state bubble

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden state on every edge."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def num_sampled(self) -> int:
        """Length of the ids tensor that comes back from the last stage."""
        return sum(sequence.sample for sequence in self.sequences)

    @property
    def num_sequences(self) -> int:
        """Sequences that have a share of it."""
        return len(self.sequences)

    @property
    def has_chunks(self) -> bool:
        """Prompts are computed: no graph can hold it."""
        return True

    @property
    def phase(self) -> Literal["prefill"]:
        """Chunks of prompts alone."""
        return "prefill"


@dataclass(frozen=True, slots=True)
class VerifiedSequence:
    """One sequence's rows of a step that verifies drafts.

    `token_ids`: its last token, which no step has computed yet, then those that were drafted. Each
    is a row: the first at position `num_computed`. The page table is cut to the pages of
    `num_computed` tokens (drafts that were refused may have had more), then gets `new_pages`.
    """

    sequence_id: int
    num_computed: int
    token_ids: tuple[int, ...]
    new_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeScheduled:
    """head → stages: one token for every sequence of a slot's *decode batch* (launch-ahead).

    Every stage keeps the batch of each slot as a list of rows, in the same order, and changes it by
    these deltas, so that a step without changes is a few bytes whatever the batch size. In order:

    1. the rows `left` (ascending, of the batch before this step) are removed, the rest close up;
    2. the sequences `joined` are appended; their prompts are computed, and the token that their
       last chunk sampled may still be on its way;
    3. row `page_rows[i]` (numbered after 1 and 2) gets `new_pages[i]` appended to its page table.

    Then every row computes the one token that it sampled last, at the position after all it has
    computed so far, and samples the next one. `chunks` of prompts are computed behind the rows, as
    those of a `StepScheduled`; their sequences are no rows of the batch before a later step.

    With `verified` all rows leave the batch, none joins, and there are no chunks: the rows are the
    tokens of these sequences, one after the other, and every row samples what follows it. A
    sequence with a single token may join the batch in the next step; its sample is then the last
    one, as a prompt's.
    """

    step: int
    slot: int
    num_rows: int  # of the batch after the changes; each samples a token
    left: tuple[int, ...]
    joined: tuple[int, ...]  # sequence ids
    page_rows: tuple[int, ...]
    new_pages: tuple[int, ...]
    steady: bool  # as in StepScheduled
    chunks: tuple[ScheduledSequence, ...] = ()
    verified: tuple[VerifiedSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden state on every edge."""
        if not self.chunks:  # asked several times a step
            return self.num_rows
        return self.num_rows + sum([chunk.num_tokens for chunk in self.chunks])

    @property
    def num_sampled(self) -> int:
        """Length of the ids tensor that comes back from the last stage."""
        if not self.chunks:
            return self.num_rows
        return self.num_rows + sum([chunk.sample for chunk in self.chunks])

    @property
    def num_sequences(self) -> int:
        """Sequences that have a share of it."""
        return len(self.verified) or self.num_rows + len(self.chunks)

    @property
    def has_chunks(self) -> bool:
        """Prompts are computed: no graph can hold it."""
        return bool(self.chunks)

    @property
    def phase(self) -> Literal["decode", "mixed", "verify"]:
        """One token of each sequence, and perhaps chunks of prompts; or drafts."""
        if self.verified:
            return "verify"
        return "mixed" if self.chunks else "decode"


@dataclass(frozen=True, slots=True)
class RequestClosed:
    """head → stages: forget these sequences (finished or cancelled)."""

    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesSaved:
    """head → stages: copy the KV pages `pages` to `host_pages` of the host's pool, one to one.

    Before any step or restoring that comes after it: `pages` have new owners then.
    """

    pages: tuple[int, ...]
    host_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PagesRestored:
    """head → stages: copy `host_pages` to the last of `pages`, a sequence's page table from now on.

    The first of these, if there are more, hold its tokens already. The sequence goes on with
    `num_computed` tokens in all of them: as a row that joins a batch, or with the next chunk of its
    prompt. All else that the stages know of it stays.
    """

    sequence_id: int
    num_computed: int
    host_pages: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepSampled:
    """stage 0 → head: the ids of a step came back, in the order of its sampled sequences.

    A step that samples nothing (chunks of prompts only) reports an empty tuple.
    """

    step: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogprobsSampled:
    """last stage → head: log-probabilities, only for steps in which a sequence asked for them.

    One entry per sampled sequence of the step, None for a sequence that did not ask.
    """

    step: int
    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """stage → the stage that gets its results: when it had computed its steps, on its own clock.

    A batch at a time, and what is left at the end of a call. Every step is told once, in order.
    """

    first_step: int  # counted over all calls of the session
    computed_s: tuple[float, ...]  # of that step and those that follow it


@dataclass(frozen=True, slots=True)
class GenerationBegan:
    """head → all: a call of `generate` begins; stages account for their time from here."""


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """head → all: this call of `generate` is over; wait for the next one."""


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """head → all: leave the session."""


# ---- replicas: rank 0 hands requests to the heads of all of them, its own one included -----------


@dataclass(frozen=True, slots=True)
class DispatchBegan:
    """rank 0 → heads: a call of `generate` begins; ask for requests."""


@dataclass(frozen=True, slots=True)
class ReplicaTold:
    """head → rank 0: what has ended since the last one, how many more it wants, how it stands.

    The first of a call has no records: only after it does rank 0 hand requests to this head.
    Moments in `records` are on the clock of this head.
    """

    records: tuple[RequestRecord, ...]
    num_wanted: int  # requests, beside those that it asked for before
    sent_s: float  # on its clock
    num_output_tokens: int = 0  # this and the following: in this call so far
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_saved: int = 0  # of these, whose pages went to host memory
    num_shared_tokens: int = 0  # of prompts, not computed: they were in pages of others
    starved_s: float = 0.0  # it had no request, and might still get some
    is_done: bool = False  # no request is left here, and none will come; its last of this call
    drafts: DraftUse = field(default_factory=DraftUse)  # in this call so far


@dataclass(frozen=True, slots=True)
class RequestsGiven:
    """rank 0 → head: complete these; behind those that it has."""

    requests: tuple[Request, ...]
    waited_s: float  # since they were submitted, on rank 0


@dataclass(frozen=True, slots=True)
class NoMoreRequests:
    """rank 0 → head: none will come in this call. `stop`: send no further steps, too."""

    stop: bool


@dataclass(frozen=True, slots=True)
class DispatchEnded:
    """rank 0 → heads: all of them are done; end the call on the stages."""


# ---- at any time ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StopRequested:
    """rank → head: this rank was told to stop; head → all: stop, answer with the gather `stop`."""

    reason: str  # e.g. "SIGTERM on rank 1"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """rank → head, head → all, about every second: this rank is alive."""

    host: str = ""
    stage: int = -1  # -1: no plan yet
    step: int = -1  # the last one that it ran; -1: none yet
    phase: str = ""  # the latest boot phase
    booting: bool = True
    deaf_s: float = 0.0  # the longest time so far that it could not have answered


@dataclass(frozen=True, slots=True)
class RankLost:
    """the rank that noticed → all others: `rank` is silent. The sender tells the user; just end."""

    rank: int
    sentence: str


@dataclass(frozen=True, slots=True)
class ClockAsked:
    """head → rank: answer at once with the time."""

    number: int


@dataclass(frozen=True, slots=True)
class ClockTold:
    """rank → head: the time on its clock when it read the question."""

    number: int
    now_s: float


@dataclass(frozen=True, slots=True)
class ClocksCompared:
    """head → all: by rank, the seconds that its clock is ahead of the head's; NaN: not known."""

    ahead_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Echo:
    """Round-trip probe of `bench control`; `reply` says whether it is the answer."""

    number: int
    payload: bytes
    reply: bool


Message = (
    Hello | PhaseReport | PhaseVerdict | BarrierEntered | BarrierReleased | Broadcast | GatherPart
    | RequestOpened | StepScheduled | DecodeScheduled | RequestClosed | StepSampled
    | LogprobsSampled | GenerationBegan | GenerationEnded | SessionEnded | StopRequested
    | Heartbeat | RankLost | Echo | StepTimes | ClockAsked | ClockTold | ClocksCompared
    | DispatchBegan | ReplicaTold | RequestsGiven | NoMoreRequests | DispatchEnded
    | PagesSaved | PagesRestored
)  # fmt: skip

# Numbers are part of the protocol: never reuse one.
TAGS: dict[int, type[Message]] = {
    1: Hello,
    2: PhaseReport,
    3: PhaseVerdict,
    4: BarrierEntered,
    5: BarrierReleased,
    6: Broadcast,
    7: GatherPart,
    8: RequestOpened,
    9: StepScheduled,
    10: RequestClosed,
    11: StepSampled,
    12: LogprobsSampled,
    13: GenerationEnded,
    14: SessionEnded,
    15: Echo,
    16: DecodeScheduled,
    17: StopRequested,
    18: Heartbeat,
    19: RankLost,
    20: GenerationBegan,
    21: StepTimes,
    22: ClockAsked,
    23: ClockTold,
    24: ClocksCompared,
    25: DispatchBegan,
    26: ReplicaTold,
    27: RequestsGiven,
    28: NoMoreRequests,
    29: DispatchEnded,
    30: PagesSaved,
    31: PagesRestored,
}
