"""The lines of a run's JSONL files, as text: of steps, requests, messages and clocks.

Each begins with whose it is (`identity`) and `t_s`, seconds of this rank's monotonic clock. Times
have nine digits behind the point, so that the parts of a step still add up. What the fields mean is
told in `mpipipe/logs/FILES.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any, Literal

from mpipipe.metrics.summary import percentile
from mpipipe.types import Completion

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mpipipe.metrics.accounting import StepRecord
    from mpipipe.metrics.identity import RunIdentity

__all__ = [
    "MessageRecord",
    "RequestRecord",
    "json_line",
    "line_start",
    "message_line",
    "request_line",
    "step_line",
]


def line_start(identity: RunIdentity) -> str:
    """What every line of a rank begins with, as JSON without its last brace."""
    return json.dumps(identity.fields())[:-1]


def json_line(start: str, t_s: float, fields: Mapping[str, Any]) -> str:
    """One line: whose it is, when it was made, and `fields`."""
    text = json.dumps({"t_s": round(t_s, 9), **fields}, ensure_ascii=False, allow_nan=False)
    return f"{start}, {text[1:]}\n"


def step_line(start: str, record: StepRecord, transfer_s: float | None) -> str:
    """The line of a step; `transfer_s` None: how its wait divides is not known.

    Written by hand, as a run has many: a third of the time that `json` takes.
    """
    waited_s = record.input_ready_s - record.scheduled_s
    busy_s = record.compute_end_s - record.input_ready_s
    transfer = "null" if transfer_s is None else f"{transfer_s:.9f}"
    return (
        f'{start}, "t_s": {record.send_end_s:.9f}, "step": {record.step}, "slot": {record.slot}, '
        f'"phase": "{record.phase}", "num_rows": {record.num_sequences}, '
        f'"num_tokens": {record.num_tokens}, "start_s": {record.start_s:.9f}, '
        f'"idle_s": {record.scheduled_s - record.start_s:.9f}, '
        f'"wait_s": {max(0.0, waited_s - (transfer_s or 0.0)):.9f}, "transfer_s": {transfer}, '
        f'"compute_s": {record.compute_s:.9f}, '
        f'"overhead_s": {max(0.0, busy_s - record.compute_s):.9f}, '
        f'"send_s": {record.send_end_s - record.compute_end_s:.9f}, '
        f'"bytes_in": {record.bytes_in}, "bytes_out": {record.bytes_out}}}\n'
    )


@dataclass(frozen=True, slots=True)
class MessageRecord:
    """A control message that left this rank for another, or came from one."""

    at_s: float  # it was handed to MPI, or delivered
    way: Literal["sent", "received"]
    kind: str  # the class of the message
    peer: int  # the other rank
    number: int  # from 0, of all messages on this way between the two: the same on both ranks
    num_bytes: int


def message_line(start: str, record: MessageRecord) -> str:
    """The line of a control message; by hand, as that of a step."""
    return (
        f'{start}, "t_s": {record.at_s:.9f}, "way": "{record.way}", "kind": "{record.kind}", '
        f'"peer": {record.peer}, "number": {record.number}, "bytes": {record.num_bytes}}}\n'
    )


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that has ended, in seconds of the head's clock; None where it did not come so far.

    `token_s` has the time of each token: that at which its step came back.
    """

    completion: Completion
    slot: int | None
    arrived_s: float | None
    admitted_s: float | None  # its first step was sent
    finished_s: float
    num_preemptions: int
    token_s: tuple[float, ...]

    @staticmethod
    def refused(completion: Completion, now_s: float) -> RequestRecord:
        """Of a request that was never run."""
        return RequestRecord(completion, None, None, None, now_s, 0, ())

    def shifted(self, seconds: float) -> RequestRecord:
        """The same on a clock that is ahead by `seconds`."""
        moments = (self.arrived_s, self.admitted_s)
        arrived_s, admitted_s = (None if at_s is None else at_s + seconds for at_s in moments)
        return replace(
            self,
            arrived_s=arrived_s,
            admitted_s=admitted_s,
            finished_s=self.finished_s + seconds,
            token_s=tuple([at_s + seconds for at_s in self.token_s]),
        )

    def gaps_s(self) -> list[float]:
        """Between a token and the next one."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]


def request_line(
    start: str,
    record: RequestRecord,
    gaps_s: Iterable[float],
    *,
    replica: int = 0,
    token_times: bool,
) -> str:
    """The line of a request that ran on `replica`; by hand, as that of a step.

    `gaps_s`: those of `record`; `token_times`: with the time of each token.
    """
    completion, gaps_s = record.completion, sorted(gaps_s)
    ran = record.admitted_s is not None and completion.error_kind is None
    queue_s, ttft_s, latency_s = completion.queue_s, completion.ttft_s, completion.latency_s
    slot = "null" if record.slot is None else record.slot
    error_kind = completion.error_kind
    times = ""
    if token_times:
        times = f', "token_s": [{", ".join([f"{at_s:.9f}" for at_s in record.token_s])}]'
    return (
        f'{start}, "t_s": {record.finished_s:.9f}, '
        f'"id": {encode_basestring(completion.request_id)}, "index": {completion.index}, '
        f'"on_replica": {replica}, "slot": {slot}, "arrived_s": {_told(record.arrived_s)}, '
        f'"admitted_s": {_told(record.admitted_s)}, '
        f'"first_token_s": {_told(record.token_s[0] if record.token_s else None)}, '
        f'"finished_s": {record.finished_s:.9f}, "queue_s": {_told(queue_s if ran else None)}, '
        f'"ttft_s": {_told(ttft_s if ran else None)}, '
        f'"latency_s": {_told(latency_s if ran else None)}, '
        f'"num_prompt_tokens": {completion.num_prompt_tokens}, '
        f'"num_output_tokens": {completion.num_output_tokens}, '
        f'"num_preemptions": {record.num_preemptions}, '
        f'"itl_p50_s": {_told(percentile(gaps_s, 50))}, '
        f'"itl_p95_s": {_told(percentile(gaps_s, 95))}, '
        f'"finish_reason": "{completion.finish_reason.value}", '
        f'"error_kind": {"null" if error_kind is None else encode_basestring(error_kind)}'
        f"{times}}}\n"
    )


def _told(seconds: float | None) -> str:
    return "null" if seconds is None else f"{seconds:.9f}"
