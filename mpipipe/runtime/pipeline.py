"""`Pipeline`: the library's front door, used alike on every rank of an SPMD script.

    with Pipeline("models/my_model") as pipeline:        # mpirun -n 2 python script.py
        for completion in pipeline.generate_sync(["The capital of France is"]):
            print(completion.text)

Rank 0 yields the completions; on the other ranks the same loops run zero times while their stages
work. Prompts given on other ranks are ignored. Invariant: whatever goes wrong before the first step
is raised on every rank, so that all can go on alike.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from mpipipe.clock import MonotonicClock
from mpipipe.config.checks import default_sampling
from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.config.prompt_fields import keyword_sampling
from mpipipe.config.prompts import library_prompts
from mpipipe.errors import MpipipeError, RemoteError, SettingError
from mpipipe.metrics.log import NullLog
from mpipipe.progress import new_event_loop
from mpipipe.runtime.requests import Prepared, PreparedPrompts, prepare, tokenizer_of
from mpipipe.runtime.startup import joined_ranks, loaded_session
from mpipipe.types import Completion, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator, Sequence
    from typing import Any

    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.session import Session

    Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]

__all__ = ["Pipeline"]

T = TypeVar("T")

_PROMPTS_PER_TURN = 256  # of an iterable, before messages of other ranks get their turn


class Pipeline:
    """A model split over the ranks of this launch, from `with` to its end.

    Args:
        source: a configuration file (.toml, .json), a model folder, or `demo:smollm2`. The
            sections `output` and `log`, and the file of `prompts`, are the command line's.
        overrides: `section.key=value` words, as on the command line.
    """

    def __init__(self, source: str | Path, *overrides: str) -> None:
        self._source = str(source)
        self._overrides = overrides
        self._stack = AsyncExitStack()
        self._session: Session | None = None
        self._one_at_a_time = asyncio.Lock()  # on every rank: messages do not say of which call
        self._sampling = SamplingParams()
        self._add_special_tokens = True
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._lifetime: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    @property
    def is_head(self) -> bool:
        """Whether completions are yielded on this rank."""
        return self._open_session.is_head

    @property
    def plan(self) -> PipelinePlan:
        """The agreed plan."""
        return self._open_session.plan

    @property
    def _open_session(self) -> Session:
        assert self._session is not None, "use the pipeline inside `with` or `async with`"
        return self._session

    # ---- asynchronous ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Meet the other ranks, plan, load.

        Raises:
            MpipipeError: configuration, model, memory or launch are not as needed; on every rank.
        """
        async with AsyncExitStack() as stack:
            joined = await stack.enter_async_context(
                joined_ranks(MonotonicClock(), self._load, lambda _: None)
            )
            config = joined.loaded.config
            self._sampling = default_sampling(config.generation)
            self._add_special_tokens = config.prompts.add_special_tokens
            self._session, _ = await stack.enter_async_context(
                loaded_session(
                    joined, lambda model: Prepared(tokenizer=tokenizer_of(model)), NullLog()
                )
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Leave together. An exception on one rank aborts the others, which wait for it."""
        await self._stack.__aexit__(*exception)  # type: ignore[arg-type]
        self._session = None

    async def generate(
        self, prompts: Iterable[Prompt], **sampling: object
    ) -> AsyncGenerator[Completion, None]:
        """Complete `prompts`; one that is wrong is yielded as an error (`Completion.error_kind`).

        A call waits until the one before has ended, or its iterator is closed.

        Args:
            prompts: texts, chats as lists of role/content messages, or objects as on a line of a
                prompt file, with settings of their own. Completed as they come first, yielded as
                they end; `Completion.index` is the position here.
            sampling: settings as a line may have them, over the configuration's.

        Raises:
            SettingError: a setting is unknown or out of range (also a ValueError); on every rank.
                Where `prompts` cannot be read the head raises what the iterable has raised, and
                the other ranks this.
        """
        session = self._open_session
        settings = keyword_sampling(sampling, self._sampling)  # on all ranks: they must fail alike
        async with self._one_at_a_time:
            prepared = await self._prepare(prompts, settings)
            # Closing matters: a caller that stops early must not leave the stages in mid-step.
            generating = session.generate(prepared.requests, prepared.rejected)
            async with aclosing(generating) as completions:
                async for completion in completions:
                    yield completion

    # ---- synchronous -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """As `async with`, with an event loop of its own; not for use inside a running loop."""
        loop = self._own_loop = new_event_loop()
        self._closing = asyncio.Event()
        opened = loop.create_future()
        self._lifetime = loop.create_task(self._live(opened), name="pipeline")
        try:
            self._advance(opened)
        except BaseException:
            loop.close()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """As `async with`."""
        assert self._own_loop is not None
        assert self._closing is not None
        assert self._lifetime is not None
        self._failure = error
        self._closing.set()
        try:
            self._own_loop.run_until_complete(asyncio.wait([self._lifetime]))
            if error is None:
                self._lifetime.result()
        finally:
            self._own_loop.close()

    def generate_sync(self, prompts: Iterable[Prompt], **sampling: object) -> Iterator[Completion]:
        """`generate` for a plain `for` loop, inside `with`."""
        completions = self.generate(prompts, **sampling)
        try:
            while True:
                try:
                    yield self._advance(anext(completions))
                except StopAsyncIteration:
                    return
        finally:
            self._advance(completions.aclose())

    async def _live(self, opened: asyncio.Future[None]) -> None:
        """The one task that enters and leaves the pipeline, as its task groups demand."""
        assert self._closing is not None
        async with self:
            opened.set_result(None)
            await self._closing.wait()
            if self._failure is not None:
                raise self._failure

    def _advance(self, step: Awaitable[T]) -> T:
        """Run the loop until `step` is done, or the pipeline fails under it."""
        assert self._own_loop is not None
        assert self._lifetime is not None
        task = self._own_loop.create_task(_first_of(step, self._lifetime))
        try:
            return self._own_loop.run_until_complete(task)
        except BaseException:  # Ctrl-C comes out here with the step still under way
            if not task.done():
                task.cancel()
                self._own_loop.run_until_complete(asyncio.wait([task]))
            raise

    # ---- parts -----------------------------------------------------------------------------------

    def _load(self) -> LoadedConfig:
        return load_config(Path(self._source), self._overrides)

    async def _prepare(
        self, prompts: Iterable[Prompt], settings: SamplingParams
    ) -> PreparedPrompts:
        """The prompts of a call, on the head; all ranks agree that they could be read."""
        session = self._open_session
        prepared = PreparedPrompts((), ())
        failure: Exception | None = None
        if session.is_head:
            try:
                lines = library_prompts(await _collect(prompts), settings)
                prepared = await asyncio.to_thread(
                    prepare,
                    lines,
                    session.tokenizer,
                    add_special_tokens=self._add_special_tokens,
                    vocab_size=session.vocab_size,
                )
                for sentence in prepared.warnings:
                    warnings.warn(sentence, stacklevel=2)
            except Exception as error:  # noqa: BLE001 - the caller's iterable may raise anything
                failure = error
        told = failure if failure is None or isinstance(failure, MpipipeError) else _told(failure)
        try:
            # No deadline: the others wait for the head as long as its prompts take.
            await session.ranks.mesh.agree("prompts", told, math.inf)
        except MpipipeError as agreed:
            if failure is not None:
                raise failure from None
            # As the head's own, where the cause is an argument: scripts catch ValueError.
            is_setting = isinstance(agreed, RemoteError) and agreed.kind == SettingError.__name__
            raise SettingError(str(agreed)) if is_setting else agreed from None
        return prepared


async def _collect(prompts: Iterable[Prompt]) -> list[Prompt]:
    """All of them; what the iterable raises comes through."""
    if isinstance(prompts, str | bytes | Mapping):
        raise SettingError(
            f"prompts is a single {type(prompts).__name__}: give a list of prompts, as in "
            "generate([prompt])"
        )
    collected: list[Prompt] = []
    for prompt in prompts:
        collected.append(prompt)
        if len(collected) % _PROMPTS_PER_TURN == 0:
            await asyncio.sleep(0)
    return collected


def _told(failure: Exception) -> SettingError:
    """What the other ranks raise for an exception of the head's own script."""
    return SettingError(
        f"the prompts could not be read ({type(failure).__name__}: {failure}): the script's "
        "iterable of prompts has raised it"
    )


async def _first_of(step: Awaitable[T], lifetime: asyncio.Task[None]) -> T:
    """The result of `step`; or the error that ended `lifetime` meanwhile."""
    stepping = asyncio.ensure_future(step)
    try:
        await asyncio.wait([stepping, lifetime], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not stepping.done():
            stepping.cancel()
            await asyncio.wait([stepping])
    if lifetime.done():
        lifetime.result()
    return await stepping
