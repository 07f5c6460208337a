"""The one boot path: the order of its phases, what each rank knows then, and how it ends early."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.clock import MonotonicClock, ScriptedClock
from mpipipe.config.load import LoadedConfig, load_config
from mpipipe.control_plane.memory import open_memory_channels
from mpipipe.errors import CheckpointError, ConfigError, MpipipeError
from mpipipe.metrics.boot import BootTimeline
from mpipipe.metrics.log import NullLog
from mpipipe.planning.model_facts import ModelFacts
from mpipipe.planning.workload import Workload
from mpipipe.progress import ProgressEngine, new_event_loop
from mpipipe.runtime import ranks as ranks_module
from mpipipe.runtime.requests import Prepared
from mpipipe.runtime.session import Boot
from mpipipe.runtime.startup import Joined, joined_ranks, loaded_session

LIMIT_S = 20.0
JOINED = ["configuration", "devices", "inputs", "model folder", "model seen"]

stub_session: Any = object()


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    """The configuration of a small model without weights, which says how it is to be sampled."""
    shape = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "generation_config.json").write_text('{"top_k": 7, "do_sample": true}')
    words = [f"model.path={tmp_path}", "model.weights=random", "pipeline.device=cpu"]
    return load_config(None, words)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Boot]:
    """What sessions were opened from, without torch and a model."""
    boots: list[Boot] = []

    @asynccontextmanager
    async def open_session(boot: Boot) -> AsyncIterator[Any]:
        boots.append(boot)
        yield stub_session

    stub: Any = SimpleNamespace(open_session=open_session)
    monkeypatch.setitem(sys.modules, "mpipipe.runtime.boot", stub)
    return boots


class PolledByTheTest(ProgressEngine):
    """Shared by two virtual ranks: the one that leaves first does not stop it."""

    async def run(self) -> None:
        await asyncio.Event().wait()


def run(job: Any) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(LIMIT_S):
            return await job

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(limited())


def test_the_phases_come_in_their_order_and_each_end_is_noted(
    loaded: LoadedConfig, opened: list[Boot]
) -> None:
    prepared = Prepared(Workload(num_requests=3))
    noted: list[dict[str, float]] = []

    async def job() -> None:
        async with joined_ranks(
            MonotonicClock(), lambda: loaded, lambda model: model.spec.num_layers
        ) as joined:
            assert joined.inputs == 2
            assert joined.loaded.config.generation.top_k == 7  # the model's own
            assert joined.ranks.vitals.timeout_s == 0.0
            noted.append(dict(joined.ranks.phase_ended_s))
            session = loaded_session(joined, lambda _: prepared, NullLog())
            async with session as (live, given):
                assert live is stub_session
                assert given is prepared
            noted.append(joined.ranks.phase_ended_s)

    run(job())
    assert list(noted[0]) == JOINED
    assert list(noted[1]) == [*JOINED, "import", "tokenizer"]
    assert list(noted[1].values()) == sorted(noted[1].values())
    (boot,) = opened
    assert boot.prepared is prepared
    assert boot.loaded.config.generation.top_k == 7


def test_nothing_looks_for_garbage_while_torch_is_imported(
    loaded: LoadedConfig, opened: list[Boot], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    real = importlib.import_module

    def import_module(name: str) -> Any:
        looked.append(gc.isenabled())
        return real(name)

    async def job() -> None:
        async with joined_ranks(MonotonicClock(), lambda: loaded, lambda _: None) as joined:
            monkeypatch.setattr(importlib, "import_module", import_module)
            async with loaded_session(joined, lambda _: Prepared(), NullLog()):
                looked.append(gc.isenabled())

    run(job())
    assert looked == [False, True]
    assert len(opened) == 1


def test_each_part_of_a_boot_is_booked_to_its_name(
    loaded: LoadedConfig, opened: list[Boot]
) -> None:
    clock = ScriptedClock(50.0)

    def load() -> LoadedConfig:
        clock.advance(1.0)
        return loaded

    def read(_: ModelFacts) -> None:
        clock.advance(2.0)

    def prepare(_: ModelFacts) -> Prepared:
        clock.advance(3.0)
        return Prepared()

    async def job() -> None:
        boot = BootTimeline(clock, started_s=45.0)
        boot.begin("imports", at_s=46.0)
        clock.advance(0.5)
        async with (
            joined_ranks(clock, load, read, boot=boot) as joined,
            loaded_session(joined, prepare, NullLog()),
        ):
            assert joined.ranks.boot is boot
            boot.end()
            assert sum(part.seconds for part in boot.parts) == boot.wall_s == clock.now_s() - 45.0
            named = {part.name: part.seconds for part in boot.parts}
            assert named == {
                "process": 1.0, "imports": 4.5, "configuration": 1.0, "read prompts": 2.0,
                "tokenizer": 3.0,
            }  # fmt: skip

    run(job())
    assert len(opened) == 1


def test_other_ranks_read_and_prepare_nothing(
    loaded: LoadedConfig, opened: list[Boot], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PolledByTheTest()
    channels = iter(open_memory_channels(2, engine))
    monkeypatch.setattr(ranks_module, "ProgressEngine", lambda: engine)
    monkeypatch.setattr(
        ranks_module, "_open_channel", lambda *_: ranks_module._Opened(next(channels))
    )
    joins: list[Joined[str]] = []

    async def job() -> None:
        async with joined_ranks(
            MonotonicClock(), lambda: loaded, lambda _: "read", heartbeats=True
        ) as joined:
            joins.append(joined)
            session = loaded_session(joined, lambda _: Prepared(Workload(1)), NullLog())
            async with session:
                await joined.ranks.mesh.barrier("end", LIMIT_S)

    async def both() -> None:
        polling = asyncio.ensure_future(ProgressEngine.run(engine))
        await asyncio.gather(job(), job())
        polling.cancel()

    run(both())
    head, other = sorted(joins, key=lambda joined: joined.ranks.mesh.rank)
    assert (head.inputs, other.inputs, other.model) == ("read", None, None)
    assert [boot.prepared.workload.num_requests for boot in opened].count(None) == 1
    assert head.resources == other.resources
    limit_s = loaded.config.pipeline.heartbeat_timeout_s
    assert [joined.ranks.vitals.timeout_s for joined in joins] == [limit_s] * 2


@pytest.mark.parametrize(
    ("where", "error"), [("load", ConfigError("no such key")), ("read", CheckpointError("cut"))]
)
def test_what_is_wrong_is_told_before_torch_is_imported(
    where: str, error: MpipipeError, loaded: LoadedConfig, opened: list[Boot]
) -> None:
    def load() -> LoadedConfig:
        if where == "load":
            raise error
        return loaded

    def read(_: ModelFacts) -> None:
        raise error

    async def job() -> None:
        async with joined_ranks(MonotonicClock(), load, read):
            pytest.fail("nothing is to be run")

    with pytest.raises(type(error)) as raised:
        run(job())
    assert raised.value is error
    assert opened == []
