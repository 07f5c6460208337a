"""A job over one or more simulated replicas: what happens when, one event after the other.

Of several replicas rank 0 dispatches, with its own code (`scheduler/replicas.py`) on both ends. Its
event loop also runs the head of replica 0, and takes messages one by one in the order in which they
come. Events at the same moment happen in the order in which they were foreseen, so equal jobs have
equal ends.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.messages import (
    DispatchBegan,
    DispatchEnded,
    NoMoreRequests,
    ReplicaTold,
    RequestsGiven,
)
from mpipipe.scheduler.replicas import Dispatch, ReplicaLink, ReplicaPlace
from mpipipe.simulation.hand_driven import HandDriven, SimulatedInbox, drive
from mpipipe.simulation.simulated_replica import (
    HeadProcess,
    MessageCount,
    SimulatedReplica,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpipipe.control_plane.messages import Message
    from mpipipe.metrics.lines import RequestRecord
    from mpipipe.scheduler.core import SchedulerCore
    from mpipipe.simulation.simulated_stages import SimulatedStages
    from mpipipe.simulation.stage_times import HeadTimes
    from mpipipe.types import Request

__all__ = ["DispatchCount", "ReplicaParts", "SimulatedJob"]

_HEAD = 0


@dataclass(frozen=True, slots=True)
class ReplicaParts:
    """What a replica is made of."""

    core: SchedulerCore
    stages: SimulatedStages
    capacity: int  # sequences that it runs at once
    shared_page_size: int = 0  # tokens of the pages that prompts share; 0: they share none


@dataclass(slots=True)
class DispatchCount:
    """What rank 0 exchanged with the heads of the replicas."""

    messages: MessageCount = field(default_factory=MessageCount)
    busy_s: float = 0.0
    longest_queue_s: float = 0.0  # that a message waited for rank 0


class _Post:
    """Messages between rank 0 and the heads: sent now, delivered by the job."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, Message]] = []
        self.inbox: SimulatedInbox[tuple[int, Message]] = SimulatedInbox("rank 0's")

    def send(self, to: int, message: Message) -> None:
        self.sent.append((to, message))

    def mailbox(self, *_types: type[Message]) -> SimulatedInbox[tuple[int, Message]]:
        return self.inbox

    def take_sent(self) -> list[tuple[int, Message]]:
        sent, self.sent = self.sent, []
        return sent


