"""From what was asked for and what is there to a `PipelinePlan`: every `auto` becomes a value.

Pure and deterministic: no clock, no environment, no order of arrival. The head plans once and sends
the plan to all ranks. Not here: ranges of single settings (`config.checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import EnvironmentSetupError, PlanError
from mpipipe.planning.cost import head_cost_in_layers, kv_page_bytes, stage_weight_bytes
from mpipipe.planning.memory import KvDemand, RankMemory, choose_num_pages
from mpipipe.planning.partition import check_split, split_layers, stage_costs
from mpipipe.planning.plan import PipelinePlan, Resolved, StagePlan

__all__ = ["RankResources", "make_plan"]

# Enough rows to use the weights well while a step stays short: at 8 rows a CPU core still waits for
# memory, from about a dozen on it computes (planning/cost.py: 60 GFLOP/s over 10 GB/s).
_SEQUENCES_PER_SLOT = 32
# Arithmetic of 16 decode steps of 32 sequences: what a prompt chunk may hold up other slots.
_TOKENS_PER_STEP = 512


class RankResources(Protocol):
    """What planning reads of a rank's `Hello`."""

    @property
    def rank(self) -> int:
        """Position in the world."""
        ...

    @property
    def world_size(self) -> int:
        """Ranks that were started."""
        ...

    @property
    def host(self) -> str:
        """Name of the host; equal names share cores and memory."""
        ...

    @property
    def num_cores(self) -> int:
        """Cores that the rank may use."""
        ...

    @property
    def memory_available_bytes(self) -> int:
        """Memory available on its host."""
        ...


def make_plan(
    config: Config,
    spec: ModelSpec,
    hellos: Sequence[RankResources],
    model_path: str,
    *,
    longest_request_tokens: int | None = None,
    num_requests: int | None = None,
) -> PipelinePlan:
    """The plan for these ranks, in whatever order they are given.

    `longest_request_tokens` is the longest prompt with its completion, where it is known.

    Raises:
        EnvironmentSetupError: the number of ranks is not `pipeline.num_stages`.
        PlanError: layers, stages, settings and memory do not fit together.
    """
    ranks = sorted(hellos, key=lambda hello: hello.rank)
    assert [hello.rank for hello in ranks] == list(range(len(ranks))), "a hello of every rank"
    assert all(hello.world_size == len(ranks) for hello in ranks), "hellos of one world"
    resolver = _Resolver(config, spec, ranks)
    num_stages = resolver.num_stages()
    dtype = resolver.dtype()
    stages = resolver.stages(dtype)
    limits = resolver.limits(num_stages)
    demand = KvDemand(
        page_size_tokens=config.memory.page_size_tokens,
        max_context_tokens=limits.max_context_tokens,
        max_sequences=limits.num_slots * limits.max_sequences_per_slot,
        longest_request_tokens=longest_request_tokens,
        num_requests=num_requests,
    )
    num_kv_pages = resolver.num_kv_pages(stages, dtype, demand)
    return resolver.plan(model_path, dtype, stages, limits, num_kv_pages)


@dataclass(frozen=True, slots=True)
class _Limits:
    num_slots: int
    max_sequences_per_slot: int
    max_tokens_per_step: int
    max_context_tokens: int


