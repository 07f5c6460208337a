"""The frozen configuration tree: what a user may ask for, with a default and a unit per field.

`"auto"` values are resolved once at boot (`planning.resolve`), with a reason, before any rank
starts work. The docstring under each field is its documentation; a
Literal type lists the words that the setting takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from mpipipe.sampling_options import SamplingOptions
from mpipipe.types import (
    AttentionName,
    CacheKind,
    DeviceName,
    DtypeName,
    PrefillMode,
    ProfilerName,
    QuantizeName,
    WeightsSource,
)

__all__ = [
    "AUTO",
    "Auto",
    "Config",
    "GenerationConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OutputConfig",
    "PipelineConfig",
    "ProfileConfig",
    "PromptsConfig",
]

Auto = Literal["auto"]
AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What to run."""

    path: str = ""
    """Folder with `config.json`, weights and tokenizer; or `demo:smollm2` for the demo model."""
    tokenizer_path: str = ""
    """Folder of the tokenizer; empty: `model.path`."""
    dtype: Auto | DtypeName = AUTO
    """`float32`, `bfloat16`, `float16` or `auto` (the checkpoint's; float32 on a CPU)."""
    weights: WeightsSource = "checkpoint"
    """`checkpoint`, or `random`: weights of the shapes in `config.json`, for benchmarks."""
    quantize: QuantizeName = "none"
    """`int8`: weights of the layers in 8 bits with a scale per output channel; `fp8`: weights and
    activations in 8-bit floats (Hopper and later); `none`: as in the checkpoint."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""


@dataclass(frozen=True, slots=True)
class PromptsConfig:
    """Where the prompts are."""

    path: str = ""
    """JSONL file, also `.gz` or `.zst`; `-`: standard input, of rank 0. On the command line also
    the word after the model. See prompts/README.md for the accepted lines."""
    limit: int = 0
    """Take only the first prompts; 0: all. They keep the ids that they have in the whole file."""
    add_special_tokens: bool = True
    """Let the tokenizer add its beginning-of-sequence token to plain prompts."""


@dataclass(frozen=True, slots=True)
class GenerationConfig(SamplingOptions):
    """Default sampling settings; a prompt line may override each of them.

    They are documented in `sampling_options.SamplingOptions`.
    """

    use_model_defaults: bool = True
    """Settings that are given neither here nor by the prompt come from the model's
    `generation_config.json`, as in transformers: `repetition_penalty`, and, if it says `do_sample`,
    `temperature`, `top_k`, `top_p`, `min_p`. The plan lists them."""


@dataclass(frozen=True, slots=True)
class PipelineConfig:
    """How the layers are spread and how steps are formed."""

    replicas: int | str = 1
    """Whole pipelines, side by side, that share the prompts; `auto`: as many as the ranks hold
    where the model fits fewer ranks. 1, the default, uses all ranks for one pipeline, which always
    fits where any number does, and holds the longest prompts."""
    num_stages: int | str = AUTO
    """Stages of each pipeline; `auto`: one per rank, or per `tensor_parallel` ranks, the ranks
    shared out among the replicas."""
    tensor_parallel: int = 1
    """Ranks of one host that share each stage: every matrix is split over them, and NCCL or MPI
    adds up; must divide the model's heads. 1: every rank is a stage."""
    split: tuple[int, ...] | str = AUTO
    """Layers per stage, e.g. `[14, 16]`; `auto`: balanced by cost."""
    num_slots: int | str = AUTO
    """Micro-batches in flight; `auto`: one per stage. 1 switches overlap off."""
    max_sequences_per_slot: int | str = AUTO
    """Sequences of a micro-batch at most; `auto`: 32 on a CPU."""
    max_tokens_per_step: int | str = AUTO
    """Token budget of a step: decodes first, then chunks of prompts; `auto`: 512 on a CPU."""
    transport: Literal["auto", "nccl", "mpi"] = AUTO
    """How tensors travel: `nccl`, `mpi` (from a GPU through pinned memory), or `auto`."""
    device: Auto | DeviceName = AUTO
    """`cpu`, `cuda`, or `auto`: a GPU where every rank has one."""
    share_gpus: bool = False
    """Let several ranks use one GPU (tests); tensors then travel over MPI."""
    attention: Auto | AttentionName = AUTO
    """Attention backend: `triton`, `flashinfer`, `varlen` (torch >= 2.13), `sdpa`, `reference`, or
    `auto`."""
    lookahead: int | str = AUTO
    """Rounds that the head schedules before it has seen the tokens: 0 (CPUs only), 1, 2 or 3;
    `auto`: 1 on GPUs, 0 on CPUs."""
    num_speculative_tokens: int | str = AUTO
    """Tokens drafted at most for a sequence in one step, by looking its last ids up in its own text
    (prompt lookup, n-gram speculative decoding). Only in slots of at most 8 sequences, all greedy
    without penalties and log-probabilities, and while it is predicted to pay; completions stay the
    same. `auto`: 7 where the plan predicts that drafts can gain; 0: none."""
    prefill: Auto | PrefillMode = AUTO
    """`phases`: prompts first, then decode until places are free again; `mixed`: one step of prompt
    chunks per round, or, without lookahead, chunks in every decode step that has room; `auto`:
    phases with lookahead, mixed without."""
    threads_per_rank: int | str = AUTO
    """Compute threads of each rank; `auto`: usable cores over the ranks of the host."""
    bind: Literal["auto", "none"] = AUTO
    """CPU cores of a rank: `auto`: near its GPU, unless the launcher has bound it; or `none`."""
    handshake_timeout_s: float = 120.0
    """How long to wait for all ranks in the handshake at start."""
    heartbeat_timeout_s: float = 10.0
    """A rank that gives no sign of life for so many seconds, beyond the longest time so far that a
    step held it up, is lost and ends the run (exit code 6). Three times as long while ranks import
    and load, where a busy file system may hold them up. 0: wait for ever."""


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much may be kept, and where."""

    device_bytes: int | str = AUTO
    """On a GPU all that a rank may take there, on a CPU rank the RAM that its weights may stand in,
    e.g. `"6GiB"`; layers beyond it are offloaded. `auto`: what is free."""
    host_bytes: int | str = AUTO
    """Pinned host memory for the layers of a GPU rank that its GPU does not hold; `auto`: what is
    free; 0: none."""
    offload_dir: str = ""
    """Folder on a local disk for layers that neither memory holds; empty: none may be there."""
    kv_cache_bytes: int | str = AUTO
    """Bytes of KV cache per rank; `auto`: a quarter of the rank's available memory (on a GPU: what
    is left of `gpu_memory_fraction`), and no more than the run can use."""
    kv_host_bytes: int | str = AUTO
    """Host memory of each rank for KV pages, pinned on a GPU rank: the cache of some layers, so
    that more rows run, or the pages of preempted sequences, which are computed anew otherwise;
    `auto`: on GPU ranks for preempted sequences, where the plan predicts a gain; 0: none."""
    num_kv_pages: int | str = AUTO
    """Pages of KV cache, the same on every rank; wins over `kv_cache_bytes`."""
    page_size_tokens: int = 16
    """Tokens per KV page."""
    max_context_tokens: int | str = AUTO
    """Longest prompt + completion; `auto`: what the model was made for."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs; captured at boot. false: the same, but eagerly."""
    gpu_memory_fraction: float = 0.9
    """Share of a GPU's free memory that weights, cache and work space may take together."""
    share_prefixes: bool = True
    """Compute what prompts begin with alike, in whole pages, once. false: each prompt by itself."""
    read_prefixes_once: bool = True
    """On GPUs (`triton` attention): decode steps read pages that several rows share once for all of
    them (cascade attention), as CPUs always do. false: each row reads its own."""
    kv_cache: CacheKind = "paged"
    """`paged`, or `contiguous` (slow and simple: the oracle of the tests)."""


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where results go."""

    dir: str = AUTO
    """The run folder; `auto`: `runs/<name>-<date>-<time>`, with Slurm's job id in a job."""
    overwrite: bool = False
    """Replace the files of an earlier run in `output.dir`."""
    resume: bool | str = AUTO
    """Go on with an earlier run in `output.dir`: its completions stay, only what is missing is
    done. `auto`: in a job that Slurm has requeued."""


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is written while running."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug`, `info`, `warning` or `error`, for `rank_<r>.log`; `debug` also writes the control
    messages to `messages_rank_<r>.jsonl`."""
    progress: Literal["auto", "bar", "plain", "none"] = AUTO
    """`bar`, `plain`, `none`, or `auto`: a bar on a terminal, plain lines otherwise."""
    steps: Literal["recent", "all", "none"] = "recent"
    """Steps in `steps_rank_<r>.jsonl`, about 450 bytes each: the last 4,096 at least, `all`, or
    `none`."""
    sample_interval_s: float = 5.0
    """How often each rank writes CPU, memory, I/O, network, GPU and counts to
    `samples_rank_<r>.jsonl`; 0: never, and `energy_j` stays null."""
    token_times: bool = False
    """Write the time of every token to `requests.jsonl`, and not their percentiles alone."""


@dataclass(frozen=True, slots=True)
class ProfileConfig:
    """A profiler of every rank; its files are in the run folder."""

    tool: ProfilerName = "none"
    """`torch`: torch's own profiler for `profile.steps`, into `torch_rank_<r>.json` for Perfetto;
    `nsys` or `perf`: all of the rank under that program, which launch/run.sh starts, or
    launch/profile_rank.sh by hand, into `nsys_rank_<r>.nsys-rep` or `perf_rank_<r>.txt`; `none`."""
    steps: tuple[int, ...] = (16, 31)
    """First and last step that `torch` records, as numbered in `steps_rank_<r>.jsonl`."""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole request, one section per concern."""

    name: str = "run"
    """Short name of the run; default: the configuration file's stem, or the model folder's name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
