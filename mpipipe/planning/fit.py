"""Fits the stages into the memory of their ranks: everything on the devices, or in part offloaded.

Nothing is offloaded that need not be: a run whose weights fit its devices is planned as if there
was no offload. `offload_search` finds what to offload, `rank_rooms` what there is.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import MemoryConfig
from mpipipe.errors import PlanError
from mpipipe.planning.cost import kv_page_bytes
from mpipipe.planning.kv_tier import kv_host_shares, kv_in_host, note_cache, with_page_limits
from mpipipe.planning.layout import threads_per_rank
from mpipipe.planning.memory import KvDemand, RankMemory, asked_kv_bytes, fits, gib
from mpipipe.planning.offload_advice import offload_advice, offload_cost
from mpipipe.planning.offload_search import (
    Candidate,
    OffloadProblem,
    RankRoom,
    RunShape,
    best_candidate,
    candidate_of,
    check_staging,
    with_disk,
)
from mpipipe.planning.placement import ModelParts, keeps_head, offload_of, part_bytes
from mpipipe.planning.plan import Decisions, StagePlan
from mpipipe.planning.rank_rooms import (
    CPU_LIBRARY_BYTES,
    check_settings,
    gpu_bytes,
    gpu_limit,
    most_host_bytes,
    rank_rooms,
    stage_rooms,
)
from mpipipe.planning.resources import RankResources
from mpipipe.planning.step_limits import StepLimits, gather_bytes, rank_memory
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.types import AttentionName, DeviceName, DtypeName

__all__ = ["Fitted", "StageFitting"]

_GATHERING = frozenset({"sdpa", "reference"})  # these copy what they read from the cache
# Rows per slot and tokens per step to try; more rows than that hide no link that these do not.
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_GPU_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
_CPU_TOKENS = (512, 1024, 2048)
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Fitted:
    """Stages that fit, or `needs` that `memory.choose_num_pages` will refuse."""

    stages: tuple[StagePlan, ...]
    limits: StepLimits
    demand: KvDemand
    needs: tuple[RankMemory, ...]
    remedies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StageFitting:
    """What the fitting goes by."""

    spec: ModelSpec
    ranks: Sequence[RankResources]  # in the order of their stages, and lanes
    device: DeviceName
    dtype: DtypeName
    limits: StepLimits
    sampling: SamplingUse
    attention: AttentionName
    decisions: Decisions
    world: Sequence[RankResources]  # of all replicas: they share cores

    @property
    def _num_lanes(self) -> int:
        return self.decisions.config.pipeline.tensor_parallel

    def fit(self, stages: tuple[StagePlan, ...], demand: KvDemand, workload: Workload) -> Fitted:
        """`stages`, or what takes their place; revises what was decided of rows, tokens, split.

        Raises:
            PlanError: a setting that means nothing on this kind of device, or that is too low
                whatever is offloaded.
        """
        check_settings(self.decisions.config.memory, on_gpus=self.device == "cuda")
        resident = Fitted(stages, self.limits, demand, self._needs(stages, self.limits, demand))
        if self._is_roomy(resident):
            return self._widened(resident, workload)
        problem = self._problem(demand, workload)
        best = best_candidate(problem)
        if best is None:
            if fits(resident.needs, self._least_pages(resident.needs, demand)):
                return resident
            return replace(resident, remedies=self._remedies(problem, demand, workload))
        check_staging(problem, best)
        return self._taken(problem, best, stages, demand)

    def _widened(self, resident: Fitted, workload: Workload) -> Fitted:
        """With some layers' cache in host memory, if a size is asked for and that runs sooner."""
        demand = resident.demand
        problem = self._problem(demand, workload)
        memory = self.decisions.config.memory
        is_tried = isinstance(memory.kv_host_bytes, int) and any(problem.kv_host_shares)
        if not is_tried or fits(resident.needs, demand.useful_pages):
            return resident
        problem = replace(
            problem,
            rooms=tuple(replace(r, host_bytes=0, has_disk=False) for r in problem.rooms),
            tokens=(self.limits.max_tokens_per_step,),
            fixed_split=tuple(stage.num_layers for stage in resident.stages),
        )
        best = best_candidate(problem)
        if best is None:
            return resident
        if not best.kv_host_share:
            note_cache(self.decisions, best)
            return resident
        return self._taken(problem, best, resident.stages, demand)

    def _is_roomy(self, resident: Fitted) -> bool:
        """Whether all weights fit, with work space, the least cache and what libraries take."""
        needs = resident.needs
        if self.device == "cpu":
            needs = tuple(replace(need, work_bytes=CPU_LIBRARY_BYTES) for need in needs)
        return fits(needs, self._least_pages(needs, resident.demand))

    def _least_pages(self, needs: Sequence[RankMemory], demand: KvDemand) -> int:
        """With fewer the run cannot begin, or with what the settings ask for."""
        memory = self.decisions.config.memory
        asked = asked_kv_bytes(memory, largest := max(need.page_bytes for need in needs))
        if asked is not None:
            return asked // largest
        return 1 if demand.longest_request_tokens is None else demand.pages_per_sequence

    def _taken(
        self,
        problem: OffloadProblem,
        best: Candidate,
        stages: Sequence[StagePlan],
        demand: KvDemand,
    ) -> Fitted:
        """The candidate as stages, its limits noted."""
        decisions, limits = self.decisions, self.limits
        if best.rows > limits.max_sequences_per_slot:
            reason = "rows to make the most of what is brought to the devices for each step"
            rows = decisions.revise("pipeline.max_sequences_per_slot", best.rows, reason)
            limits = replace(limits, max_sequences_per_slot=rows)
        if best.tokens != limits.max_tokens_per_step:
            reason = "makes the most of what is brought for each step, as far as memory allows"
            tokens = decisions.revise("pipeline.max_tokens_per_step", best.tokens, reason)
            limits = replace(limits, max_tokens_per_step=tokens)
        demand = replace(demand, max_sequences=limits.num_slots * limits.max_sequences_per_slot)
        placed = self._stages(best, stages)
        if problem.fixed_split is None:
            split = str([stage.num_layers for stage in placed])
            decisions.revise("pipeline.split", split, _split_reason(best))
        note_cache(self.decisions, best)
        if not best.is_resident:
            cost = offload_cost([choice.forecast for choice in best.stages])
            decisions.note("memory.offload", cost, _avoidable(problem, best))
            self._note_host_bytes()
        return Fitted(placed, limits, demand, self._needs(placed, limits, demand))

    def _note_host_bytes(self) -> None:
        """Where fewer are taken than were asked for."""
        asked = self.decisions.config.memory.host_bytes
        if self.device == "cpu" or not isinstance(asked, int):
            return
        tightest = min(self.ranks, key=lambda rank: most_host_bytes(rank, self.ranks))
        most = most_host_bytes(tightest, self.ranks)
        if most < asked:
            who = f"rank {tightest.rank} on {tightest.host}"
            reason = f"less than the {gib(asked)} asked for: {who} has no more of its host's "
            reason += "memory beside what its libraries take"
            self.decisions.note("memory.host_bytes", gib(most), reason)

    def _stages(self, best: Candidate, stages: Sequence[StagePlan]) -> tuple[StagePlan, ...]:
        parts, layer_bytes = [], part_bytes(self.spec, self.dtype).layer
        total_s = sum(choice.forecast.step_s for choice in best.stages)
        first_layer = 0
        for stage, choice in zip(stages, best.stages, strict=True):
            num_layers = choice.placed.shape.num_layers
            parts.append(
                replace(
                    stage,
                    first_layer=first_layer,
                    last_layer=first_layer + num_layers,
                    weight_bytes=stage.weight_bytes + (num_layers - stage.num_layers) * layer_bytes,
                    cost_share=round(choice.forecast.step_s / total_s, 6),
                    offload=offload_of(choice, first_layer),
                    kv_in_host=kv_in_host(choice, first_layer),
                )
            )
            first_layer += num_layers
        return tuple(parts)

    # ---- where nothing fits ----------------------------------------------------------------------

    def _remedies(
        self, problem: OffloadProblem, demand: KvDemand, workload: Workload
    ) -> tuple[str, ...]:
        """What would let the run begin, each tried in the same search.

        Raises:
            PlanError: memory.device_bytes is too little, whatever is offloaded.
        """
        memory, remedies = self.decisions.config.memory, []
        on_disk = best_candidate(with_disk(problem))
        if on_disk is not None:
            needed = gib(max(choice.placed.disk_bytes for choice in on_disk.stages))
            remedies.append(_folder(on_disk))
            if self.device == "cuda" and self._is_enough(problem, host_bytes=sys.maxsize):
                remedies.append(f"let memory.host_bytes be {needed} more, if the host has it")
        least_mib = self._least_device_mib(problem, offload_dir=memory.offload_dir)
        if least_mib is not None:
            remedies.append(f"raise memory.device_bytes to at least {least_mib} MiB")
        remedies += self._narrower(demand, workload)
        if on_disk is None and isinstance(memory.device_bytes, int):
            self._check_device_bytes(problem, memory.device_bytes, remedies)
        return tuple(remedies)

    def _narrower(self, demand: KvDemand, workload: Workload) -> Iterator[str]:
        """Smaller weights that would fit."""
        if self.spec.quantized == "none":
            spec = replace(self.spec, quantized="int8")
            if best_candidate(replace(self, spec=spec)._problem(demand, workload)) is not None:
                yield 'set model.quantize = "int8"'
        if self.dtype == "float32":
            dtype: DtypeName = "float16" if self.device == "cuda" else "bfloat16"
            if best_candidate(replace(self, dtype=dtype)._problem(demand, workload)) is not None:
                yield f'a smaller model.dtype such as "{dtype}"'

    def _check_device_bytes(
        self, problem: OffloadProblem, device_bytes: int, remedies: Sequence[str]
    ) -> None:
        """Raises PlanError where it is less than the largest stage needs with all on a disk."""
        least_mib = self._least_device_mib(problem, offload_dir="/")
        if least_mib is None:
            return
        smallest = self._smallest(problem, device_bytes=least_mib * _MIB, offload_dir="/")
        assert smallest is not None, "as found"
        number = max(
            range(len(smallest.split)),
            key=lambda stage: problem.least_device_bytes(stage, smallest.split[stage]),
        )
        held = ["a layer or staging buffer"]
        shape, parts = smallest.stages[number].placed.shape, problem.model.parts
        if shape.has_embedding and parts.positions:
            held.append("the table of positions")
        if keeps_head(shape, parts):
            held.append("the LM head")
        if self.device == "cuda":
            held += ["work space", "the least cache"]
        what = held[0] if len(held) == 1 else f"{', '.join(held[:-1])} and {held[-1]}"
        least = f"raise memory.device_bytes to at least {least_mib} MiB"
        uses_disk = any(choice.placed.disk_bytes for choice in smallest.stages)
        if uses_disk and not self.decisions.config.memory.offload_dir:
            least += f" and {_folder(smallest)}"
        rank = self.ranks[number * self._num_lanes]
        alone = f"raise memory.device_bytes to at least {least_mib} MiB"
        raise PlanError(
            f"stage {number} (rank {rank.rank} on {rank.host}) with {smallest.split[number]} of "
            f"{self.spec.num_layers} layers needs {least_mib} MiB on its device, for {what}, "
            f"however much is offloaded, but memory.device_bytes allows only {gib(device_bytes)}: "
            + ", or ".join([least, *(remedy for remedy in remedies if remedy != alone)])
        )

    def _least_device_mib(self, problem: OffloadProblem, *, offload_dir: str) -> int | None:
        """The least `memory.device_bytes` with which a run fits; None: no limit is too low."""
        asked = self.decisions.config.memory.device_bytes
        if not isinstance(asked, int):
            return None
        most = max(max(rank.memory_available_bytes, rank.gpu.free_bytes) for rank in self.ranks)

        def is_enough(mib: int) -> bool:
            return self._is_enough(problem, device_bytes=mib * _MIB, offload_dir=offload_dir)

        tried = range(asked // _MIB + 1, most // _MIB + 2)
        if not tried or not is_enough(tried[-1]):
            return None
        return tried[bisect_left(tried, True, key=is_enough)]

    def _is_enough(self, problem: OffloadProblem, **settings: Any) -> bool:
        return self._smallest(problem, **settings) is not None

    def _smallest(self, problem: OffloadProblem, **settings: Any) -> Candidate | None:
        """The candidate that needs least memory, with other settings of `memory`."""
        memory = replace(self.decisions.config.memory, **settings)
        problem = replace(problem, rooms=self._rooms(memory))
        return candidate_of(problem, problem.rows[0], problem.tokens[0])

    # ---- what a stage needs ----------------------------------------------------------------------

    def _needs(
        self, stages: Sequence[StagePlan], limits: StepLimits, demand: KvDemand
    ) -> tuple[RankMemory, ...]:
        memory = self.decisions.config.memory
        needs = []
        each = [stage for stage in stages for _ in range(self._num_lanes)]
        for stage, rank_resources in zip(each, self.ranks, strict=True):
            page_bytes = self._page_bytes(stage.num_kv_device_layers)
            usable, limit, work_bytes, limited_by = None, None, 0, ""
            if self.device == "cuda":
                limited_by = gpu_limit(memory, rank_resources, self.ranks)
                usable = gpu_bytes(memory, rank_resources, self.ranks)
                work_bytes = self._gpu_work_bytes(stage, limits, demand, usable, page_bytes)
            elif isinstance(memory.device_bytes, int):
                limit = memory.device_bytes
            needs.append(
                rank_memory(
                    rank_resources,
                    stage,
                    page_bytes,
                    work_bytes,
                    gpu_bytes=usable,
                    weight_limit_bytes=limit,
                    limited_by=limited_by,
                )
            )
        rooms = [room for room in self._rooms(memory) for _ in range(self._num_lanes)]
        return with_page_limits(needs, each, rooms, self._page_bytes)

    def _page_bytes(self, num_layers: int) -> int:
        return kv_page_bytes(
            self.spec,
            self.dtype,
            num_layers=num_layers,
            page_size_tokens=self.decisions.config.memory.page_size_tokens,
            row_multiple=8 if self.device == "cuda" else 1,
        )

    def _gpu_work_bytes(
        self,
        stage: StagePlan,
        limits: StepLimits,
        demand: KvDemand,
        usable_bytes: int,
        page_bytes: int,
    ) -> int:
        work_bytes = limits.gpu_work_bytes(
            self.spec, self.dtype, self.sampling, has_head=stage.has_head
        )
        if self.attention not in _GATHERING:
            return work_bytes
        return work_bytes + gather_bytes(
            self.spec,
            self.dtype,
            num_tokens=limits.max_sequences_per_slot * demand.longest_tokens,
            num_layers=stage.num_layers,
            kv_bytes=asked_kv_bytes(self.decisions.config.memory, page_bytes),
            free_bytes=max(0, usable_bytes - stage.device_weight_bytes - work_bytes),
        )

    # ---- the search ------------------------------------------------------------------------------

    def _problem(self, demand: KvDemand, workload: Workload) -> OffloadProblem:
        config, limits = self.decisions.config, self.limits
        run = RunShape.of(
            workload.num_requests,
            workload.num_prompt_tokens,
            workload.num_output_tokens,
            demand.longest_tokens,
            is_longest_known=demand.longest_request_tokens is not None,
        )
        split = config.pipeline.split
        num_pages = self._fixed_pages()
        return OffloadProblem(
            model=ModelParts(self.spec, self.dtype, part_bytes(self.spec, self.dtype)),
            rooms=self._rooms(config.memory),
            run=run,
            num_slots=limits.num_slots,
            page_size=config.memory.page_size_tokens,
            kv_bytes=self._kv_bytes,
            work_bytes=partial(self._work_bytes, demand.longest_tokens),
            rows=self._rows(run, num_pages),
            tokens=self._tokens(),
            fixed_pages=num_pages,
            fixed_split=split if isinstance(split, tuple) else None,
            kv_host_shares=kv_host_shares(config.memory, self.device, self.attention),
        )

    def _rooms(self, memory: MemoryConfig) -> tuple[RankRoom, ...]:
        num_threads, _ = threads_per_rank(self.decisions.config.pipeline.bind, self.world)
        on_gpus = self.device == "cuda"
        rooms = rank_rooms(memory, self.ranks, self.world, on_gpus=on_gpus, num_threads=num_threads)
        return stage_rooms(rooms, self._num_lanes)

    def _kv_bytes(self, num_pages: int, num_layers: int) -> int:
        """Of a stage's cache, or what the settings ask for."""
        page_bytes = self._page_bytes(num_layers)
        asked = asked_kv_bytes(self.decisions.config.memory, page_bytes)
        unowned = page_bytes * (self.device == "cuda")  # rows of no sequence write there
        return unowned + (num_pages * page_bytes if asked is None else asked)

    def _work_bytes(  # noqa: PLR0917 - as `OffloadProblem.work_bytes`
        self,
        longest_tokens: int,
        rows: int,
        tokens: int,
        num_pages: int,
        num_layers: int,
        has_head: bool,
    ) -> int:
        """Of a stage beside its weights and cache; on a CPU it is a part of what stays free."""
        if self.device == "cpu":
            return 0
        limits = self._limits(rows, tokens)
        needed = limits.gpu_work_bytes(self.spec, self.dtype, self.sampling, has_head=has_head)
        if self.attention not in _GATHERING:
            return needed
        return needed + gather_bytes(
            self.spec,
            self.dtype,
            num_tokens=limits.max_sequences_per_slot * longest_tokens,
            num_layers=num_layers,
            kv_bytes=num_pages * self._page_bytes(num_layers),
            free_bytes=0,
        )

    def _limits(self, rows: int, tokens: int) -> StepLimits:
        """Those of a candidate: `rows` are what it reckons with, more may be allowed."""
        asked = self.decisions.config.pipeline.max_sequences_per_slot
        most = asked if isinstance(asked, int) else max(rows, self.limits.max_sequences_per_slot)
        return replace(self.limits, max_sequences_per_slot=most, max_tokens_per_step=tokens)

    def _fixed_pages(self) -> int | None:
        """As asked for: with `kv_cache_bytes` about so many, if the layers are split evenly."""
        num_stages = len(self.ranks) // self._num_lanes
        even = self._page_bytes(-(-self.spec.num_layers // num_stages))
        asked = asked_kv_bytes(self.decisions.config.memory, even)
        return None if asked is None else asked // even

    def _rows(self, run: RunShape, num_pages: int | None) -> tuple[int, ...]:
        """No more than the settings allow, the run can use, and the asked for pages hold."""
        config, num_slots = self.decisions.config, self.limits.num_slots
        asked = config.pipeline.max_sequences_per_slot
        most = asked if isinstance(asked, int) else _ROWS[-1]
        if run.num_requests is not None:
            most = min(most, max(1, -(-run.num_requests // num_slots)))
        rows = sorted({row for row in (*_ROWS, most) if row <= most})
        if num_pages is None:
            return tuple(rows)
        page_size = config.memory.page_size_tokens
        held = [row for row in rows if run.num_pages(row * num_slots, page_size) <= num_pages]
        return tuple(held) or (1,)

    def _tokens(self) -> tuple[int, ...]:
        asked = self.decisions.config.pipeline.max_tokens_per_step
        if isinstance(asked, int):
            return (asked,)
        tried = _GPU_TOKENS if self.device == "cuda" else _CPU_TOKENS
        least = self.limits.max_sequences_per_slot
        return tuple(sorted({max(tokens, least) for tokens in tried}))


def _folder(found: Candidate) -> str:
    """The advice to give one for what `found` has on disk."""
    needed = gib(max(choice.placed.disk_bytes for choice in found.stages))
    return f"set memory.offload_dir to a folder on a local disk with {needed} free a rank"


def _split_reason(best: Candidate) -> str:
    return f"balanced by what a step of {best.rows} rows takes, with what is brought"


def _avoidable(problem: OffloadProblem, best: Candidate) -> str:
    """By which rates, and what would spare it."""
    used: dict[str, None] = {}
    for room, choice in zip(problem.rooms, best.stages, strict=True):
        if choice.placed.host_bytes or choice.placed.disk_bytes:
            used[room.speed.rates.link_source] = None
        if choice.placed.disk_bytes:
            used[room.speed.rates.disk_source] = None
    parts = [f"reckoned with {', '.join(filter(None, used))}"]
    if clauses := offload_advice(problem, best):
        parts.append(f"to avoid it: {'; '.join(clauses)}")
    return "; ".join(parts)
