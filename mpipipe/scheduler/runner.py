"""The asyncio shell of the scheduler: carries the core's steps out and feeds the results back.

Runs on the head only. It watches for stop strings as tokens arrive (only then does it look at a
token by itself), and yields each completion when its last token is known. It owns no decision but
"the stop string is here".

The next steps are sent before completions are made and yielded: no stage waits for text. Long texts
are made in a thread (`texts`), and what they belong to is yielded when they come.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, cast

from mpipipe.control_plane.messages import (
    LogprobsSampled,
    NoMoreRequests,
    RequestClosed,
    RequestOpened,
    RequestsGiven,
    StepSampled,
    StepScheduled,
)
from mpipipe.errors import PromptError
from mpipipe.metrics.lines import RequestRecord
from mpipipe.scheduler.instructions import Closed, Finished, TokensEmitted
from mpipipe.scheduler.policy import admission_order
from mpipipe.types import Completion, FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.group import RankGroup
    from mpipipe.control_plane.mailbox import Mailbox
    from mpipipe.control_plane.messages import DecodeScheduled
    from mpipipe.metrics.log import Logger
    from mpipipe.scheduler.core import SchedulerCore
    from mpipipe.scheduler.detokenize import StopWatch
    from mpipipe.scheduler.instructions import Instruction
    from mpipipe.scheduler.replicas import ReplicaLink
    from mpipipe.scheduler.texts import TextMaker, Texts

__all__ = ["Runner"]

_NUM_RECENT = 4096
_NUM_KEPT_ROWS = 16  # more than slots


@dataclass(slots=True)
class _Active:
    """A request under way on the head: its times, and its text if that can end it."""

    request: Request
    submitted_s: float
    watch: StopWatch | None  # None: no stop strings, the text is made when all tokens are known
    slot: int | None = None  # of its first step
    first_step_s: float | None = None
    num_preemptions: int = 0
    token_s: list[float] = field(default_factory=list)  # when the step of each token came back
    error: PromptError | None = None  # the tokenizer failed on its tokens
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class _Ended:
    """A request whose last token is known."""

    active: _Active
    finished: Finished
    ended_s: float  # its last token was here
    text: str | PromptError | None = None  # None: it is still to be made of the tokens
    reason: FinishReason | None = None  # None: as the core said

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens that are text."""
        ids = self.finished.token_ids
        return ids[:-1] if self.finished.reason is FinishReason.STOP else ids


@dataclass(frozen=True, slots=True)
class _TextsMade:
    """What comes back from the thread that makes texts, through the mailbox of the steps."""

    ended: list[_Ended]
    texts: asyncio.Future[Texts]


