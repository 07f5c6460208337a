"""`mpipipe plan --measure`: times a model's parts on the ranks of this launch, for later plans.

All ranks measure at the same time, each on its own device, so that ranks of a host share its cores
and memory as they do in a run. From slices of the model with few and with more layers, with and
without embedding and head, follows what a layer, the head, the embedding and a step cost. Then the
links between neighbouring stages, one pair after the other. With lanes (pipeline.tensor_parallel)
each rank measures the part of one lane: what lanes take for their sums is left to rates. The head
keeps what all have measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import torch

from mpipipe.bench.profile_points import (
    Brief,
    DecodeShape,
    PromptShape,
    SliceTimes,
    Timed,
    decode_part,
    first_of_rows,
    first_of_tokens,
    prefill_part,
)
from mpipipe.bench.stage_timing import SliceOpener, StageTimer
from mpipipe.config.checks import default_sampling
from mpipipe.config.load import load_config
from mpipipe.config.schema import AUTO, MemoryConfig
from mpipipe.data_plane.probe import LinkEnd, answer_hops, ask_hops
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.cost import dtype_bytes
from mpipipe.planning.profile import (
    HopPoint,
    Profile,
    ProfileKey,
    merged_profile,
    with_known_hops,
    write_profile,
)
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.tensor_parallel import lane_spec
from mpipipe.runtime.ranks import in_phase, told_by_head
from mpipipe.runtime.startup import Joined, joined_ranks
from mpipipe.runtime.tensor_channel import open_links

if TYPE_CHECKING:
    from pathlib import Path

    from mpipipe.config.load import LoadedConfig
    from mpipipe.metrics.boot import BootTimeline
    from mpipipe.planning.model_facts import ModelFacts

__all__ = ["Kept", "measure_profiles"]

_DEADLINE_S = 900.0  # of one slice on all ranks
_COPY_BYTES = 64 << 20
_NUM_COPIES = 5
_NUM_PASSES = 3


@dataclass(frozen=True, slots=True)
class Kept:
    """A profile, and the file that it is in."""

    profile: Profile
    path: Path


async def measure_profiles(
    config_path: Path, overrides: Sequence[str], boot: BootTimeline, *, debug: bool
) -> list[Kept]:
    """Measure on all ranks and keep the profiles; what was kept on the head, nothing elsewhere.

    `boot` has what this process did so far.

    Raises:
        MpipipeError: what `mpipipe run` would refuse, or the profile cannot be written.
    """

    def load() -> LoadedConfig:
        return load_config(config_path, overrides)

    def read(_: ModelFacts) -> None:
        """No prompts: a profile holds for any."""

    async with joined_ranks(boot.clock, load, read, boot=boot, debug=debug) as joined:
        measuring = await _Measuring.open(joined)
        own = to_json(await measuring.profile()).encode()
        parts = await joined.ranks.mesh.gather("profiles", own, _DEADLINE_S)
        profiles = [from_json(Profile, part) for part in parts or ()]
        return await in_phase(joined.ranks, "write profile", partial(_keep, profiles))


def _keep(profiles: Sequence[Profile]) -> list[Kept]:
    by_key: dict[str, list[Profile]] = {}
    for profile in profiles:
        by_key.setdefault(profile.key.digest, []).append(profile)
    merged = [with_known_hops(merged_profile(same)) for same in by_key.values()]
    return [Kept(profile, write_profile(profile)) for profile in merged]


def _decide(joined: Joined[None]) -> Brief:
    """What is measured: with the limits of a run of as few layers as any rank can hold (head)."""
    model = joined.model
    assert model is not None, "the head decides"
    config, spec = model.loaded.config, model.spec
    pipeline = replace(config.pipeline, num_stages=AUTO, replicas=1, tensor_parallel=1, split=AUTO)
    memory = MemoryConfig(page_size_tokens=config.memory.page_size_tokens)
    memory = replace(memory, cuda_graphs=config.memory.cuda_graphs, kv_cache=config.memory.kv_cache)
    few = replace(spec, num_layers=len(joined.resources))
    config = replace(config, pipeline=pipeline, memory=memory)
    plan = make_plan(config, few, joined.resources, str(model.folder))
    num_lanes = model.loaded.config.pipeline.tensor_parallel
    lane_spec(spec, num_lanes)  # what a run would refuse
    return Brief.of(replace(spec, quantized=plan.quantize), plan, spec.num_layers, num_lanes)


@dataclass(frozen=True, slots=True)
class _Measuring:
    """One rank's part."""

    joined: Joined[None]
    brief: Brief
    slices: SliceOpener
    start_s: float

    @staticmethod
    async def open(joined: Joined[None]) -> _Measuring:
        """Agree on what is measured."""
        ranks, config = joined.ranks, joined.loaded.config
        start_s = ranks.clock.now_s() - ranks.boot.started_s
        told = await told_by_head(ranks, "plan", lambda: to_json(_decide(joined)).encode())
        brief = from_json(Brief, told)
        device = torch.device("cpu")
        if brief.plan.device == "cuda":
            device = torch.device("cuda", joined.resources[ranks.mesh.rank].gpu.index)
            torch.cuda.set_device(device)
        slices = SliceOpener(
            plan=brief.lane_plan,
            device=device,
            clock=ranks.clock,
            progress=ranks.engine,
            boot=ranks.boot,
            sampling=default_sampling(config.generation),
            trust_remote_code=config.model.trust_remote_code,
        )
        return _Measuring(joined, brief, slices, start_s)

    async def profile(self) -> Profile:
        """This rank's."""
        brief, ranks = self.brief, self.joined.ranks
        small, large = brief.num_layers
        with ExitStack() as opened:
            few = await self._slice(opened, small)
            many = few
            if large > small:
                many = await self._slice(opened, large, has_all_shapes=True)
            first = await self._slice(opened, small, has_embedding=True)
            last = await self._slice(opened, small, has_head=True)
            slices = list({id(each): each for each in (few, many, first, last)}.values())
            # Differences of times that lie close together in time: a machine's speed varies.
            for _ in range(_NUM_PASSES):
                for each in slices:
                    await in_phase(ranks, "time slice", each.time_again, _DEADLINE_S)
        times = SliceTimes(few.timed, many.timed, first.timed, last.timed, brief.num_layers)
        resources, rank = self.joined.resources, ranks.mesh.rank
        return Profile(
            key=ProfileKey.of(brief.lane_plan, brief.shape, resources, rank),
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            decode=decode_part(times),
            prefill=prefill_part(times),
            hops=await self._hops(),
            host_to_device_bytes_per_s=await self._copy_rate(),
            load_bytes_per_s=many.timer.load_bytes_per_s,
            load_fixed_s=last.timer.prepare_s,
            start_s=self.start_s,
        )

    async def _slice(
        self,
        opened: ExitStack,
        num_layers: int,
        *,
        has_embedding: bool = False,
        has_head: bool = False,
        has_all_shapes: bool = False,
    ) -> _Slice:
        """Load so many layers on all ranks; they stay until `opened` ends."""
        brief = self.brief
        stage = brief.stage(num_layers, has_embedding=has_embedding, has_head=has_head)
        decodes, prompts = brief.decodes, brief.prompts
        if not has_all_shapes:
            decodes, prompts = first_of_rows(decodes), first_of_tokens(prompts)
        opening = partial(opened.enter_context, self.slices.opened(stage))
        timer = await in_phase(self.joined.ranks, "load slice", opening, _DEADLINE_S)
        return _Slice(timer, decodes, prompts)

    async def _hops(self) -> tuple[HopPoint, ...]:
        """Of the pairs of which this rank is the first."""
        plan, ranks = self.brief.plan, self.joined.ranks
        if plan.num_stages == 1:
            return ()
        row_bytes = plan.hidden_size * dtype_bytes(plan.dtype)
        sizes = [rows * row_bytes for rows in self.brief.hop_rows]
        device, found = self.slices.device, []
        hosts = tuple(resources.host for resources in self.joined.resources)
        channel = (await open_links((plan,), hosts, ranks, device)).channel
        for source, target in itertools.pairwise(plan.stages):
            await ranks.mesh.barrier(f"hop {source.stage}", _DEADLINE_S)
            if ranks.mesh.rank == source.rank:
                hops_s = await ask_hops(LinkEnd(channel, device, target.rank), sizes)
                crosses = source.host != target.host
                found += [
                    HopPoint(size, seconds, crosses)
                    for size, seconds in zip(sizes, hops_s, strict=True)
                ]
            elif ranks.mesh.rank == target.rank:
                await answer_hops(LinkEnd(channel, device, source.rank), sizes)
        await ranks.mesh.barrier("hops", _DEADLINE_S)
        await channel.aclose()
        return tuple(found)

    async def _copy_rate(self) -> float:
        """Bytes per second from pinned host memory to this rank's GPU; 0 on a CPU."""
        device = self.slices.device
        if device.type != "cuda":
            return 0.0
        return await in_phase(self.joined.ranks, "time copies", partial(_copy_rate, device))


@dataclass(slots=True)
class _Slice:
    """A loaded slice, and the seconds of its steps in every pass so far."""

    timer: StageTimer
    decodes: tuple[DecodeShape, ...]
    prompts: tuple[PromptShape, ...]
    passes: list[Timed] = field(default_factory=list)

    def time_again(self) -> None:
        """Time every shape once more."""
        self.passes.append(self.timer.timed(self.decodes, self.prompts))

    @property
    def timed(self) -> Timed:
        """Of each shape the median of all passes."""
        return Timed.of_passes(self.passes)


def _copy_rate(device: torch.device) -> float:
    torch.cuda.set_device(device)
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(_NUM_COPIES):
        torch.cuda.synchronize(device)
        began_s = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(_COPY_BYTES / (time.perf_counter() - began_s))
    return max(rates)
