"""One replica: the real core and the real runner, fed with what simulated stages give back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mpipipe.clock import ScriptedClock
from mpipipe.control_plane.codec import encode
from mpipipe.control_plane.messages import (
    DecodeScheduled,
    Message,
    NoMoreRequests,
    PagesRestored,
    PagesSaved,
    RequestClosed,
    RequestOpened,
    RequestsGiven,
    StepSampled,
    StepScheduled,
)
from mpipipe.metrics.log import NullLog
from mpipipe.scheduler.runner import Runner
from mpipipe.scheduler.texts import TextMaker
from mpipipe.simulation.hand_driven import HandDriven, SimulatedInbox
from mpipipe.simulation.simulated_requests import FILLER_ID, STOP_ID, scripted_stop
from mpipipe.simulation.simulated_stages import SimulatedStages
from mpipipe.simulation.stage_times import HeadTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mpipipe.control_plane.group import RankGroup
    from mpipipe.metrics.lines import RequestRecord
    from mpipipe.scheduler.core import SchedulerCore
    from mpipipe.scheduler.replicas import ReplicaLink
    from mpipipe.types import Request

__all__ = ["HeadProcess", "MessageCount", "SimulatedReplica"]

_TEXT_OF_TOKEN = "word"  # four bytes, as a token of English text has


@dataclass(slots=True)
class MessageCount:
    """Control messages and their bytes as they are encoded."""

    num_messages: int = 0
    num_bytes: int = 0

    def add(self, message: Message, copies: int = 1) -> None:
        """Count `message`, sent to `copies` ranks."""
        if copies:
            self.num_messages += copies
            self.num_bytes += copies * len(encode(message))


@dataclass(slots=True)
class HeadProcess:
    """A head's event loop, which does one thing after the other. Seconds of the simulation."""

    free_s: float = 0.0  # it has done all that it was given
    busy_s: float = 0.0

    def work(self, now_s: float, seconds: float) -> float:
        """Do something that takes so long, at `now_s` or when it can; returns when it is done."""
        self.free_s = max(self.free_s, now_s) + seconds
        self.busy_s += seconds
        return self.free_s


class _StageGroup:
    """What the runner sends to the ranks of its pipeline, and the tokens that come back."""

    def __init__(
        self,
        stages: SimulatedStages,
        clock: ScriptedClock,
        process: HeadProcess,
        times: HeadTimes,
        count: MessageCount | None,
    ) -> None:
        self.num_in_flight = 0
        self._stages = stages
        self._clock = clock
        self._process = process
        self._times = times
        self._count = count
        self._num_others = stages.num_ranks - 1
        self._stops: dict[int, list[int]] = {}  # by sequence: tokens made, and when it stops
        self.inbox: SimulatedInbox[tuple[int, Message]] = SimulatedInbox("the runner's")

    def mailbox(self, *types: type[Message]) -> SimulatedInbox[tuple[int, Message]]:
        """All that comes is in one mailbox; log-probabilities never do."""
        return self.inbox if StepSampled in types else SimulatedInbox("not used")

    def broadcast_message(self, message: Message) -> None:
        """As `RankGroup`: what the stages do from here on is known at once."""
        match message:
            case StepScheduled() | DecodeScheduled():
                done_s = self._process.work(self._clock.now_s(), self._times.step_s)
                self._stages.send(message, done_s + self._times.message_s * (self._num_others > 0))
                self.num_in_flight += 1
            case RequestOpened():
                self._stages.open(message.sequence_id)
                stop = scripted_stop(message.sampling)
                if stop is not None:
                    self._stops[message.sequence_id] = [message.num_output_tokens, stop]
            case RequestClosed():
                self._stages.close(message.sequence_ids)
                for sequence_id in message.sequence_ids:
                    self._stops.pop(sequence_id, None)
            case PagesRestored():
                self._stages.restore(message)
            case PagesSaved():
                pass  # the copy runs beside the steps
            case _:
                raise AssertionError(f"the stages do not know {type(message).__name__}")
        if self._count is not None:
            self._count.add(message, self._num_others)

    def bring_back(self) -> None:
        """Put the tokens of the next step that comes back into the mailbox."""
        step, sequence_ids = self._stages.take_return()
        self.num_in_flight -= 1
        token_ids = (FILLER_ID,) * step.num_sampled
        if self._stops:
            token_ids = tuple([self._token_id(sequence_id) for sequence_id in sequence_ids])
        self.inbox.put((0, StepSampled(step.step, token_ids)))

    def _token_id(self, sequence_id: int) -> int:
        stop = self._stops.get(sequence_id)
        if stop is None:
            return FILLER_ID
        stop[0] += 1
        return STOP_ID if stop[0] == stop[1] else FILLER_ID


class SimulatedReplica:
    """A scheduler, its runner, its stages, and what is under way on them.

    Args:
        core: decides.
        stages: take the time.
        clock: of the simulation.
        process: the head's.
        times: what the head takes.
        link: to rank 0; None: all requests are known from the start.
        on_request: told of every request that has ended.
        count: of the messages that the head sends to its stages; None: they are not counted.
    """

    def __init__(
        self,
        core: SchedulerCore,
        stages: SimulatedStages,
        clock: ScriptedClock,
        process: HeadProcess,
        times: HeadTimes,
        *,
        on_request: Callable[[RequestRecord], None],
        link: ReplicaLink | None = None,
        count: MessageCount | None = None,
    ) -> None:
        self.core = core
        self.stages = stages
        self.ended_s = 0.0  # when it last did something
        self._clock = clock
        self._notice_s = times.notice_s
        self._group = _StageGroup(stages, clock, process, times, count)
        self._runner = Runner(
            core=core,
            group=cast("RankGroup", self._group),
            texts=TextMaker(_text_of),
            clock=clock,
            log=NullLog(),
            on_request=on_request,
            link=link,
        )
        self._generating: HandDriven[object] | None = None

    @property
    def next_event_s(self) -> float | None:
        """When the next step comes back; None: none is on its way."""
        noticed_s = self.stages.next_return_s
        return None if noticed_s is None else noticed_s + self._notice_s

    @property
    def is_over(self) -> bool:
        """It has nothing more to do in this call."""
        return self._generating is not None and self._generating.is_over

    def begin(self, requests: Iterable[Request] = ()) -> None:
        """Begin the call, with what is known."""
        self._generating = HandDriven(self._runner.generate(requests))
        self._go_on()

    def take(self, message: RequestsGiven | NoMoreRequests) -> None:
        """What rank 0 says has come."""
        self._group.inbox.put((0, message))
        self._go_on()

    def take_step(self) -> None:
        """The step that comes back now is here."""
        self._group.bring_back()
        self._go_on()

    def _go_on(self) -> None:
        assert self._generating is not None, "it was begun"
        self.ended_s = self._clock.now_s()
        try:
            self._generating.advance()
        except AssertionError:  # the runner has found out itself: `stuck` says more
            if self.stuck() is None:
                raise

    def stuck(self) -> str | None:
        """What holds it up for good: sequences are left, and no step is on its way; None: nothing.

        A request that comes may still help, so ask when none can.
        """
        if self._group.num_in_flight or self.core.is_idle:
            return None
        now = self.core.statistics()
        return (
            f"no step is in flight and the scheduler sends none, with {now.num_running} sequences "
            f"in slots, {now.num_waiting} waiting, and {now.num_free_pages} of {now.num_pages} KV "
            "pages free"
        )


def _text_of(token_ids: Sequence[int]) -> str:
    return _TEXT_OF_TOKEN * len(token_ids)