class Runner:
    """Drives one pipeline over a list of requests.

    Args:
        core: the scheduler; must hold no unfinished sequence.
        group: control messages to and from the ranks of the pipeline. The runner receives
            `StepSampled`, `LogprobsSampled`, and what rank 0 says to a `link`.
        texts: makes texts of token ids.
        clock: monotonic seconds.
        log: told of preemptions.
        on_request: told of every request that has ended.
        link: to rank 0, which hands requests to this replica; None: all of them are known.
    """

    def __init__(
        self,
        *,
        core: SchedulerCore,
        group: RankGroup,
        texts: TextMaker,
        clock: Clock,
        log: Logger,
        on_request: Callable[[RequestRecord], None] | None = None,
        link: ReplicaLink | None = None,
    ) -> None:
        self._core = core
        self._group = group
        self._texts = texts
        self._clock = clock
        self._log = log
        self._on_request = on_request
        self._link = link
        self._num_making = 0  # times that texts are being made beside the event loop
        self._ready: deque[_Ended] = deque()  # with their texts, and not yielded yet
        self._active: dict[int, _Active] = {}
        self._watches: dict[int, StopWatch] = {}  # of the active ones with stop strings
        # By step: the sequences whose log-probabilities come too, in a message of their own.
        self._in_flight: dict[int, tuple[int, ...]] = {}
        self._taken: StepSampled | None = None  # received, its log-probabilities not yet
        self._refused: deque[Completion] = deque()  # recorded, and not yielded yet
        self._num_output_tokens = 0
        self._times_of: dict[tuple[int, ...], list[list[float]]] = {}  # see `_token_times`
        self._busy_s = 0.0  # deciding on steps and taking their tokens, in the current turn
        self._turns_s: deque[float] = deque(maxlen=_NUM_RECENT)  # one step back, the next one sent
        self._stopped = False
        self._inbox = cast(
            "Mailbox[tuple[int, object]]",
            group.mailbox(StepSampled, RequestsGiven, NoMoreRequests),
        )
        self._logprobs = group.mailbox(LogprobsSampled)

    async def generate(self, requests: Iterable[Request]) -> AsyncGenerator[Completion, None]:
        """Complete every request once; yield each completion as it ends, errors included.

        They start in `admission_order`, sharers together. With a link to rank 0 also those that it
        gives. After `stop`, only those that end with the steps in flight.
        """
        now_s = self._clock.now_s()
        for request in self._core.in_order(admission_order(requests)):
            self._submit(request, now_s)
        self._dispatch()
        self._end_turn()
        while self._refused:
            yield self._refused.popleft()
        while self._in_flight or self._is_fed or self._num_making:
            ended = await self._take()
            if ended is not None:
                self._dispatch()
                self._make_texts(ended)
            while self._ready:
                completed = self._ready.popleft()
                completion = self._complete(completed)
                self.record(completion, completed.active)
                yield completion
            self._end_turn()
            while self._refused:
                yield self._refused.popleft()
        if self._stopped:
            await self.drain()
        assert not self._active, f"{len(self._active)} requests were neither finished nor refused"
        if self._link is not None:
            self._link.done(self._core.statistics(), self._num_output_tokens)

    @property
    def us_per_step(self) -> float | None:
        """Median microseconds from a step's tokens to the next steps sent; None before any."""
        return median(self._turns_s) * 1e6 if self._turns_s else None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of unfinished requests included."""
        return self._num_output_tokens

    def stop(self) -> None:
        """Send no more steps: what is in flight comes back, then `generate` ends."""
        self._stopped = True

    def stage_ended(self) -> None:
        """No step comes back any more: fail the tasks that still wait for one."""
        self._inbox.close()
        self._logprobs.close()

    async def drain(self) -> None:
        """Abandon what is unfinished and wait for the steps in flight; nothing is left after."""
        abandoned, self._active = self._active, {}
        self._watches.clear()
        self._stopped = True
        for sequence_id in abandoned:
            self._carry_out(self._core.stop(sequence_id, FinishReason.STOP), [])
        while self._in_flight:
            await self._take()

    # ---- towards the stages ----------------------------------------------------------------------

    def _submit(self, request: Request, submitted_s: float) -> None:
        try:
            sequence_id = self._core.add(request)
        except PromptError as error:
            num_prompt_tokens = len(request.prompt_ids)
            refused = Completion.rejected(
                request.request_id, request.index, error, num_prompt_tokens
            )
            self.record(refused)
            self._refused.append(refused)
            return
        watch = self._texts.watch(request.sampling.stop)
        if watch is not None:
            self._watches[sequence_id] = watch
        self._active[sequence_id] = _Active(request, submitted_s, watch)

    def _dispatch(self) -> None:
        if self._stopped:
            return
        started_s = self._clock.now_s()
        while (step := self._next_step()) is not None:
            chunks = step.sequences if isinstance(step, StepScheduled) else step.chunks
            for chunk in chunks:
                if self._core.begins(chunk.sequence_id, step.step):
                    self._open(chunk.sequence_id, step.slot)
            self._in_flight[step.step] = self._core.logprob_rows(step.step)
            self._group.broadcast_message(step)
        self._turns_s.append(self._busy_s + self._clock.now_s() - started_s)
        self._busy_s = 0.0
        for preempted in self._core.take_preemptions():
            self._active[preempted.sequence_id].num_preemptions += 1
            self._log.info(
                "preempted",
                request=self._active[preempted.sequence_id].request.request_id,
                sequence=preempted.sequence_id,
                num_lost_tokens=preempted.num_lost_tokens,
                num_saved_pages=preempted.num_saved_pages,
                num_free_pages=self._core.statistics().num_free_pages,
            )

    def _next_step(self) -> StepScheduled | DecodeScheduled | None:
        """The core's next step. What it moves between device and host goes out before it."""
        step = self._core.next_step()
        for move in self._core.take_page_moves():
            self._group.broadcast_message(move)
        return step

    def _open(self, sequence_id: int, slot: int) -> None:
        """Tell the stages of a sequence that starts, or starts over.

        With its first step, not on submission: a long prompt file stays on the head.
        """
        active = self._active[sequence_id]
        if active.first_step_s is None:
            active.first_step_s, active.slot = self._clock.now_s(), slot
        token_ids = self._core.known_tokens(sequence_id)
        rotary_len = self._core.rotary_len(sequence_id)
        request = active.request
        num_output_tokens = len(token_ids) - len(request.prompt_ids)
        self._log.debug(
            "admitted",
            request=request.request_id,
            sequence=sequence_id,
            slot=slot,
            num_tokens=len(token_ids),
            num_shared_tokens=self._core.num_shared_tokens(sequence_id),  # in pages of others
            num_output_tokens=num_output_tokens,  # more than 0: it was preempted
        )
        self._group.broadcast_message(
            RequestOpened(sequence_id, token_ids, request.sampling, rotary_len, num_output_tokens)
        )

    # ---- back from the stages --------------------------------------------------------------------

    async def _take(self) -> list[_Ended] | None:
        """Take the next step that came back, or do what rank 0 says; None: texts have come instead.

        A cancelled call leaves the step to the next one.
        """
        if self._taken is None:
            received = await self._receive()
            if isinstance(received, _TextsMade):
                self._num_making -= 1
                self._take_texts(received.ended, received.texts.result())
                return None
            if not isinstance(received, StepSampled):
                self._follow(received)
                return []
            self._taken = received
        message = self._taken
        if with_logprobs := self._in_flight[message.step]:
            await self._take_logprobs(message.step, with_logprobs)
        self._taken = None
        del self._in_flight[message.step]
        ended: list[_Ended] = []
        started_s = self._clock.now_s()
        self._carry_out(self._core.sampled(message.step, message.token_ids), ended)
        while accepted := self._core.accepted():
            self._carry_out(accepted, ended)
        self._busy_s += self._clock.now_s() - started_s
        return ended

    async def _receive(self) -> object:
        if self._in_flight or self._link is None:
            return (await self._inbox.get())[1]
        started_s = self._clock.now_s()
        _, received = await self._inbox.get()
        self._link.starved(self._clock.now_s() - started_s)
        return received

    @property
    def _is_fed(self) -> bool:
        """Whether rank 0 may still give requests."""
        return self._link is not None and self._link.is_open

    def _follow(self, message: object) -> None:
        """Do what rank 0 says."""
        assert self._link is not None, f"{message} without a link"
        match message:
            case RequestsGiven():
                submitted_s = self._link.given(message)
                for request in () if self._stopped else message.requests:
                    self._submit(request, submitted_s)
            case NoMoreRequests():
                self._link.closed()
                self._stopped = self._stopped or message.stop
            case _:
                raise AssertionError(f"the mailbox does not carry {type(message).__name__}")

    def _end_turn(self) -> None:
        """Tell rank 0 what it should know now."""
        if self._link is not None:
            self._link.turn(self._core.statistics(), self._num_output_tokens)

    async def _take_logprobs(self, step: int, sampled: Sequence[int]) -> None:
        _, message = await self._logprobs.get()
        assert isinstance(message, LogprobsSampled)
        assert message.step == step, "log-probabilities come in the order of the steps"
        for sequence_id, logprobs in zip(sampled, message.logprobs, strict=True):
            active = self._active.get(sequence_id)
            if logprobs is not None and active is not None:
                active.logprobs.append(logprobs)

    def _carry_out(self, instructions: Iterable[Instruction], ended: list[_Ended]) -> None:
        """Do what the core says; whose completion is known is added to `ended`, in order."""
        for instruction in instructions:
            match instruction:
                case TokensEmitted():
                    self._take_tokens(instruction, ended)
                case Finished() if instruction.sequence_id in self._active:
                    active = self._active.pop(instruction.sequence_id)
                    ended.append(_Ended(active, instruction, self._clock.now_s()))
                    self._watches.pop(instruction.sequence_id, None)
                case Closed():
                    self._group.broadcast_message(RequestClosed(instruction.sequence_ids))

    def _take_tokens(self, emitted: TokensEmitted, ended: list[_Ended]) -> None:
        self._num_output_tokens += len(emitted.token_ids)
        now_s = self._clock.now_s()
        for token_s in self._token_times(emitted.sequence_ids):
            token_s.append(now_s)
        if not self._watches:
            return
        for row, sequence_id in enumerate(emitted.sequence_ids):
            if sequence_id in self._watches:
                reason = emitted.finish_reasons.get(row)
                self._watch(sequence_id, emitted.token_ids[row], reason, ended)

    def _token_times(self, sequence_ids: tuple[int, ...]) -> list[list[float]]:
        """`token_s` of each. The rows of a slot's steps are mostly those of the step before it."""
        found = self._times_of.get(sequence_ids)
        if found is None:
            if len(self._times_of) >= _NUM_KEPT_ROWS:
                self._times_of.clear()
            found = [self._active[sequence_id].token_s for sequence_id in sequence_ids]
            self._times_of[sequence_ids] = found
        return found

    def _watch(
        self, sequence_id: int, token_id: int, reason: FinishReason | None, ended: list[_Ended]
    ) -> None:
        """Look for the stop strings of a sequence; one that is found ends it."""
        watch = self._watches[sequence_id]
        if reason is FinishReason.STOP:
            watch.push_stop_token(token_id)
            return
        try:
            has_ended = watch.push(token_id)
        except PromptError as error:
            self._active[sequence_id].error = error
            has_ended = True
        if has_ended and reason is None:
            self._carry_out(self._core.stop(sequence_id, FinishReason.STOP), ended)

    # ---- texts -----------------------------------------------------------------------------------

    def _make_texts(self, ended: list[_Ended]) -> None:
        """Make what has ended ready: now, or when the texts of its tokens are made."""
        if not ended:
            return
        for completed in ended:
            self._take_watched(completed)

        def made(texts: asyncio.Future[Texts]) -> None:
            self._inbox.put((self._group.rank, _TextsMade(ended, texts)))

        all_ids = [completed.text_ids for completed in ended if completed.text is None]
        texts = self._texts.make(all_ids, made)
        if texts is None:
            self._num_making += 1
        else:
            self._take_texts(ended, texts)

    def _take_watched(self, completed: _Ended) -> None:
        """The text that is known because it was watched: up to a stop string."""
        active = completed.active
        if active.error is not None:
            completed.text = active.error
        elif active.watch is not None:
            text = active.watch.finish()
            if active.watch.stopped:
                completed.text, completed.reason = text, FinishReason.STOP

    def _take_texts(self, ended: list[_Ended], texts: Texts) -> None:
        made = iter(texts)
        for completed in ended:
            if completed.text is None:
                completed.text = next(made)
        self._ready += ended

    def _complete(self, completed: _Ended) -> Completion:
        active, text = completed.active, completed.text
        request, token_ids = active.request, completed.finished.token_ids
        num_prompt_tokens = len(request.prompt_ids)
        assert token_ids, "a sequence finishes with at least one token"
        assert active.first_step_s is not None
        assert text is not None
        if isinstance(text, PromptError):
            return Completion.rejected(request.request_id, request.index, text, num_prompt_tokens)
        return Completion(
            request_id=request.request_id,
            index=request.index,
            text=text,
            token_ids=token_ids,
            finish_reason=completed.reason or completed.finished.reason,
            num_prompt_tokens=num_prompt_tokens,
            queue_s=active.first_step_s - active.submitted_s,
            ttft_s=active.token_s[0] - active.submitted_s,
            latency_s=completed.ended_s - active.submitted_s,
            logprobs=tuple(active.logprobs) if request.sampling.num_logprobs >= 0 else None,
        )

    def record(self, completion: Completion, active: _Active | None = None) -> None:
        """Tell of a request that has ended; `active` None: it was refused."""
        if self._on_request is None:
            return
        if active is None:
            self._on_request(RequestRecord.refused(completion, self._clock.now_s()))
            return
        failed = completion.error_kind is not None
        record = RequestRecord(
            completion,
            slot=active.slot,
            arrived_s=active.submitted_s,
            admitted_s=active.first_step_s,
            finished_s=self._clock.now_s() if failed else active.submitted_s + completion.latency_s,
            num_preemptions=active.num_preemptions,
            token_s=tuple(active.token_s),
        )
        self._on_request(record)
