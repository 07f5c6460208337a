"""`Pipeline`: the library's front door, used alike on every rank of an SPMD script.

    with Pipeline("models/my_model") as pipeline:        # mpirun -n 2 python script.py
        for completion in pipeline.generate_sync(["The capital of France is"]):
            print(completion.text)

Rank 0 yields the completions; on the other ranks the same loops run zero times while their stages
work. Prompts given on other ranks are ignored.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from mpipipe.clock import MonotonicClock
from mpipipe.config.load import LoadedConfig, default_sampling, load_config
from mpipipe.config.prompts import prompt_seed
from mpipipe.errors import PromptError
from mpipipe.metrics.log import NullLog
from mpipipe.planning.workload import Workload
from mpipipe.progress import new_event_loop
from mpipipe.runtime.greeting import greet
from mpipipe.runtime.inputs import read_model
from mpipipe.runtime.launch import import_boot, in_phase, open_ranks
from mpipipe.runtime.shared_folders import check_model_folder
from mpipipe.types import Completion, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator, Sequence

    from mpipipe.planning.plan import PipelinePlan
    from mpipipe.runtime.session import Session

__all__ = ["Pipeline"]

T = TypeVar("T")

_CONFIG_DEADLINE_S = 120.0


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
            ranks = await stack.enter_async_context(open_ranks(MonotonicClock()))
            loaded = await in_phase(ranks, "configuration", self._load, _CONFIG_DEADLINE_S)
            self._sampling = default_sampling(loaded.config.generation)
            self._add_special_tokens = loaded.config.prompts.add_special_tokens
            hellos = await greet(ranks, loaded)
            model = await in_phase(
                ranks, "inputs", lambda: read_model(loaded) if ranks.is_head else None
            )
            random = loaded.config.model.weights == "random"
            await check_model_folder(ranks, model, with_weights=not random)
            await in_phase(ranks, "import", import_boot)
            from mpipipe.models.tokenizer import open_tokenizer
            from mpipipe.runtime.boot import Boot, open_session

            trust = loaded.config.model.trust_remote_code
            tokenizer = await in_phase(
                ranks,
                "tokenizer",
                lambda: open_tokenizer(model.tokenizer_folder, trust) if model else None,
            )
            boot = Boot(ranks, loaded, hellos, model, tokenizer, Workload(), NullLog())
            self._session = await stack.enter_async_context(open_session(boot))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Leave together. An exception on one rank aborts the others, which wait for it."""
        await self._stack.__aexit__(*exception)  # type: ignore[arg-type]
        self._session = None

    async def generate(
        self, prompts: Iterable[str | Sequence[dict[str, str]]], **sampling: object
    ) -> AsyncGenerator[Completion, None]:
        """Complete `prompts` (texts, or chats as lists of role/content messages).

        Args:
            prompts: completed as they come first, yielded as they end; `Completion.index` is the
                position here.
            sampling: fields of `SamplingParams` that win over the configuration's.

        Raises:
            ValueError: a sampling setting is out of range.
        """
        session = self._open_session
        settings = self._sampling.replace(**sampling)  # on all ranks: they must fail alike
        requests: list[Request] = []
        refused: list[Completion] = []
        for index, prompt in enumerate(prompts if session.is_head else ()):
            try:
                requests.append(self._request(index, prompt, settings))
            except PromptError as error:
                refused.append(Completion.refused(str(index), index, error))
        # Closing matters: a caller that stops early must not leave the stages in mid-step.
        async with aclosing(session.generate(requests, refused)) as completions:
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

    def generate_sync(
        self, prompts: Iterable[str | Sequence[dict[str, str]]], **sampling: object
    ) -> Iterator[Completion]:
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
        path = Path(self._source)
        if path.suffix in {".toml", ".json"}:
            return load_config(path, self._overrides)
        return load_config(None, [f"model.path={self._source}", *self._overrides])

    def _request(
        self, index: int, prompt: str | Sequence[dict[str, str]], sampling: SamplingParams
    ) -> Request:
        tokenizer = self._open_session.tokenizer
        if isinstance(prompt, str):
            prompt_ids = tokenizer.encode(prompt, self._add_special_tokens)
        else:
            prompt_ids = tokenizer.chat(list(prompt))
        if not prompt_ids:
            raise PromptError("empty_prompt", f"prompt {index} is empty: write some text")
        seed = prompt_seed(sampling.seed, str(index))
        return Request(str(index), index, tuple(prompt_ids), sampling.replace(seed=seed))


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
