"""The lines of a run's JSONL files, as text: of steps, requests, messages and clocks.

Each begins with whose it is (`identity`) and `t_s`, seconds of this rank's monotonic clock. Times
have nine digits behind the point, so that the parts of a step still add up. What the fields mean is
told in `mpipipe/logs/FILES.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from mpipipe.metrics.summary import percentile
from mpipipe.types import Completion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpipipe.metrics.accounting import StepRecord
    from mpipipe.metrics.identity import RunIdentity

__all__ = [
    "MessageRecord",
    "RequestRecord",
    "json_line",
    "line_start",
    "message_line",
    "request_fields",
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


def request_fields(record: RequestRecord, replica: int = 0, *, token_times: bool) -> dict[str, Any]:
    """The fields of a request that ran on `replica`; `token_times`: with the time of each token."""
    completion, gaps_s = record.completion, sorted(record.gaps_s())
    ran = record.admitted_s is not None and completion.error_kind is None
    fields = {
        "id": completion.request_id,
        "index": completion.index,
        "on_replica": replica,
        "slot": record.slot,
        "arrived_s": _rounded(record.arrived_s),
        "admitted_s": _rounded(record.admitted_s),
        "first_token_s": _rounded(record.token_s[0] if record.token_s else None),
        "finished_s": _rounded(record.finished_s),
        "queue_s": _rounded(completion.queue_s if ran else None),
        "ttft_s": _rounded(completion.ttft_s if ran else None),
        "latency_s": _rounded(completion.latency_s if ran else None),
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": completion.num_output_tokens,
        "num_preemptions": record.num_preemptions,
        "itl_p50_s": _rounded(percentile(gaps_s, 50)),
        "itl_p95_s": _rounded(percentile(gaps_s, 95)),
        "finish_reason": completion.finish_reason.value,
        "error_kind": completion.error_kind,
    }
    if token_times:
        fields["token_s"] = [_rounded(time_s) for time_s in record.token_s]
    return fields


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 9)
