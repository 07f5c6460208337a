"""How steps pass through the stages of a replica: who computes, waits, sends, and when.

Every stage runs the steps in the order in which the head sent them, so a step's whole passage
follows from those before it: nothing here is an event, and nothing is undone later.

On a CPU (`in_stream` False) hidden states and ids travel beside the compute; an edge carries one at
a time. On a GPU a stage's queue does one thing after the other: a hidden state travels when the
sender has computed it and the receiver has come to it, and both stand still meanwhile. The first
stage receives ids right before the step that needs them, or one round later, or when it has nothing
else to do, and only then does the head know them (`stage/worker.py`).

Edges that share a network card do not slow each other down, and KV pages move between device and
host in no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.control_plane.messages import PagesRestored
from mpipipe.metrics.accounting import StepRecord
from mpipipe.simulation.followed_steps import FollowedSteps, Step
from mpipipe.simulation.stage_times import StageTimes

__all__ = ["SimulatedStages", "StageUse"]


@dataclass(slots=True)
class StageUse:
    """What one stage did, in seconds; the rest of the time it waited or had nothing to do."""

    compute_s: float = 0.0
    wait_s: float = 0.0  # the stage before still computed the input, or the next was not there yet
    transfer_s: float = 0.0  # the stage before was done, the input was not there
    send_s: float = 0.0  # held up by sending
    free_s: float = 0.0  # when it has done all that was sent so far
    steady_compute_s: float = 0.0  # of steady steps that follow a steady step
    steady_s: float = 0.0  # from the end of the step before to theirs


@dataclass(slots=True)
class _Passage:
    """A step on a stage: the moments at which its time is cut (`metrics/accounting.py`)."""

    free_s: float  # the step before had left
    due_s: float  # it could be taken up
    came_s: float  # and the stage before was done with it
    begin_s: float  # its input was there
    end_s: float
    sent_s: float  # the receiver had come to it
    left_s: float  # the result had left


@dataclass(slots=True)
class _Returning:
    """The ids of a step on their way to the head."""

    step: Step
    sequence_ids: tuple[int, ...]  # that were sampled; only if asked for
    arrival_s: float  # on the first stage
    noticed_s: float | None = None  # None: when the first stage has nothing else to do


class SimulatedStages:
    """The stages and edges of one replica.

    Args:
        times: of its stages and edges.
        num_stages: of the pipeline.
        followed: which rows its steps have; new.
        in_stream: as a GPU's queue does it: see above.
        launch_s: of a stage's host for each step, before its device can begin with it.
        num_ranks: of all lanes of all stages; 0: a rank is a stage.
        keep_sequences: remember which sequences each step samples.
        trace_steps: of how many of the last steps to keep records.
    """

    def __init__(
        self,
        times: StageTimes,
        *,
        num_stages: int,
        followed: FollowedSteps,
        in_stream: bool,
        launch_s: float = 0.0,
        num_ranks: int = 0,
        keep_sequences: bool = False,
        trace_steps: int = 0,
    ) -> None:
        self.uses = [StageUse() for _ in range(num_stages)]
        self.records: list[deque[StepRecord]] = [
            deque(maxlen=trace_steps) for _ in range(num_stages if trace_steps else 0)
        ]
        self.num_ranks = num_ranks or num_stages
        self._times = times
        self._in_stream = in_stream and num_stages > 1
        self._launch_s = launch_s
        self._launched_s = [0.0] * num_stages
        self._keep_sequences = keep_sequences
        self._followed = followed
        self._edges_free_s = [0.0] * num_stages
        self._returning: deque[_Returning] = deque()
        self._num_claimed = 0  # of `_returning`: their time of notice is known
        self._ids_at_s: dict[int, float] = {}  # of the steps that may still be needed
        self._was_steady = False

    @property
    def next_return_s(self) -> float | None:
        """When the scheduler learns the next ids, if nothing is sent until then; None: never."""
        if not self._returning:
            return None
        first = self._returning[0]
        if first.noticed_s is None:
            return max(first.arrival_s, self.uses[0].free_s)
        return first.noticed_s

    def take_return(self) -> tuple[Step, tuple[int, ...]]:
        """The step whose ids are there at `next_return_s`, and whom it sampled if that is kept."""
        now_s = self.next_return_s
        assert now_s is not None, "some step is on its way"
        if self._returning[0].noticed_s is None:
            self.uses[0].free_s = now_s  # its queue stood at the receive
        else:
            self._num_claimed -= 1
        returned = self._returning.popleft()
        return returned.step, returned.sequence_ids

    def send(self, step: Step, scheduled_s: float) -> None:
        """The head sends `step`; all stages have the message at `scheduled_s`."""
        work, needed = self._followed.follow(step)
        ready_s = self._tokens_ready_s(step, needed, scheduled_s)
        compute_s = self._times.compute_s(work, step.step)
        arrival_s = self._pass(step, (scheduled_s, ready_s), compute_s, work.num_tokens)
        self._was_steady = step.steady
        self._ids_at_s[step.step] = arrival_s
        self._ids_at_s.pop(step.step - 4 * self._followed.num_slots, None)
        sampled = self._followed.sampled(step) if self._keep_sequences else ()
        returning = _Returning(step, sampled, arrival_s)
        if not self._in_stream:
            returning.noticed_s = arrival_s
            self._num_claimed += 1
        self._returning.append(returning)

    def open(self, sequence_id: int) -> None:
        """A sequence begins, or begins again."""
        self._followed.open(sequence_id)

    def close(self, sequence_ids: Sequence[int]) -> None:
        """Sequences have ended."""
        self._followed.close(sequence_ids)

    def restore(self, restored: PagesRestored) -> None:
        """The pages of a sequence come back from host memory, before the next step, in no time."""
        self._followed.restore(restored)

    def _tokens_ready_s(self, step: Step, needed: int, scheduled_s: float) -> float:
        """When the first stage has the tokens that `step` reads, and can begin with it."""
        assert needed < step.step, f"step {step.step} reads tokens of step {needed}"
        if len(self.uses) == 1:
            return scheduled_s
        if not self._in_stream:
            return max(scheduled_s, self._ids_at_s.get(needed, 0.0))
        needed = max(needed, step.step - self._followed.num_slots)
        ready_s = max(self.uses[0].free_s, scheduled_s)
        for position in range(self._num_claimed, len(self._returning)):
            returning = self._returning[position]
            if returning.step.step > needed:
                break
            ready_s = max(ready_s, returning.arrival_s)
            returning.noticed_s = ready_s
            self._num_claimed += 1
        return ready_s

    def _pass(
        self,
        step: Step,
        first_s: tuple[float, float],
        compute_s: tuple[float, ...],
        num_tokens: int,
    ) -> float:
        """Through all stages; returns when the ids are on the first one."""
        scheduled_s, ready_s = first_s
        hops_s = (0.0, *self._times.hops_s(num_tokens))
        in_stream, edges_free_s, launched_s = self._in_stream, self._edges_free_s, self._launched_s
        passages: list[_Passage] = []
        end_s = ready_s  # of the stage before; on the first one the ids take no time here
        for stage, use in enumerate(self.uses):
            due_s = launched_s[stage] if launched_s[stage] > scheduled_s else scheduled_s
            due_s = launched_s[stage] = due_s + self._launch_s
            due_s = use.free_s if use.free_s > due_s else due_s
            if in_stream:  # both hold still for the transfer
                sent_s = end_s if end_s > due_s else due_s
                begin_s = sent_s + hops_s[stage]
                if stage:
                    passages[-1].sent_s, passages[-1].left_s = sent_s, begin_s
            else:
                sent_s = end_s if end_s > edges_free_s[stage] else edges_free_s[stage]
                arrival_s = edges_free_s[stage] = sent_s + hops_s[stage]
                begin_s = arrival_s if arrival_s > due_s else due_s
            came_s = end_s if end_s > due_s else due_s
            end_s = begin_s + compute_s[stage]
            passages.append(_Passage(use.free_s, due_s, came_s, begin_s, end_s, end_s, end_s))
        self._book(step, passages, compute_s)
        return end_s + self._times.ids_s

    def _book(self, step: Step, passages: list[_Passage], compute_s: tuple[float, ...]) -> None:
        counts = step.steady and self._was_steady
        for stage, (use, passage) in enumerate(zip(self.uses, passages, strict=True)):
            use.free_s = passage.left_s
            use.compute_s += compute_s[stage]
            use.wait_s += passage.came_s - passage.due_s + passage.sent_s - passage.end_s
            use.transfer_s += passage.begin_s - passage.came_s
            use.send_s += passage.left_s - passage.sent_s
            if counts:
                use.steady_compute_s += compute_s[stage]
                use.steady_s += passage.left_s - passage.free_s
            if self.records:
                self.records[stage].append(_record(step, passage, compute_s[stage]))


def _record(step: Step, passage: _Passage, compute_s: float) -> StepRecord:
    return StepRecord(
        step=step.step,
        slot=step.slot,
        num_tokens=step.num_tokens,
        num_sampled=step.num_sampled,
        start_s=passage.free_s,
        scheduled_s=passage.due_s,
        input_ready_s=passage.begin_s,
        compute_end_s=passage.end_s,
        send_end_s=passage.left_s,
        steady=step.steady,
        num_sequences=step.num_sequences,
        phase=step.phase,
        compute_s=compute_s,
    )
