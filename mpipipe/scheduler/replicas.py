"""Both ends of the messages between rank 0, which hands requests out, and the replicas' heads.

`Dispatch` is rank 0's end: it carries out what the pure `dispatcher` decides. `ReplicaLink` is the
end of a head, which feeds its `runner`: it asks for as many requests as keep its pipeline busy, so
that what waits can still go to the replica that is free first. Rank 0 has both, as any other head.

One call of `generate`: DispatchBegan → every head asks (ReplicaTold) → RequestsGiven and
ReplicaTold as often as needed → NoMoreRequests → the last ReplicaTold of each → DispatchEnded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from mpipipe.control_plane.messages import (
    DispatchBegan,
    DispatchEnded,
    NoMoreRequests,
    ReplicaTold,
    RequestsGiven,
)
from mpipipe.metrics.drafts import DraftUse
from mpipipe.metrics.replicas import ReplicaTotals
from mpipipe.scheduler.dispatcher import Dispatcher

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.mailbox import Mailbox
    from mpipipe.control_plane.messages import Message
    from mpipipe.metrics.lines import RequestRecord
    from mpipipe.scheduler.instructions import SchedulerStatistics
    from mpipipe.types import Completion, Request

__all__ = ["Dispatch", "Messages", "ReplicaLink", "ReplicaPlace"]

T = TypeVar("T")

_HEAD = 0  # the rank that dispatches
_TELL_S = 0.25  # how often a head tells how it stands while nothing ends
# A frame of more than that keeps the event loop of either end for milliseconds.
_TOKENS_AT_ONCE = 1 << 15
_REQUESTS_AT_ONCE = 256
# Requests that wait in a replica, per sequence that it runs at once: half of it is gone before it
# asks again. More than an eighth must wait for prompts to interrupt decoding
# (`policy.fill_threshold`), and fewer than all, or the last ones are not shared evenly.
_RESERVE = 1 / 4


class Messages(Protocol):
    """The part of `Mesh` that is needed here."""

    def send(self, to: int, message: Message) -> None:
        """As `Messenger.send`."""

    def mailbox(self, *types: type[Message]) -> Mailbox[tuple[int, Message]]:
        """As `Messenger.mailbox`."""


# ---- a replica's end -----------------------------------------------------------------------------


class ReplicaLink:
    """What a replica's head tells rank 0 and asks of it, in one call of `generate`.

    Args:
        messages: carries them.
        clock: monotonic seconds.
        capacity: sequences that the replica runs at once.

    Attributes:
        is_open: requests may still come.
    """

    def __init__(self, messages: Messages, clock: Clock, *, capacity: int) -> None:
        self.is_open = True
        self._messages = messages
        self._clock = clock
        self._capacity = capacity
        self._reserve = max(1, int(capacity * _RESERVE))
        self._num_asked = 0  # and not given
        self._has_asked = False
        self._records: list[RequestRecord] = []
        self._told_s = -math.inf
        self._starved_s = 0.0

    def ended(self, record: RequestRecord) -> None:
        """A request has ended; told with the next `turn`."""
        self._records.append(record)

    def given(self, message: RequestsGiven) -> float:
        """Requests have come; returns when they were submitted, in seconds of this clock."""
        self._num_asked -= len(message.requests)
        return self._clock.now_s() - message.waited_s

    def closed(self) -> None:
        """No more requests will come."""
        self.is_open = False

    def starved(self, seconds: float) -> None:
        """The replica had nothing to do for so long, and might have got a request."""
        self._starved_s += seconds

    def turn(self, statistics: SchedulerStatistics, num_output_tokens: int) -> None:
        """Tell what has ended, and ask for what keeps the replica busy, if there is either."""
        num_wanted = self._wanted(statistics.num_waiting)
        is_due = self._clock.now_s() - self._told_s >= _TELL_S
        if num_wanted or self._records or is_due:
            self._tell(statistics, num_output_tokens, num_wanted)

    def done(self, statistics: SchedulerStatistics, num_output_tokens: int) -> None:
        """The last word of this call: no request is left here."""
        self._tell(statistics, num_output_tokens, 0, is_done=True)

    def _wanted(self, num_waiting: int) -> int:
        """How many requests to ask for now: at first as many as run at once."""
        if not self.is_open:
            return 0
        num_coming = num_waiting + self._num_asked
        if not self._has_asked:
            return max(1, self._capacity - num_coming)
        return 0 if num_coming > self._reserve // 2 else self._reserve - num_coming

    def _tell(
        self,
        statistics: SchedulerStatistics,
        num_output_tokens: int,
        num_wanted: int,
        *,
        is_done: bool = False,
    ) -> None:
        records, self._records = self._records, []
        self._has_asked = True
        self._num_asked += num_wanted
        self._told_s = self._clock.now_s()
        told = ReplicaTold(
            records=(),
            num_wanted=0,
            sent_s=self._told_s,
            num_output_tokens=num_output_tokens,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            num_preemptions=statistics.num_preemptions,
            num_saved=statistics.num_saved,
            num_shared_tokens=statistics.num_shared_tokens,
            starved_s=self._starved_s,
            drafts=statistics.drafts,
        )
        *parts, last = _in_parts(records, _num_output_tokens)
        for part in parts:
            self._messages.send(_HEAD, replace(told, records=part))
        last_told = replace(told, records=last, num_wanted=num_wanted, is_done=is_done)
        self._messages.send(_HEAD, last_told)


# ---- rank 0's end --------------------------------------------------------------------------------


class Dispatch:
    """One call of `generate` over all replicas, on rank 0.

    Args:
        messages: carries them.
        clock: monotonic seconds.
        requests: to complete, each once.
        replicas: of each replica its head and the sequences that it runs at once.
        page_size: tokens of the pages that prompts share; 0: they share none.
        ahead_s: by rank, how far its clock is ahead of this one; NaN: not known.
        on_request: told of every request that has ended, by this rank's clock, and by its replica.
    """

    def __init__(
        self,
        messages: Messages,
        clock: Clock,
        requests: Iterable[Request],
        replicas: Sequence[ReplicaPlace],
        *,
        page_size: int = 0,
        ahead_s: Callable[[int], float] = lambda _: 0.0,
        on_request: Callable[[RequestRecord, int], object] = lambda _record, _replica: None,
    ) -> None:
        self._messages = messages
        self._clock = clock
        capacities = [replica.capacity for replica in replicas]
        self._dispatcher = Dispatcher(requests, capacities, page_size)
        self._ahead_s = ahead_s
        self._on_request = on_request
        self._replicas = [_Replica(number, place) for number, place in enumerate(replicas)]
        self._by_rank = {replica.place.head: replica for replica in self._replicas}
        self._began_s = self._ended_s = 0.0
        self._is_stopped = False
        self._inbox = messages.mailbox(ReplicaTold)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of unfinished requests included, as last told."""
        return sum(replica.told.num_output_tokens for replica in self._replicas)

    @property
    def num_running(self) -> int:
        """Sequences in slots, as last told."""
        return sum(replica.told.num_running for replica in self._replicas)

    @property
    def num_waiting(self) -> int:
        """Requests without a place: here, and in the replicas as last told."""
        waiting = sum(replica.told.num_waiting for replica in self._replicas)
        return self._dispatcher.num_waiting + waiting

    @property
    def num_preemptions(self) -> int:
        """Of all replicas, as last told."""
        return sum(replica.told.num_preemptions for replica in self._replicas)

    @property
    def num_saved(self) -> int:
        """Of these, whose pages went to host memory."""
        return sum(replica.told.num_saved for replica in self._replicas)

    @property
    def drafts(self) -> DraftUse:
        """Of all replicas, as last told."""
        return sum((replica.told.drafts for replica in self._replicas), DraftUse())

    @property
    def num_shared_tokens(self) -> int:
        """Of prompts, those that were not computed, as last told."""
        return sum(replica.told.num_shared_tokens for replica in self._replicas)

    def totals(self) -> tuple[ReplicaTotals, ...]:
        """What each replica did, once the call has ended."""
        return tuple(replica.totals(self._began_s, self._ended_s) for replica in self._replicas)

    def begin(self) -> None:
        """Tell the replicas; the requests count as submitted now. `end` must follow."""
        self._began_s = self._clock.now_s()
        self._send_to_heads(DispatchBegan())

    async def completions(self) -> AsyncGenerator[Completion, None]:
        """Complete every request once; yield each completion as it is told, errors included.

        After `stop`, only those that end with the steps in flight.
        """
        while not self._is_over:
            for record in await self._take():
                yield record.completion
        num_left = self._dispatcher.num_waiting + self._dispatcher.num_held
        assert self._is_stopped or not num_left, f"{num_left} requests were not completed"

    def stop(self) -> None:
        """Hand out no more; the replicas send no more steps."""
        self._is_stopped = True
        self._dispatcher.stop()
        for replica in self._replicas:
            if self._dispatcher.has_asked(replica.number):  # else it is told when it has
                self._tell_no_more(replica)

    async def end(self) -> None:
        """Abandon what is unfinished; when all replicas are done, end the call on all of them."""
        if not self._is_over:
            self.stop()
        while not self._is_over:
            await self._take()
        self._ended_s = self._clock.now_s()
        self._send_to_heads(DispatchEnded())

    def replica_ended(self) -> None:
        """This rank's own replica tells no more: fail the task that still waits for it."""
        self._inbox.close()

    @property
    def _is_over(self) -> bool:
        return all(replica.told.is_done for replica in self._replicas)

    def _send_to_heads(self, message: Message) -> None:
        for replica in self._replicas:
            self._messages.send(replica.place.head, message)

    async def _take(self) -> list[RequestRecord]:
        """The records of the next message, once what follows from it is sent."""
        source, told = await self._inbox.get()
        assert isinstance(told, ReplicaTold), told
        replica = self._by_rank[source]
        records = [self._on_this_clock(record, source, told) for record in told.records]
        for record in records:
            self._dispatcher.ended(replica.number, record.completion.index)
        replica.take(told, self._clock.now_s())
        if not told.is_done:
            self._dispatcher.asked(replica.number, told.num_wanted)
            self._hand_out()
        for record in records:
            self._on_request(record, replica.number)
        return records

    def _hand_out(self) -> None:
        waited_s = self._clock.now_s() - self._began_s
        for given in self._dispatcher.hand_out():
            head = self._replicas[given.replica].place.head
            for part in _in_parts(given.requests, _num_prompt_tokens):
                self._messages.send(head, RequestsGiven(part, waited_s))
        if self._dispatcher.num_waiting:
            return
        for replica in self._replicas:
            if self._dispatcher.has_asked(replica.number) and not replica.knows_end:
                self._tell_no_more(replica)

    def _tell_no_more(self, replica: _Replica) -> None:
        if not replica.told.is_done:
            replica.knows_end = True
            self._messages.send(replica.place.head, NoMoreRequests(self._is_stopped))

    def _on_this_clock(
        self, record: RequestRecord, source: int, told: ReplicaTold
    ) -> RequestRecord:
        """Moments of another host's clock; as long as it is not known, a message's way off."""
        ahead_s = self._ahead_s(source)
        if math.isnan(ahead_s):
            ahead_s = told.sent_s - self._clock.now_s()
        return record.shifted(-ahead_s) if ahead_s else record


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Where a replica is, for rank 0."""

    head: int  # the rank of its stage 0
    capacity: int  # sequences that it runs at once


_NOTHING_TOLD = ReplicaTold((), 0, 0.0)


@dataclass(slots=True)
class _Replica:
    """What rank 0 knows of a replica in this call."""

    number: int
    place: ReplicaPlace
    told: ReplicaTold = _NOTHING_TOLD  # the latest
    knows_end: bool = False
    done_s: float = 0.0
    num_completed: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    def take(self, told: ReplicaTold, now_s: float) -> None:
        self.told, self.done_s = replace(told, records=()), now_s
        for record in told.records:
            completion = record.completion
            if completion.error_kind is not None:
                self.num_failed += 1
                continue
            self.num_completed += 1
            self.num_prompt_tokens += completion.num_prompt_tokens
            self.num_output_tokens += completion.num_output_tokens

    def totals(self, began_s: float, ended_s: float) -> ReplicaTotals:
        return ReplicaTotals(
            replica=self.number,
            head_rank=self.place.head,
            num_completed=self.num_completed,
            num_failed=self.num_failed,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=self.told.num_preemptions,
            generate_s=ended_s - began_s,
            starved_s=self.told.starved_s,
            tail_s=ended_s - self.done_s,
        )


def _num_output_tokens(record: RequestRecord) -> int:
    return record.completion.num_output_tokens


def _num_prompt_tokens(request: Request) -> int:
    return len(request.prompt_ids)


def _in_parts(items: Sequence[T], num_tokens: Callable[[T], int]) -> list[tuple[T, ...]]:
    """`items` in parts that are no longer than a frame should be; one, perhaps empty, at least."""
    parts: list[list[T]] = [[]]
    tokens = 0
    for item in items:
        tokens += num_tokens(item)
        if parts[-1] and (tokens > _TOKENS_AT_ONCE or len(parts[-1]) == _REQUESTS_AT_ONCE):
            parts.append([])
            tokens = num_tokens(item)
        parts[-1].append(item)
    return [tuple(part) for part in parts]
