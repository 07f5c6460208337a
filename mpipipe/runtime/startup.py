"""The one way from processes to a live session, for every command and for the library.

`joined_ranks`: ranks, configuration, handshake, inputs, model folder. `loaded_session`: import,
tokenizer, then plan, load and connect (`boot`). `mpipipe run` acquires its run folder between the
two. Every phase is the same on all ranks and ends in an agreement; its end is noted in
`Ranks.phase_ended_s`, and what this rank did until then in `Ranks.boot`. Imports neither torch nor
transformers before the input is in order.
"""

from __future__ import annotations

import importlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from mpipipe.config.schema import PipelineConfig
from mpipipe.garbage import no_garbage_collection
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.layout import Layout
from mpipipe.planning.model_facts import ModelFacts, read_model
from mpipipe.planning.resolve import choose_layout, is_layout_open
from mpipipe.planning.workload import Workload
from mpipipe.runtime.handshake import handshake
from mpipipe.runtime.kernels_ahead import KernelProcess, kernels_ahead
from mpipipe.runtime.ranks import Ranks, in_phase, open_ranks
from mpipipe.runtime.requests import Prepared, prepare_text
from mpipipe.runtime.session import Boot, Session
from mpipipe.runtime.shared_folders import check_model_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mpipipe.clock import Clock
    from mpipipe.config.load import LoadedConfig
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.metrics.log import Logger, RunLog
    from mpipipe.planning.resources import RankResources
    from mpipipe.runtime.stop_switch import StopSwitch

__all__ = ["Joined", "joined_ranks", "loaded_session"]

T = TypeVar("T")

_CONFIG_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Joined(Generic[T]):
    """The ranks of this launch, which know each other and what is to be run."""

    ranks: Ranks
    loaded: LoadedConfig  # on the head with the model's own settings
    resources: tuple[RankResources, ...]
    layout: Layout  # which ranks make which replica
    model: ModelFacts | None  # on the head
    inputs: T | None  # on the head: what else was read
    kernels: KernelProcess | None = None  # compiles what this host's stages launch


@asynccontextmanager
async def joined_ranks(
    clock: Clock,
    load: Callable[[], LoadedConfig],
    read: Callable[[ModelFacts], T],
    *,
    expect: Callable[[ModelFacts, T], Workload] = lambda _model, _inputs: Workload(),
    heartbeats: bool = False,
    stop: StopSwitch | None = None,
    boot: BootTimeline | None = None,
    debug: bool = False,
) -> AsyncIterator[Joined[T]]:
    """Join the other ranks, and read what must be in order before anything heavy starts.

    Args:
        clock: monotonic seconds.
        load: reads the configuration, on every rank.
        read: reads what else a command needs, on the head, beside the model's facts.
        expect: about how much there is to do, to choose the number of replicas by, on the head.
        heartbeats: a silent rank ends the run. Off where a script may block between its calls.
        stop: is tripped by what may end the run early; without it, nothing does.
        boot: what this process did so far; without it, the boot begins here.
        debug: show the traceback of an error that aborts the job.

    Raises:
        MpipipeError: the error that all ranks agreed on, or MPI could not be set up.
    """
    async with open_ranks(clock, stop=stop, boot=boot, debug=debug) as ranks:
        if heartbeats:
            ranks.vitals.timeout_s = PipelineConfig().heartbeat_timeout_s  # until it is known
        ranks.boot.begin("configuration")
        loaded = await in_phase(ranks, "configuration", load, _CONFIG_DEADLINE_S)
        if heartbeats:
            ranks.vitals.timeout_s = loaded.config.pipeline.heartbeat_timeout_s
        with kernels_ahead(loaded.config.pipeline.device) as kernels:
            yield await _joined(ranks, loaded, read, expect, kernels)


async def _joined(
    ranks: Ranks,
    loaded: LoadedConfig,
    read: Callable[[ModelFacts], T],
    expect: Callable[[ModelFacts, T], Workload],
    kernels: KernelProcess | None,
) -> Joined[T]:
    ranks.boot.begin("handshake")
    resources = await handshake(ranks, loaded)

    def read_inputs() -> tuple[ModelFacts, T, Layout] | None:
        if not ranks.is_head:
            return None
        model = read_model(loaded)
        inputs = read(model)
        config = model.loaded.config
        workload = expect(model, inputs) if is_layout_open(config) else Workload()
        return model, inputs, choose_layout(config, model.spec, resources, workload)

    ranks.boot.begin("read prompts")
    found = await in_phase(ranks, "inputs", read_inputs)
    model, inputs, chosen = found or (None, None, None)
    layout = await _told_layout(ranks, chosen)
    ranks.boot.begin("model folder")
    await check_model_folder(ranks, model)
    loaded = loaded if model is None else model.loaded
    return Joined(ranks, loaded, resources, layout, model, inputs, kernels)


async def _told_layout(ranks: Ranks, chosen: Layout | None) -> Layout:
    payload = None if chosen is None else to_json(chosen).encode()
    return from_json(Layout, await ranks.mesh.broadcast("layout", payload, _CONFIG_DEADLINE_S))


@asynccontextmanager
async def loaded_session(
    joined: Joined[T],
    prepare: Callable[[ModelFacts], Prepared],
    log: RunLog | Logger,
    folder: Path = Path(),
    *,
    text: Callable[[ModelFacts], Prepared] = prepare_text,
) -> AsyncIterator[tuple[Session, Prepared]]:
    """Import, `prepare` on the head what the session is for, plan, load, connect.

    What a profiler records goes to `folder`. `text` prepares the heads of further replicas, which
    make texts of tokens.

    Raises:
        AgreedError: that failed on some rank.
    """
    ranks, model = joined.ranks, joined.model
    # torch and transformers take seconds to import: only now, when the input is in order.
    ranks.boot.begin("imports")
    await in_phase(ranks, "import", _import_boot)
    from mpipipe.runtime.boot import open_session

    ranks.boot.begin("tokenizer")
    heads = {members[0] for members in joined.layout.replicas}

    def prepare_head() -> tuple[ModelFacts | None, Prepared]:
        if model is not None:
            return model, prepare(model)
        if ranks.mesh.rank not in heads:
            return None, Prepared()
        own = read_model(joined.loaded)
        return own, text(own)

    known, prepared = await in_phase(ranks, "tokenizer", prepare_head)
    boot = Boot(
        ranks,
        joined.loaded,
        joined.resources,
        joined.layout,
        known,
        prepared,
        log,
        folder,
        joined.kernels,
    )
    async with open_session(boot) as session:
        yield session, prepared


def _import_boot() -> None:
    with no_garbage_collection():
        importlib.import_module("mpipipe.runtime.boot")