class SimulatedJob:
    """Runs requests through replicas to the end.

    Args:
        parts: of every replica.
        requests: to complete.
        times: what the heads take.
        stands_for: replicas of the real job for each of these: rank 0 takes as many times as long
            for its messages.
    """

    def __init__(
        self,
        parts: Sequence[ReplicaParts],
        requests: Sequence[Request],
        times: HeadTimes,
        *,
        stands_for: float = 1.0,
    ) -> None:
        self.clock = ScriptedClock()
        self.records: list[RequestRecord] = []
        self.sent = MessageCount()  # of the head of replica 0 to its stages
        self.rank_0 = HeadProcess()
        self.dispatched = DispatchCount()
        self.replicas: list[SimulatedReplica] = []
        self._links: list[ReplicaLink] = []
        self._parts = parts
        self._requests = requests
        self._times = times
        self._stands_for = stands_for
        self._post = _Post()
        self._dispatch: Dispatch | None = None
        self._dispatching: HandDriven[object] | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._foreseen: dict[int, float] = {}  # by replica: its next step comes back

    def run(self) -> None:
        """To the end, or until nothing can happen any more: see `deadlocks`."""
        if len(self._parts) == 1:
            self._begin_alone()
        else:
            self._begin_dispatch()
        while self._events:
            at_s, _, happen = heapq.heappop(self._events)
            self.clock.advance(max(0.0, at_s - self.clock.now_s()))
            happen()
        if (
            self._dispatch is not None
            and self._dispatching is not None
            and self._dispatching.is_over
        ):
            drive(self._dispatch.end())

    def deadlocks(self) -> list[str]:
        """Who waits for what, after `run`; empty: all has ended."""
        found = []
        for number, replica in enumerate(self.replicas):
            if (what := replica.stuck()) is not None:
                found.append(f"replica {number}: {what}")
            elif not replica.is_over:
                found.append(f"replica {number}: it waits for requests, or for word that none come")
        if self._dispatching is not None and not self._dispatching.is_over:
            ended = {record.completion.index for record in self.records}
            left = [request for request in self._requests if request.index not in ended]
            found.append(f"rank 0: it waits for {len(left)} requests that have not ended")
        if found:
            found += self._unfinished()
        return found

    def _unfinished(self) -> list[str]:
        ended = {record.completion.index for record in self.records}
        left = [request for request in self._requests if request.index not in ended]
        return [
            f"request {request.request_id}: {len(request.prompt_ids)} prompt tokens and at most "
            f"{request.sampling.max_new_tokens} new ones, not ended"
            for request in left[:8]
        ]

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    # ---- steps -----------------------------------------------------------------------------------

    def _replica(
        self,
        parts: ReplicaParts,
        on_request: Callable[[RequestRecord], None],
        link: ReplicaLink | None,
    ) -> None:
        is_first = not self.replicas
        self.replicas.append(
            SimulatedReplica(
                parts.core,
                parts.stages,
                self.clock,
                self.rank_0 if is_first else HeadProcess(),
                self._times,
                on_request=on_request,
                link=link,
                count=self.sent if is_first else None,
            )
        )

    def _begin_alone(self) -> None:
        self._replica(self._parts[0], self.records.append, None)
        self._at(0.0, lambda: self._act(0, lambda replica: replica.begin(self._requests)))

    def _act(self, number: int, act: Callable[[SimulatedReplica], None]) -> None:
        """Let a replica do something; then send what it says, and foresee its next step."""
        replica = self.replicas[number]
        act(replica)
        for _, message in self._post.take_sent():
            self._at(self.clock.now_s() + self._way_s(number), _Telling(self, number, message))
        next_s = replica.next_event_s
        if next_s is not None and self._foreseen.get(number) != next_s:
            self._foreseen[number] = next_s
            self._at(next_s, lambda: self._step_returns(number, next_s))

    def _step_returns(self, number: int, foreseen_s: float) -> None:
        """The step comes back, unless what was sent since has changed when."""
        if self._foreseen.get(number) == foreseen_s:
            del self._foreseen[number]
            self._act(number, SimulatedReplica.take_step)

    # ---- rank 0 and the heads --------------------------------------------------------------------

    def _way_s(self, number: int) -> float:
        return self._times.message_s if number else 0.0

    def _begin_dispatch(self) -> None:
        for parts in self._parts:
            link = ReplicaLink(self._post, self.clock, capacity=parts.capacity)
            self._links.append(link)
            self._replica(parts, link.ended, link)
        places = [ReplicaPlace(n, parts.capacity) for n, parts in enumerate(self._parts)]
        self._dispatch = Dispatch(
            self._post,
            self.clock,
            self._requests,
            places,
            page_size=self._parts[0].shared_page_size,
            on_request=lambda record, _: self.records.append(record),
        )
        self._dispatching = HandDriven(self._dispatch.completions())
        self._at(0.0, self._dispatch_begins)

    def _dispatch_begins(self) -> None:
        assert self._dispatch is not None, "it was made"
        self._dispatch.begin()
        self._dispatch_goes_on()

    def _dispatch_goes_on(self) -> None:
        """Rank 0 does what it can now; what it says leaves one after the other."""
        assert self._dispatching is not None, "it was begun"
        self._dispatching.advance()
        for number, message in self._post.take_sent():
            self._book(message)
            at_s = self.rank_0.free_s + self._way_s(number)
            self._at(at_s, _Saying(self, number, message))

    def _book(self, message: Message) -> None:
        """Rank 0 sends or receives `message`."""
        times = self._times
        num_requests = 0
        if isinstance(message, RequestsGiven):
            num_requests = len(message.requests)
        elif isinstance(message, ReplicaTold):
            num_requests = len(message.records)
        seconds = times.dispatch_message_s + num_requests * times.dispatch_request_s
        seconds *= self._stands_for
        self.rank_0.work(self.clock.now_s(), seconds)
        self.dispatched.busy_s += seconds
        self.dispatched.messages.add(message)

    def told(self, number: int, message: Message) -> None:
        """A head's message has come to rank 0."""
        queue_s = max(0.0, self.rank_0.free_s - self.clock.now_s())
        self.dispatched.longest_queue_s = max(self.dispatched.longest_queue_s, queue_s)
        self._book(message)
        self._post.inbox.put((number, message))
        self._dispatch_goes_on()

    def said(self, number: int, message: Message) -> None:
        """A message of rank 0 has come to a head."""
        match message:
            case DispatchBegan():
                self._act(number, SimulatedReplica.begin)
            case RequestsGiven() | NoMoreRequests():
                self._act(number, lambda replica: replica.take(message))
            case DispatchEnded():
                pass
            case _:
                raise AssertionError(f"heads do not know {type(message).__name__}")


@dataclass(frozen=True, slots=True)
class _Telling:
    """A head's message on its way to rank 0."""

    job: SimulatedJob
    number: int
    message: Message

    def __call__(self) -> None:
        self.job.told(self.number, self.message)


@dataclass(frozen=True, slots=True)
class _Saying:
    """A message of rank 0 on its way to a head."""

    job: SimulatedJob
    number: int
    message: Message

    def __call__(self) -> None:
        self.job.said(self.number, self.message)