@dataclass(slots=True)
class _Resolver:
    """Answers one question after the other; notes what every `auto` became, and why."""

    config: Config
    spec: ModelSpec
    ranks: Sequence[RankResources]  # by rank
    notes: list[Resolved] = field(default_factory=list)

    def num_stages(self) -> int:
        """One per rank, or an error that says how to launch."""
        num_ranks = len(self.ranks)
        asked = self.config.pipeline.num_stages
        num_stages = self._count("pipeline.num_stages", asked, num_ranks, "one per rank")
        if num_stages != num_ranks:
            raise EnvironmentSetupError(
                f"pipeline.num_stages = {num_stages}, but {num_ranks} "
                f"rank{' was' if num_ranks == 1 else 's were'} started, and every stage is one "
                f"rank: start `mpirun -n {num_stages} mpipipe run …` or "
                f"`srun -n {num_stages} mpipipe run …`, or set pipeline.num_stages = {num_ranks}"
            )
        return num_stages

    def dtype(self) -> str:
        """What to store and compute in."""
        reason = f"exact on every CPU; the checkpoint is {self.spec.dtype}"
        if self.spec.dtype == "float32":
            reason = "as in the checkpoint"
        return self._text("model.dtype", self.config.model.dtype, "float32", reason)

    def stages(self, dtype: str) -> tuple[StagePlan, ...]:
        """Which rank holds which layers."""
        head = head_cost_in_layers(self.spec, dtype)
        split = self._split(head)
        costs = stage_costs(split, last_extra=head)
        starts = [sum(split[:stage]) for stage in range(len(split))]
        return tuple(
            self._stage(hello, dtype, first_layer, num_layers, cost / sum(costs))
            for hello, first_layer, num_layers, cost in zip(
                self.ranks, starts, split, costs, strict=True
            )
        )

    def _split(self, head: float) -> tuple[int, ...]:
        asked, num_layers = self.config.pipeline.split, self.spec.num_layers
        num_stages = len(self.ranks)
        if isinstance(asked, tuple):
            return check_split(asked, num_layers=num_layers, num_stages=num_stages)
        split = split_layers(num_layers, num_stages, last_extra=head)
        reason = f"balanced by cost; the LM head counts as {head:.1f} layers"
        self.notes.append(Resolved("pipeline.split", str(list(split)), reason))
        return split

    def _stage(
        self, hello: RankResources, dtype: str, first_layer: int, num_layers: int, share: float
    ) -> StagePlan:
        has_embedding = hello.rank == 0
        has_head = hello.rank == len(self.ranks) - 1
        weight_bytes = stage_weight_bytes(
            self.spec, dtype, num_layers=num_layers, has_embedding=has_embedding, has_head=has_head
        )
        return StagePlan(
            stage=hello.rank,
            rank=hello.rank,
            host=hello.host,
            first_layer=first_layer,
            last_layer=first_layer + num_layers,
            has_embedding=has_embedding,
            has_head=has_head,
            weight_bytes=weight_bytes,
            cost_share=round(share, 6),
        )

    def limits(self, num_stages: int) -> _Limits:
        """How many sequences and tokens at once."""
        pipeline = self.config.pipeline
        num_slots = self._count("pipeline.num_slots", pipeline.num_slots, num_stages, "one a stage")
        max_sequences = self._count(
            "pipeline.max_sequences_per_slot",
            pipeline.max_sequences_per_slot,
            _SEQUENCES_PER_SLOT,
            "enough rows a step to use the weights well on a CPU",
        )
        max_tokens = self._count(
            "pipeline.max_tokens_per_step",
            pipeline.max_tokens_per_step,
            max(_TOKENS_PER_STEP, max_sequences),
            "keeps prompts from holding up the other slots for long",
        )
        if max_tokens < max_sequences:
            raise PlanError(
                f"pipeline.max_tokens_per_step = {max_tokens} is less than "
                f"pipeline.max_sequences_per_slot = {max_sequences}, and every sequence of a slot "
                "needs a token per step: raise the first or lower the second"
            )
        return _Limits(num_slots, max_sequences, max_tokens, self._max_context())

    def _max_context(self) -> int:
        limit = self.spec.max_context_tokens
        asked = self.config.memory.max_context_tokens
        reason = "what the model was made for"
        max_context = self._count("memory.max_context_tokens", asked, limit, reason)
        if max_context > limit:
            raise PlanError(
                f"memory.max_context_tokens = {max_context} is more than the {limit} positions "
                'the model was made for: lower it, or leave it at "auto"'
            )
        return max_context

    def num_kv_pages(self, stages: Sequence[StagePlan], dtype: str, demand: KvDemand) -> int:
        """Pages of KV cache, the same on every rank; checks that all fits."""
        memory = self.config.memory
        ranks = []
        for stage, hello in zip(stages, self.ranks, strict=True):
            page_bytes = kv_page_bytes(
                self.spec,
                dtype,
                num_layers=stage.num_layers,
                page_size_tokens=memory.page_size_tokens,
            )
            available = hello.memory_available_bytes
            ranks.append(
                RankMemory(stage.rank, stage.host, available, stage.weight_bytes, page_bytes)
            )
        num_pages, reason = choose_num_pages(memory, ranks, demand)
        return self._count("memory.num_kv_pages", memory.num_kv_pages, num_pages, reason)

    def plan(
        self,
        model_path: str,
        dtype: str,
        stages: tuple[StagePlan, ...],
        limits: _Limits,
        num_kv_pages: int,
    ) -> PipelinePlan:
        """The answers together with what is left to ask."""
        pipeline, memory, spec = self.config.pipeline, self.config.memory, self.spec
        return PipelinePlan(
            model_path=model_path,
            model_type=spec.model_type,
            architecture=spec.architecture,
            dtype=dtype,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            stages=stages,
            num_slots=limits.num_slots,
            max_sequences_per_slot=limits.max_sequences_per_slot,
            max_tokens_per_step=limits.max_tokens_per_step,
            page_size_tokens=memory.page_size_tokens,
            num_kv_pages=num_kv_pages,
            max_context_tokens=limits.max_context_tokens,
            kv_cache=memory.kv_cache,
            transport=self._transport(len(stages)),
            device=self._text("pipeline.device", pipeline.device, "cpu", "the only one so far"),
            attention=self._text(
                "pipeline.attention", pipeline.attention, "sdpa", "torch's fused attention"
            ),
            threads_per_rank=self._threads(),
            resolved=tuple(self.notes),
        )

    def _transport(self, num_stages: int) -> str:
        if num_stages > 1:
            asked = self.config.pipeline.transport
            return self._text("pipeline.transport", asked, "mpi", "the stages run on CPUs")
        reason = "a single stage sends to nobody else"
        self.notes.append(Resolved("pipeline.transport", "loopback", reason))
        return "loopback"

    def _threads(self) -> int:
        shares = []
        for host in dict.fromkeys(hello.host for hello in self.ranks):
            cores = [hello.num_cores for hello in self.ranks if hello.host == host]
            shares.append((max(1, min(cores) // len(cores)), min(cores), len(cores)))
        value, num_cores, num_ranks = min(shares)
        reason = f"{num_cores} usable cores of a host for {num_ranks} ranks"
        asked = self.config.pipeline.threads_per_rank
        return self._count("pipeline.threads_per_rank", asked, value, reason)

    def _count(self, setting: str, asked: int | str, value: int, reason: str) -> int:
        if isinstance(asked, int):
            return asked
        self.notes.append(Resolved(setting, str(value), reason))
        return value

    def _text(self, setting: str, asked: str, value: str, reason: str) -> str:
        if asked != AUTO:
            return asked
        self.notes.append(Resolved(setting, value, reason))
        return value
