"""From the configuration and the ranks to a `PipelinePlan`: every `auto` becomes a value.

Pure and deterministic: no clock, no environment, no order of arrival. The head plans once and sends
the plan to all ranks. `config.checks` has checked the ranges of single settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.config.checks import default_sampling
from mpipipe.config.legacy import check_against_plan
from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import PlanError
from mpipipe.planning.attention_choice import AttentionFacts, choose_attention
from mpipipe.planning.cost import (
    WorkMix,
    gpu_head_cost_in_layers,
    head_cost_in_layers,
    stage_weight_bytes,
)
from mpipipe.planning.devices import (
    choose_device,
    choose_lookahead,
    choose_prefill,
    choose_transport,
    least_capable,
)
from mpipipe.planning.fit import Fitted, StageFitting
from mpipipe.planning.kv_host import KvHostFacts, with_host_pages
from mpipipe.planning.layout import (
    Layout,
    lay_out,
    note_cores,
    note_layout,
    note_replicas,
    sharing,
    threads_per_rank,
)
from mpipipe.planning.memory import KvDemand, choose_num_pages
from mpipipe.planning.partition import check_split, split_layers, stage_costs
from mpipipe.planning.plan import Decisions, PipelinePlan, Resolved, StagePlan
from mpipipe.planning.prefix_groups import max_sharing_tokens, with_prefixes_read_once
from mpipipe.planning.quantization import choose_numbers
from mpipipe.planning.replica_rates import predicted_rate
from mpipipe.planning.resources import RankResources
from mpipipe.planning.step_limits import StepLimits, choose_step_limits
from mpipipe.planning.tensor_parallel import check_transport, lane_spec
from mpipipe.planning.workload import SamplingUse, Workload
from mpipipe.types import AttentionName, DeviceName, DtypeName, PrefillMode, TransportName

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig

__all__ = [
    "Job",
    "RankResources",
    "choose_layout",
    "deepspeed_warnings",
    "is_layout_open",
    "make_plan",
    "make_plans",
]

# These know every length on the host only, or plan each step anew there: nothing a graph can hold.
_NO_GRAPHS = frozenset({"sdpa", "reference", "flashinfer"})
_UNKNOWN = Workload()
# So many rows a slot share the reading of the weights well enough: OpenLLaMA-3B on one H200 makes
# 5,700 tokens/s with 32 rows and 8,716 with 256, less than two replicas of 32.
_ENOUGH_ROWS = 64
_USUAL_TOKENS = 1024  # of a request of which nothing is known


def make_plan(
    config: Config,
    spec: ModelSpec,
    resources: Sequence[RankResources],
    model_path: str,
    workload: Workload = _UNKNOWN,
    *,
    notes: Sequence[Resolved] = (),
) -> PipelinePlan:
    """The plan for these ranks, in whatever order they are given, and what is known of the run.

    `notes`: what was decided before, with reasons; the plan keeps them.

    Of several replicas it is the first one's: see `make_plans`, which also says what is raised.
    """
    return make_plans(config, spec, resources, model_path, workload, notes=notes)[0]


def make_plans(
    config: Config,
    spec: ModelSpec,
    resources: Sequence[RankResources],
    model_path: str,
    workload: Workload = _UNKNOWN,
    *,
    notes: Sequence[Resolved] = (),
    layout: Layout | None = None,
) -> tuple[PipelinePlan, ...]:
    """The plan of every replica; `layout`: which ranks they are, None: as `choose_layout` finds.

    Device, numbers and attention are the same in all replicas: so are the tokens.

    Raises:
        RankCountError: the number of ranks is not what replicas, stages and lanes take.
        EnvironmentSetupError: the GPUs that were asked for are not there.
        PlanError: layers, stages, settings and memory do not fit together.
    """
    job = Job.of(config, spec, resources, model_path, workload, notes=notes)
    return job.plans(layout or job.choose_layout())


def choose_layout(
    config: Config,
    spec: ModelSpec,
    resources: Sequence[RankResources],
    workload: Workload = _UNKNOWN,
) -> Layout:
    """Which ranks make which pipeline. Where replicas and stages are "auto", all ways are tried.

    All weights must stay on their devices. Of these ways the one with the highest predicted rate is
    taken; for a workload that is not known, that of the shortest pipelines whose KV cache holds
    `_ENOUGH_ROWS` usual requests a slot.

    Raises:
        RankCountError: the number of ranks is not what replicas, stages and lanes take.
    """
    return Job.of(config, spec, resources, "", workload).choose_layout()


def is_layout_open(config: Config) -> bool:
    """Whether `choose_layout` has a choice, and wants to know the workload."""
    return config.pipeline.replicas == AUTO and config.pipeline.num_stages == AUTO


@dataclass(frozen=True, slots=True)
class Job:
    """What all replicas have in common, and all splits and layouts that are tried; see `of`."""

    config: Config
    spec: ModelSpec
    ranks: Sequence[RankResources]  # by rank
    model_path: str
    workload: Workload
    notes: tuple[Resolved, ...]  # what was decided before

    @staticmethod
    def of(
        config: Config,
        spec: ModelSpec,
        resources: Sequence[RankResources],
        model_path: str,
        workload: Workload = _UNKNOWN,
        *,
        notes: Sequence[Resolved] = (),
    ) -> Job:
        """Of the resources of every rank, in any order."""
        ranks = sorted(resources, key=lambda rank_resources: rank_resources.rank)
        assert [rank.rank for rank in ranks] == list(range(len(ranks))), "those of every rank"
        return Job(config, spec, ranks, model_path, workload, tuple(notes))

    def with_split(self, split: tuple[int, ...], *more: Resolved) -> Job:
        """With `split` in all replicas; `more`: what was decided of it."""
        config = replace(self.config, pipeline=replace(self.config.pipeline, split=split))
        return replace(self, config=config, notes=(*self.notes, *more))

    def choose_layout(self) -> Layout:
        """See the function of this name."""
        pipeline = self.config.pipeline
        if not is_layout_open(self.config):
            return lay_out(self.ranks, pipeline)
        whole = lay_out(self.ranks, replace(pipeline, replicas=1))
        whole = replace(whole, reason="all ranks make one")
        layouts = dict.fromkeys(
            lay_out(self.ranks, pipeline, least_stages=least_stages)
            for least_stages in range(1, len(self.ranks) // pipeline.tensor_parallel)
        )
        fitting = {}
        for layout in layouts:
            if len(layout.replicas) > 1 and (plans := self._resident(layout)):
                fitting[layout] = plans
        if not fitting:
            return replace(whole, reason="no smaller pipeline holds the model")
        rates = {layout: self._tokens_per_s(plans) for layout, plans in fitting.items()}
        if any(rate is None for rate in rates.values()):  # of requests that are not known
            return self._roomiest(fitting, whole)
        return self._fastest(rates, whole)

    def _resident(self, layout: Layout) -> tuple[PipelinePlan, ...]:
        """The plans, if weights and cache stay on their devices; empty: they do not fit there."""
        try:
            plans = self.plans(layout)
        except PlanError:
            return ()
        stages = [stage for plan in plans for stage in plan.stages]
        elsewhere = any(s.offload is not None or s.kv_in_host is not None for s in stages)
        return () if elsewhere else plans

    def _tokens_per_s(self, plans: Sequence[PipelinePlan]) -> float | None:
        return predicted_rate(self.spec, plans, self.ranks, self.workload)

    def _fastest(self, rates: Mapping[Layout, float | None], whole: Layout) -> Layout:
        """By the predicted tokens/s of the job; of equal ones the one with most replicas."""
        told = {layout: rate or 0.0 for layout, rate in rates.items()}
        if plans := self._resident(whole):
            told[whole] = self._tokens_per_s(plans) or 0.0
        best = max(told, key=lambda layout: (told[layout], len(layout.replicas)))
        others = [rate for layout, rate in told.items() if layout != best]
        if not others or not max(others):
            return best
        gain = f"{told[best] / max(others):.2f} times as fast as the next best number"
        return replace(best, reason=f"{best.reason}; predicted to be {gain}")

    def _roomiest(self, fitting: Mapping[Layout, Sequence[PipelinePlan]], whole: Layout) -> Layout:
        """The shortest pipelines that hold a full batch of usual requests."""
        for layout, plans in fitting.items():
            if all(map(_holds_batch, plans)):
                return layout
        return replace(whole, reason="no smaller pipeline holds the model and a full batch")

    def plans(self, layout: Layout) -> tuple[PipelinePlan, ...]:
        """Of all replicas; raises as `make_plans`."""
        return tuple(self._plan(layout, replica) for replica in range(len(layout.replicas)))

    def _plan(self, layout: Layout, replica: int) -> PipelinePlan:
        config, ranks, workload = self.config, self.ranks, self.workload
        num_stages = len(layout.replicas[replica]) // layout.num_lanes
        num_replicas, decisions = len(layout.replicas), Decisions(config, list(self.notes))
        staged = sharing(ranks, layout.replicas[replica])
        workload = workload.share_of(num_replicas)
        decisions.settle("pipeline.replicas", num_replicas, layout.reason)
        whose = "one per rank" if layout.num_lanes == 1 else f"one per {layout.num_lanes} ranks"
        whose += "" if num_replicas == 1 else " of a replica"
        decisions.settle("pipeline.num_stages", num_stages, whose)
        device, reason = choose_device(config.pipeline, ranks)
        decisions.settle("pipeline.device", device, reason)
        spec, dtype = choose_numbers(self.spec, decisions, device, ranks)
        spec = lane_spec(spec, layout.num_lanes)
        limits = choose_step_limits(
            spec,
            staged,
            decisions,
            device=device,
            num_stages=num_stages,
            num_requests=workload.num_requests,
        )
        demand = _demand(config, limits, workload)
        sampling = workload.sampling or _unknown_sampling(config)
        note_replicas(ranks, layout, decisions)
        note_layout(staged, decisions)
        resolver = _Resolver(
            spec, staged, ranks, layout, device, dtype, limits, sampling, decisions
        )
        stages = resolver.stages(num_stages, _work_mix(limits, workload))
        attention = resolver.attention()
        fitting = StageFitting(
            spec, staged, device, dtype, limits, sampling, attention[0], decisions, world=ranks
        )
        fitted = fitting.fit(stages, demand, workload)
        plan = replace(resolver, limits=fitted.limits).plan(self.model_path, fitted, attention)
        facts = KvHostFacts(spec, staged, ranks, fitted.demand, fitted.needs, decisions, workload)
        plan = with_prefixes_read_once(with_host_pages(plan, facts), decisions, workload)
        return replace(plan, replica=replica, num_replicas=num_replicas)


def _unknown_sampling(config: Config) -> SamplingUse:
    """Of requests that come later: those of the configuration, and greedy ones."""
    return replace(SamplingUse.of([default_sampling(config.generation)]), plain=True)


def _holds_batch(plan: PipelinePlan) -> bool:
    """Whether the cache holds enough requests of a usual length."""
    rows = plan.num_slots * min(plan.max_sequences_per_slot, _ENOUGH_ROWS)
    tokens = min(plan.max_context_tokens, _USUAL_TOKENS)
    return plan.num_kv_pages >= rows * -(-tokens // plan.page_size_tokens)


def _demand(config: Config, limits: StepLimits, workload: Workload) -> KvDemand:
    return KvDemand(
        page_size_tokens=config.memory.page_size_tokens,
        max_context_tokens=limits.max_context_tokens,
        max_sequences=limits.num_slots * limits.max_sequences_per_slot,
        longest_request_tokens=workload.longest_request_tokens,
        num_requests=workload.num_requests,
    )


def _work_mix(limits: StepLimits, workload: Workload) -> WorkMix:
    """The run's own mix where all of it is known, else full decode steps."""
    num_requests, num_prompt_tokens = workload.num_requests, workload.num_prompt_tokens
    num_output_tokens = workload.num_output_tokens
    if not num_requests or num_prompt_tokens is None or not num_output_tokens:
        return WorkMix(limits.max_sequences_per_slot)
    rows = min(limits.max_sequences_per_slot, -(-num_requests // limits.num_slots))
    return WorkMix(rows, num_requests, num_prompt_tokens, num_output_tokens)


@dataclass(frozen=True, slots=True)
class _Resolver:
    """Answers the questions that need device, dtype and limits."""

    spec: ModelSpec
    ranks: Sequence[RankResources]  # in the order of their stages, and lanes
    world: Sequence[RankResources]  # of all replicas
    layout: Layout
    device: DeviceName
    dtype: DtypeName
    limits: StepLimits
    sampling: SamplingUse
    decisions: Decisions

    def stages(self, num_stages: int, mix: WorkMix) -> tuple[StagePlan, ...]:
        """Which rank holds which layers."""
        if self.device == "cuda":
            head = gpu_head_cost_in_layers(self.spec, self.dtype, mix)
        else:
            head = head_cost_in_layers(self.spec, self.dtype)
        split = self._split(num_stages, head)
        costs = stage_costs(split, last_extra=head)
        stages = []
        for stage, (num_layers, cost) in enumerate(zip(split, costs, strict=True)):
            first_layer = sum(split[:stage])
            has_embedding, has_head = stage == 0, stage == num_stages - 1
            weight_bytes = stage_weight_bytes(
                self.spec,
                self.dtype,
                num_layers=num_layers,
                has_embedding=has_embedding,
                has_head=has_head,
            )
            stages.append(
                StagePlan(
                    stage=stage,
                    rank=self._lanes(stage)[0].rank,
                    host=self._lanes(stage)[0].host,
                    first_layer=first_layer,
                    last_layer=first_layer + num_layers,
                    has_embedding=has_embedding,
                    has_head=has_head,
                    weight_bytes=weight_bytes,
                    cost_share=round(cost / sum(costs), 6),
                    lane_ranks=self._lane_ranks(stage),
                )
            )
        return tuple(stages)

    def _lanes(self, stage: int) -> Sequence[RankResources]:
        first = stage * self.layout.num_lanes
        return self.ranks[first : first + self.layout.num_lanes]

    def _lane_ranks(self, stage: int) -> tuple[int, ...]:
        lanes = self._lanes(stage)
        return tuple(rank.rank for rank in lanes) if len(lanes) > 1 else ()

    def _split(self, num_stages: int, head: float) -> tuple[int, ...]:
        asked, num_layers = self.decisions.config.pipeline.split, self.spec.num_layers
        if isinstance(asked, tuple):
            return check_split(asked, num_layers=num_layers, num_stages=num_stages)
        split = split_layers(num_layers, num_stages, last_extra=head)
        reason = f"balanced by cost; the LM head counts as {head:.1f} layers"
        self.decisions.note("pipeline.split", str(list(split)), reason)
        return split

    def plan(self, path: str, fitted: Fitted, attention: tuple[AttentionName, str]) -> PipelinePlan:
        """The plan: the answers so far, and the remaining ones."""
        memory, spec, limits = self.decisions.config.memory, self.spec, self.limits
        stages, demand = fitted.stages, fitted.demand
        backend = self.decisions.settle("pipeline.attention", *attention)
        pages = choose_num_pages(memory, fitted.needs, demand, fitted.remedies)
        num_pages = self.decisions.settle("memory.num_kv_pages", *pages)
        lookahead, prefill, sharing = self._scheduling_mode()
        return PipelinePlan(
            model_path=path,
            model_type=spec.model_type,
            architecture=spec.architecture,
            dtype=self.dtype,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            stages=stages,
            num_slots=limits.num_slots,
            max_sequences_per_slot=limits.max_sequences_per_slot,
            max_tokens_per_step=limits.max_tokens_per_step,
            page_size_tokens=memory.page_size_tokens,
            num_kv_pages=num_pages,
            max_context_tokens=limits.max_context_tokens,
            kv_cache=memory.kv_cache,
            transport=self._transport(),
            device=self.device,
            attention=backend,
            threads_per_rank=self._threads(),
            lookahead=lookahead,
            prefill=prefill,
            cuda_graphs=self._cuda_graphs(backend, stages),
            weights=self.decisions.config.model.weights,
            quantize=spec.quantized,
            offload_dir=memory.offload_dir if any(map(_uses_disk, stages)) else "",
            # Only steps that are sent ahead need tables that are no wider than the run's requests.
            max_sequence_tokens=demand.longest_tokens if lookahead else limits.max_context_tokens,
            restart_tokens=self._restart_tokens(demand.longest_tokens),
            max_sharing_tokens=sharing,
            sampling=self.sampling,
            resolved=tuple(self.decisions.notes),  # last: the calls above add to them
        )

    def _transport(self) -> TransportName:
        """The same for all replicas, as all ranks open it together."""
        if self.layout.most_stages == 1 and self.layout.num_lanes == 1:
            reason = "a single stage sends to no other rank"
            self.decisions.note("pipeline.transport", "loopback", reason)
            return "loopback"
        asked = self.decisions.config.pipeline.transport
        transport, reason = choose_transport(asked, self.device, self.world)
        check_transport(transport, self.device, self.layout.num_lanes)
        return self.decisions.settle("pipeline.transport", transport, reason)

    def attention(self) -> tuple[AttentionName, str]:
        """The backend, and why."""
        offered = [set(rank_resources.attention_backends) for rank_resources in self.world]
        facts = AttentionFacts(
            device=self.device,
            capability=least_capable(self.world).gpu.capability,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            available=set.intersection(*offered),
        )
        return choose_attention(self.decisions.config.pipeline.attention, facts)

    def _scheduling_mode(self) -> tuple[int, PrefillMode, int]:
        config = self.decisions.config
        lookahead, reason = choose_lookahead(config.pipeline, self.device, config.memory.kv_cache)
        self.decisions.settle("pipeline.lookahead", lookahead, reason)
        prefill, reason = choose_prefill(config.pipeline.prefill, lookahead)
        prefill = self.decisions.settle("pipeline.prefill", prefill, reason)
        return lookahead, prefill, max_sharing_tokens(self.decisions, self.spec, self.limits)

    def _cuda_graphs(self, attention: AttentionName, stages: Sequence[StagePlan]) -> bool:
        """Whether any stage captures decode steps; notes the reason of those that cannot."""
        if not self.decisions.config.memory.cuda_graphs or self.device != "cuda":
            return False
        unsupported_reason = ""
        if attention in _NO_GRAPHS:
            unsupported_reason = f"{attention} attention needs lengths that only the host knows"
        elif self.spec.num_experts > 1:
            unsupported_reason = "the routing of experts makes shapes that depend on values"
        if unsupported_reason:
            self.decisions.note("memory.cuda_graphs", "false", unsupported_reason)
            return False
        on_disk = [str(stage.stage) for stage in stages if _uses_disk(stage)]
        graphs = len(on_disk) < len(stages)
        if on_disk:
            who = f"stage{'s' * (len(on_disk) > 1)} {', '.join(on_disk)}"
            reason = f"not on {who}: a graph cannot read weights from a disk"
            self.decisions.note("memory.cuda_graphs", str(graphs).lower(), reason)
        return graphs

    def _restart_tokens(self, longest_tokens: int) -> int:
        """Where sequences start over, if any of the run grows as far."""
        restart_tokens = self.spec.rotary.restart_tokens
        if not 0 < restart_tokens < longest_tokens:
            return 0
        self.decisions.note(
            "model.rotary",
            self.spec.rotary.kind,
            f"a sequence that grows to {restart_tokens} tokens is computed anew once, with the "
            "long factors, as transformers does",
        )
        return restart_tokens

    def _threads(self) -> int:
        bind = self.decisions.config.pipeline.bind
        note_cores(bind, self.world, self.decisions)
        num_threads, reason = threads_per_rank(bind, self.world)
        return self.decisions.settle("pipeline.threads_per_rank", num_threads, reason)


def _uses_disk(stage: StagePlan) -> bool:
    return stage.offload is not None and stage.offload.disk_bytes > 0


def deepspeed_warnings(loaded: LoadedConfig, plan: PipelinePlan) -> list[str]:
    """What a `ds_config.json` beside the configuration asks for and the plan does differently.

    Raises:
        ConfigError: it was written for another number of stages.
    """
    if loaded.deepspeed is None:
        return []
    return check_against_plan(
        loaded.deepspeed,
        num_stages=plan.num_stages,
        dtype=plan.dtype,
        max_sequences_per_slot=plan.max_sequences_per_slot,
    )
