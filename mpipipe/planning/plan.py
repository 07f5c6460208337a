"""`PipelinePlan`: the frozen decision of what runs where, the same on all ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mpipipe.config.schema import AUTO, Config
from mpipipe.errors import PlanError
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.workload import SamplingUse
from mpipipe.types import (
    AttentionName,
    CacheKind,
    DeviceName,
    DtypeName,
    PrefillMode,
    QuantizeName,
    Tier,
    TransportName,
    WeightsSource,
)

__all__ = [
    "Decisions",
    "DraftPlan",
    "KvInHost",
    "PipelinePlan",
    "Resolved",
    "StageOffload",
    "StagePlan",
    "StepForecast",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resolved:
    """One `auto` setting that became a value, and why."""

    setting: str  # e.g. "model.dtype"
    value: str
    reason: str


@dataclass(slots=True)
class Decisions:
    """Takes what the configuration asks for, or notes what an `auto` became and why."""

    config: Config
    notes: list[Resolved] = field(default_factory=list)

    def settle(self, setting: str, value: T, reason: str) -> T:
        """What is asked for in `setting` ("section.name"); where that is `auto` `value`, noted."""
        section, _, name = setting.partition(".")
        asked: Any = getattr(getattr(self.config, section), name)
        if asked != AUTO:
            settled: T = asked
            return settled
        self.note(setting, str(value), reason)
        return value

    def note(self, setting: str, value: str, reason: str) -> None:
        """A decision that does not follow from the setting alone."""
        self.notes.append(Resolved(setting, value, reason))

    def revise(self, setting: str, value: T, reason: str) -> T:
        """As `settle`, in the place of what was noted before."""
        held = next((n for n, note in enumerate(self.notes) if note.setting == setting), None)
        settled = self.settle(setting, value, reason)
        if held is not None and self.notes[-1].setting == setting and held < len(self.notes) - 1:
            self.notes[held] = self.notes.pop()
        return settled


@dataclass(frozen=True, slots=True)
class StepForecast:
    """What planning expects of a full decode step of a stage that is offloaded. Bytes and seconds.

    Compute, link and disk work side by side, each of them all of the time that it needs.
    """

    rows: int = 0
    host_bytes: int = 0  # brought from host memory
    disk_bytes: int = 0  # brought from the disk, and on a GPU over the link as well
    compute_s: float = 0.0  # with all weights on the device: what the step would take without
    link_s: float = 0.0
    disk_s: float = 0.0
    exposed_s: float = 0.0  # of bringing or compute, beside which the other stands still
    lookup_s: float = 0.0  # rows of an embedding that is not on the device
    kv_bytes: int = 0  # of the cache of layers in host memory, read by kernels over the link
    kv_s: float = 0.0  # which computing waits for
    overlaps: bool = True  # False: a single buffer, so that nothing is brought beside the compute
    host_bytes_per_s: float = 0.0  # the rates that this reckons with
    disk_bytes_per_s: float = 0.0

    @property
    def step_s(self) -> float:
        """The step with offload."""
        brought_s = max(self.link_s, self.disk_s)
        both_s = max(self.compute_s, brought_s) if self.overlaps else self.compute_s + brought_s
        return both_s + self.exposed_s + self.lookup_s + self.kv_s

    @property
    def bound_by(self) -> str:
        """`compute`, `link` or `disk`: what takes longest."""
        if max(self.link_s + self.kv_s, self.disk_s) <= self.compute_s:
            return "compute"
        return "disk" if self.disk_s >= self.link_s + self.kv_s else "link"


@dataclass(frozen=True, slots=True)
class StageOffload:
    """What of a stage does not stay on its device, and through how many buffers it comes there.

    Layers are numbered as in the model. Each of them is copied to the device once per step.
    """

    host_layers: tuple[int, ...] = ()  # in pinned host memory
    disk_layers: tuple[int, ...] = ()  # in a file below `PipelinePlan.offload_dir`
    embedding: Tier = "device"
    head: Tier = "device"
    num_buffers: int = (
        2  # each as large as the largest layer; streamed layer i uses i % num_buffers
    )
    device_bytes: int = 0  # of the weights that stay, and of the buffers
    host_bytes: int = 0  # of offloaded weights
    disk_bytes: int = 0
    forecast: StepForecast = field(default_factory=StepForecast)

    @property
    def reads_disk(self) -> bool:
        """Whether a disk is read for each step, but for rows of the embedding."""
        return bool(self.disk_layers) or self.head == "disk"


@dataclass(frozen=True, slots=True)
class KvInHost:
    """Layers whose KV cache is in pinned host memory, where the GPU's kernels read it."""

    layers: tuple[int, ...]  # numbered as in the model
    step_bytes: int = 0  # read over the link in a full decode step, as predicted
    step_s: float = 0.0  # that the step takes longer for it


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Drafts by n-gram lookup (`scheduler.drafts`): how many tokens, and what their steps cost."""

    max_tokens: int  # drafted for a sequence in one step, at most
    rows: tuple[int, ...]  # sizes of steps, ascending; no step with drafts has more than the last
    step_s: tuple[float, ...]  # predicted: of a step of each size through all stages, empty cache
    key_s: float  # and for every token in the cache of every row
    awaited_s: float = 0.0  # what a step takes longer if the tokens before it must be known first
    alone: bool = False  # only while no other slot has sequences


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The slice of the model that one rank holds, or several under tensor parallelism: lanes."""

    stage: int
    rank: int  # of lane 0
    host: str
    first_layer: int  # inclusive
    last_layer: int  # exclusive
    has_embedding: bool
    has_head: bool
    weight_bytes: int  # parameters in the run's dtype, of each lane
    cost_share: float  # predicted share of a round's compute; 1 / num_stages is perfect balance
    offload: StageOffload | None = None  # of each lane; None: all weights stay on the device
    kv_in_host: KvInHost | None = None  # None: the cache of all layers is on the device
    lane_ranks: tuple[int, ...] = ()  # by lane; empty: `rank` alone

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that share the stage, by lane."""
        return self.lane_ranks or (self.rank,)

    @property
    def num_kv_device_layers(self) -> int:
        """Layers whose cache is on the device."""
        return self.num_layers - (len(self.kv_in_host.layers) if self.kv_in_host else 0)

    @property
    def num_layers(self) -> int:
        """Transformer layers of this stage."""
        return self.last_layer - self.first_layer

    @property
    def device_weight_bytes(self) -> int:
        """What its weights take on the device, staging buffers included."""
        return self.weight_bytes if self.offload is None else self.offload.device_bytes


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Everything the ranks of one pipeline must agree on. Equal plans have equal hashes."""

    model_path: str  # absolute
    model_type: str
    architecture: str
    dtype: DtypeName
    num_layers: int
    hidden_size: int
    stages: tuple[StagePlan, ...]
    num_slots: int
    max_sequences_per_slot: int
    max_tokens_per_step: int
    page_size_tokens: int
    num_kv_pages: int
    max_context_tokens: int
    kv_cache: CacheKind
    transport: TransportName
    device: DeviceName
    attention: AttentionName
    threads_per_rank: int
    resolved: tuple[Resolved, ...]
    lookahead: int = 0  # 0: the head awaits every token
    prefill: PrefillMode = "mixed"
    cuda_graphs: bool = False
    weights: WeightsSource = "checkpoint"
    quantize: QuantizeName = "none"
    offload_dir: str = ""  # absolute; empty: no stage has layers on disk
    max_sequence_tokens: int = 0  # no sequence of the run grows longer; width of the page tables
    restart_tokens: int = 0  # with so many tokens a sequence is computed anew, once; 0: never
    num_host_pages: int = 0  # in the host memory of each rank, for those of preempted sequences
    min_saved_tokens: int = 1  # in the cache of a sequence from which its pages are moved there
    max_sharing_tokens: int = 0  # of a sequence that shares pages, when it begins; 0: none does
    read_prefixes_once: bool = False  # decode steps on GPUs read pages that rows share once
    moved_page_s: float = 0.0  # that steps wait while one of these is moved there and back
    sampling: SamplingUse = field(default_factory=SamplingUse)  # what the stages make ready
    drafts: DraftPlan | None = None  # None: every token has a step of its own
    replica: int = 0  # which of the job's pipelines
    num_replicas: int = 1

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.stages)

    def rank_of(self, stage: int, lane: int) -> int:
        """The rank that is `lane` of a stage, which may be counted from the last: -1."""
        return self.stages[stage].ranks[lane]

    @property
    def tensor_parallel(self) -> int:
        """Lanes of each stage."""
        return len(self.stages[0].ranks)

    @property
    def head_rank(self) -> int:
        """The rank that decides: stage 0's."""
        return self.stages[0].rank

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the pipeline, in the order of its stages and their lanes."""
        return tuple(rank for stage in self.stages for rank in stage.ranks)

    @property
    def max_decode_rows(self) -> int:
        """Rows of a decode step at most: of sequences, or of sequences with drafts."""
        most_drafted = 0 if self.drafts is None else self.drafts.rows[-1]
        return max(self.max_sequences_per_slot, most_drafted)

    @property
    def capacity(self) -> int:
        """Sequences that have a place at once, if their pages fit."""
        return self.num_slots * self.max_sequences_per_slot

    @property
    def shared_page_size(self) -> int:
        """Tokens of the pages that prompts share; 0: they share none."""
        return self.page_size_tokens if self.max_sharing_tokens else 0

    def stage_of_rank(self, rank: int) -> StagePlan:
        """The stage that `rank` runs.

        Raises:
            PlanError: the rank runs no stage.
        """
        for stage in self.stages:
            if rank in stage.ranks:
                return stage
        raise PlanError(f"rank {rank} has no stage: the plan has {self.num_stages} stages")

    def lane_of_rank(self, rank: int) -> int:
        """Its place among the ranks of its stage. Raises as `stage_of_rank`."""
        return self.stage_of_rank(rank).ranks.index(rank)

    def to_json(self) -> str:
        """Stable JSON: sorted keys, no spaces that depend on the platform."""
        return to_json(self, indent=2)

    @staticmethod
    def from_json(text: str) -> PipelinePlan:
        """The inverse of `to_json`.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            return from_json(PipelinePlan, text)
        except ValueError as error:
            raise PlanError(f"this is not a pipeline plan: {error}") from error

    def content_hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
