"""The asyncio shell of the scheduler: carries the core's steps out and feeds the results back.

Runs on the head only. It detokenises as tokens arrive, watches for stop strings, and yields each
completion when its last token is known. It owns no decision but "the stop string is here".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpipipe.control_plane.messages import (
    LogprobsSampled,
    RequestClosed,
    RequestOpened,
    StepSampled,
    StepScheduled,
)
from mpipipe.errors import PromptError
from mpipipe.scheduler.detokenize import IncrementalDetokenizer, StopStrings
from mpipipe.scheduler.instructions import Closed, Emitted, Finished, Instruction, Opened
from mpipipe.types import Completion, FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.mesh import Mesh
    from mpipipe.metrics.log import Logger
    from mpipipe.scheduler.core import SchedulerCore

__all__ = ["Runner"]


@dataclass(slots=True)
class _Active:
    """A request under way on the head: its text and its times."""

    request: Request
    detokenizer: IncrementalDetokenizer
    stops: StopStrings
    submitted_s: float
    opened: bool = False  # its stages know it
    first_step_s: float | None = None
    first_token_s: float | None = None
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the request asked for log-probabilities."""
        return self.request.sampling.num_logprobs >= 0


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step whose results have not come back."""

    step: StepScheduled
    with_logprobs: bool  # a `LogprobsSampled` comes too


class Runner:
    """Drives one pipeline over a list of requests.

    Args:
        core: the scheduler; must hold no unfinished sequence.
        mesh: control messages; the runner receives `StepSampled` and `LogprobsSampled`.
        stage_ranks: the ranks that run steps, the head's own included.
        decode: token ids to text, special tokens skipped.
        clock: monotonic seconds.
        log: told of preemptions.
    """

    def __init__(
        self,
        *,
        core: SchedulerCore,
        mesh: Mesh,
        stage_ranks: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        clock: Clock,
        log: Logger,
    ) -> None:
        self._core = core
        self._mesh = mesh
        self._stage_ranks = tuple(stage_ranks)
        self._decode = decode
        self._clock = clock
        self._log = log
        self._active: dict[int, _Active] = {}
        self._in_flight: dict[int, _InFlight] = {}
        self._taken: StepSampled | None = None  # received, its log-probabilities not yet
        self._num_output_tokens = 0
        self._sampled = mesh.mailbox(StepSampled)
        self._logprobs = mesh.mailbox(LogprobsSampled)

    async def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        """Complete every request once; yield each completion as it ends, errors included."""
        for request in requests:
            error = self._submit(request)
            if error is not None:
                yield error
        while True:
            self._dispatch()
            if not self._in_flight:
                break
            for completion in await self._take():
                yield completion
        assert not self._active, f"{len(self._active)} requests were neither finished nor refused"

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of unfinished requests included."""
        return self._num_output_tokens

    def stage_ended(self) -> None:
        """No step comes back any more: fail whoever still waits for one."""
        self._sampled.close()
        self._logprobs.close()

    async def drain(self) -> None:
        """Abandon what is unfinished and wait for the steps in flight; nothing is left after."""
        abandoned, self._active = self._active, {}
        for sequence_id in abandoned:
            self._carry_out(self._core.stop(sequence_id, FinishReason.STOP), [])
        while self._in_flight:
            await self._take()

    # ---- towards the stages ----------------------------------------------------------------------

    def _submit(self, request: Request) -> Completion | None:
        now_s = self._clock.now_s()
        try:
            instructions = self._core.add(request)
        except PromptError as error:
            return Completion.refused(
                request.request_id, request.index, error, len(request.prompt_ids)
            )
        for instruction in instructions:
            assert isinstance(instruction, Opened), "adding a request only opens it"
            self._active[instruction.sequence_id] = _Active(
                request=request,
                detokenizer=IncrementalDetokenizer(self._decode),
                stops=StopStrings(request.sampling.stop),
                submitted_s=now_s,
            )
        return None

    def _dispatch(self) -> None:
        while (step := self._core.next_step()) is not None:
            for scheduled in step.sequences:
                self._open(scheduled.sequence_id)
            with_logprobs = any(
                scheduled.sample and self._active[scheduled.sequence_id].wants_logprobs
                for scheduled in step.sequences
            )
            self._in_flight[step.step] = _InFlight(step, with_logprobs)
            self._to_stages(step)
        for preempted in self._core.take_preemptions():
            self._log.info(
                "preempted",
                sequence=preempted.sequence_id,
                num_lost_tokens=preempted.num_lost_tokens,
            )

    def _open(self, sequence_id: int) -> None:
        active = self._active[sequence_id]
        if active.opened:
            return
        # Sent with the first step, not on submission: a long prompt file stays on the head.
        active.opened = True
        active.first_step_s = self._clock.now_s()
        request = active.request
        self._to_stages(RequestOpened(sequence_id, request.prompt_ids, request.sampling))

    def _to_stages(self, message: RequestOpened | StepScheduled | RequestClosed) -> None:
        for rank in self._stage_ranks:
            self._mesh.send(rank, message)

    # ---- back from the stages --------------------------------------------------------------------

    async def _take(self) -> list[Completion]:
        """Take the next step that came back; a cancelled call leaves it to the next one."""
        if self._taken is None:
            _, received = await self._sampled.get()
            assert isinstance(received, StepSampled)
            self._taken = received
        message = self._taken
        in_flight = self._in_flight[message.step]
        step = in_flight.step
        sampled = [s.sequence_id for s in step.sequences if s.sample]
        if in_flight.with_logprobs:
            await self._take_logprobs(step.step, sampled)
        self._taken = None
        del self._in_flight[message.step]
        completions: list[Completion] = []
        self._carry_out(self._core.sampled(message.step, message.token_ids), completions)
        return completions

    async def _take_logprobs(self, step: int, sampled: Sequence[int]) -> None:
        _, message = await self._logprobs.get()
        assert isinstance(message, LogprobsSampled)
        assert message.step == step, "log-probabilities come in the order of the steps"
        for sequence_id, logprobs in zip(sampled, message.logprobs, strict=True):
            active = self._active.get(sequence_id)
            if logprobs is not None and active is not None:
                active.logprobs.append(logprobs)

    def _carry_out(
        self, instructions: Iterable[Instruction], completions: list[Completion]
    ) -> None:
        for instruction in instructions:
            match instruction:
                case Emitted():
                    self._carry_out(self._emit(instruction), completions)
                case Finished() if instruction.sequence_id in self._active:
                    completions.append(self._finish(instruction))
                case Closed():
                    self._to_stages(RequestClosed(instruction.sequence_ids))

    def _emit(self, emitted: Emitted) -> Sequence[Instruction]:
        """Take one token; returns the core's answer when it completed a stop string."""
        active = self._active.get(emitted.sequence_id)
        if active is None:
            return ()  # stopped by an earlier token of the same step
        if active.first_token_s is None:
            active.first_token_s = self._clock.now_s()
        active.token_ids.append(emitted.token_id)
        self._num_output_tokens += 1
        if emitted.finish_reason is FinishReason.STOP:
            return ()  # the stop token is no text
        text, stopped = active.stops.push(active.detokenizer.push(emitted.token_id))
        active.text.append(text)
        if not stopped or emitted.finish_reason is not None:
            return ()
        return self._core.stop(emitted.sequence_id, FinishReason.STOP)

    def _finish(self, finished: Finished) -> Completion:
        active = self._active.pop(finished.sequence_id)
        assert active.token_ids, "a sequence finishes with at least one token"
        now_s = self._clock.now_s()
        reason = finished.reason
        text, stopped = active.stops.push(active.detokenizer.finish())
        active.text.extend((text, active.stops.finish()))
        if stopped or active.stops.stopped:
            reason = FinishReason.STOP
        request = active.request
        assert active.first_step_s is not None
        assert active.first_token_s is not None
        return Completion(
            request_id=request.request_id,
            index=request.index,
            text="".join(active.text),
            token_ids=tuple(active.token_ids),
            finish_reason=reason,
            num_prompt_tokens=len(request.prompt_ids),
            queue_s=active.first_step_s - active.submitted_s,
            ttft_s=active.first_token_s - active.submitted_s,
            latency_s=now_s - active.submitted_s,
            logprobs=tuple(active.logprobs) if active.wants_logprobs else None,
        )
