"""The files of a run, schema 1: every field with its type, unit and meaning.

`FILES.md` tells the same to people; a test checks that it names each field. `check_line` and
`check_document` hold what a real run has written against the table. Within a schema, fields are
added, never renamed and never given another meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "DOCUMENTS",
    "LINE_FILES",
    "SCHEMA",
    "Field",
    "FileSchema",
    "check_document",
    "check_line",
    "schema_of",
]

SCHEMA = 1

_TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "list": (list,),
    "object": (dict,),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a line or document."""

    name: str
    kind: str  # a key of `_TYPES`
    meaning: str
    nullable: bool = False
    optional: bool = False  # may be absent


@dataclass(frozen=True, slots=True)
class FileSchema:
    """One kind of file."""

    title: str  # as FILES.md names it
    pattern: re.Pattern[str]
    fields: tuple[Field, ...]
    open: bool = False  # has other fields too, which depend on the event


def _field(name: str, kind: str, meaning: str) -> Field:
    """`kind` may end with `|null` and `?` (may be absent)."""
    optional = kind.endswith("?")
    kind = kind.removesuffix("?")
    return Field(name, kind.removesuffix("|null"), meaning, kind.endswith("|null"), optional)


IDENTITY = (
    _field("run", "str", "12 hex digits, made at the first attempt and kept over attempts"),
    _field("attempt", "int", "1 for the first start of the run, 2 for the next"),
    _field("job", "str|null", "the Slurm job: id or array_task; null outside of Slurm"),
    _field("replica", "int", "its pipeline, from 0"),
    _field("rank", "int", "the MPI rank that wrote the line"),
    _field("stage", "int|null", "its stage"),
    _field("t_s", "float", "seconds on this rank's own monotonic clock"),
)

_RANK_LOG = (
    _field("time", "str", "UTC, ISO 8601"),
    _field("level", "str", "debug, info, warning or error"),
    _field("event", "str", "what happened, a few fixed words"),
    _field("host", "str", "node of the rank"),
    _field("name", "str?", "of a boot event: its name"),
    _field("start_s", "float?", "of a boot event: when it began, on this rank's clock"),
    _field("end_s", "float?", "of a boot event: when it ended"),
    _field("bytes", "int|null?", "of a boot event: what it read"),
    _field("seconds", "float?", "of a pause: how long the rank stood still"),
    _field("cpu_s", "float?", "of a pause: CPU time that it used meanwhile"),
)

_STEPS = (
    _field("step", "int", "number of the step, the same on all stages"),
    _field("slot", "int", "place in the ring of micro-batches"),
    _field("phase", "str", "prefill, decode, mixed, or verify: drafted tokens"),
    _field("num_rows", "int", "sequences that get a token"),
    _field("num_tokens", "int", "rows computed"),
    _field("start_s", "float", "the stage was free: the step before had left it"),
    _field("idle_s", "float", "nothing was scheduled"),
    _field("wait_s", "float", "scheduled; the stage before still computes its input"),
    _field("transfer_s", "float|null", "the stage before is done; its tensor is not here"),
    _field("compute_s", "float", "the step itself"),
    _field("overhead_s", "float", "event loop and thread hand-over around the compute"),
    _field("send_s", "float", "held up by sending"),
    _field("bytes_in", "int", "received for this step"),
    _field("bytes_out", "int", "sent on"),
)

_SAMPLES = (
    _field("num_output_tokens", "int|null", "made so far (heads; rank 0: of all replicas)"),
    _field("num_running", "int|null", "sequences in slots (heads; rank 0: of all replicas)"),
    _field("num_waiting", "int|null", "requests without a place (heads; rank 0: of all replicas)"),
    _field("kv_pages_used", "int|null", "pages of its replica's cache in use (heads)"),
    _field("num_kv_pages", "int|null", "pages there are (heads)"),
    _field("num_steps", "int", "steps that left this stage so far"),
    _field("cpu_percent", "float|null", "of one core, since the last sample"),
    _field("node_cpu_percent", "float|null", "of all cores of the node"),
    _field("rss_bytes", "int|null", "memory of the process"),
    _field("io_read_bytes", "int|null", "read by the process from storage, cumulative"),
    _field("io_write_bytes", "int|null", "written by the process to storage, cumulative"),
    _field("net_rx_bytes", "int|null", "received by the node, cumulative"),
    _field("net_tx_bytes", "int|null", "sent by the node, cumulative"),
    _field("num_involuntary_switches", "int|null?", "the process was put aside, cumulative"),
    _field("run_delay_s", "float|null?", "the compute thread waited for its core, cumulative"),
    _field("gpu", "object|null", "null without a GPU or without nvidia-ml-py"),
)

_REQUESTS = (
    _field("id", "str", "of the prompt"),
    _field("index", "int", "line of the prompt file, from 0"),
    _field("on_replica", "int?", "the pipeline that ran it"),
    _field("slot", "int|null", "where it ran there; null: it never ran"),
    _field("arrived_s", "float|null", "it was submitted; null: it was refused"),
    _field("admitted_s", "float|null", "its first step"),
    _field("first_token_s", "float|null", "its first token was here"),
    _field("finished_s", "float", "its last token was here"),
    _field("queue_s", "float|null", "arrived to admitted"),
    _field("ttft_s", "float|null", "arrived to first token"),
    _field("latency_s", "float|null", "arrived to finished"),
    _field("num_prompt_tokens", "int", "tokens of the prompt"),
    _field("num_output_tokens", "int", "tokens made"),
    _field("num_preemptions", "int", "how often its pages were taken away"),
    _field("itl_p50_s", "float|null", "median time between two of its tokens"),
    _field("itl_p95_s", "float|null", "95th percentile of that"),
    _field("finish_reason", "str|null", "as in completions.jsonl"),
    _field("error_kind", "str|null", "null: completed"),
    _field("token_s", "list?", "when each token was here; with log.token_times = true"),
)

_MESSAGES = (
    _field("way", "str", "sent or received"),
    _field("kind", "str", "the class of the message"),
    _field("peer", "int", "the other rank"),
    _field("number", "int", "of the messages on this way between the two, the same on both"),
    _field("bytes", "int", "as it was encoded"),
)

_CLOCK = (
    _field("of_rank", "int", "the rank that was measured"),
    _field("offset_s", "float", "add to that rank's t_s for rank 0's clock"),
    _field("error_s", "float", "the offset is true within so much"),
)

LINE_FILES = (
    FileSchema("rank_<r>.log", re.compile(r"rank_\d+\.log"), IDENTITY + _RANK_LOG, open=True),
    FileSchema(
        "steps_rank_<r>.jsonl",
        re.compile(r"steps_rank_\d+(\.1|\.all\d*)?\.jsonl"),
        IDENTITY + _STEPS,
    ),
    FileSchema(
        "samples_rank_<r>.jsonl", re.compile(r"samples_rank_\d+\.jsonl"), IDENTITY + _SAMPLES
    ),
    FileSchema("requests.jsonl", re.compile(r"requests\.jsonl"), IDENTITY + _REQUESTS),
    FileSchema(
        "messages_rank_<r>.jsonl",
        re.compile(r"messages_rank_\d+(\.1)?\.jsonl"),
        IDENTITY + _MESSAGES,
    ),
    FileSchema("clock.jsonl", re.compile(r"clock\.jsonl"), IDENTITY + _CLOCK),
)

DOCUMENTS = (
    FileSchema(
        "manifest.json",
        re.compile(r"manifest\.json"),
        (
            _field("schema", "int", "1"),
            _field("run", "str", "as on each line"),
            _field("mpipipe", "str", "version"),
            _field("started", "str", "this attempt, UTC"),
            _field("argv", "list", "the command, word by word"),
            _field("git", "object|null", "commit and dirty of the code, where it is a checkout"),
            _field("attempts", "list", "one entry per start of the run"),
            _field("config", "object", "the resolved configuration, which can be run again"),
            _field("plan", "object|null?", "layers, memory and every `auto`, with reasons"),
            _field("replicas", "list?", "of each its ranks, split, pages, hash of its plan"),
            _field("hashes", "object", "of configuration, plan and prompts"),
            _field("nodes", "list", "CPU, memory, kernel, GPUs and container of each host"),
            _field("hosts", "list", "one entry per rank"),
            _field("launch", "object", "num_nodes, num_ranks, launcher, mpi"),
            _field("environment", "object", "variables of Slurm, MPI, UCX, NCCL, OpenMP, CUDA"),
            _field("doctor", "list|null", "findings of the cheap checks"),
            _field("versions", "object", "Python, MPI and packages"),
        ),
        open=True,
    ),
    FileSchema(
        "metrics.json",
        re.compile(r"metrics\.json"),
        (
            _field("schema", "int", "1"),
            _field("run", "str", "as on each line"),
            _field("attempt", "int", "whose figures these are"),
            _field("state", "str", "done or stopped"),
            _field(
                "phases", "object", "boot_s, load_s, generate_s, shutdown_s, wall_s of the head"
            ),
            _field("requests", "object", "counts and percentiles"),
            _field("num_preemptions", "int?", "how often pages were taken away"),
            _field("num_saved", "int?", "of these, those whose pages went to host memory"),
            _field("num_shared_tokens", "int?", "of prompts, not computed: others begin alike"),
            _field("drafts", "object?", "num_drafted, num_accepted, num_saved_steps"),
            _field("output_tokens_per_s", "float", "over the generate phase"),
            _field("total_tokens_per_s", "float", "with the prompts' tokens"),
            _field("bubble_ratio", "float|null", "share of all stages' time without compute"),
            _field("steady_bubble_ratio", "float|null?", "the same while all slots decode"),
            _field("replicas", "list?", "of several, each one's counts, tokens/s and idle times"),
            _field("ranks", "list", "per stage: boot, load_s, bytes, memory, parts of the time"),
            _field("time", "object", "preprocessing_s, io_read_s, io_write_s, communication_s"),
            _field("itl_p50_s", "float|null", "median time between two tokens of a request"),
            _field("itl_p95_s", "float|null", "95th percentile of that"),
            _field("energy_j", "float|null", "of all GPUs while generating"),
            _field("attempts", "list", "what each start of the run did"),
            _field("total", "object", "sums over the attempts"),
            _field("bytes_moved", "int?", "of tensors, from rank to rank"),
            _field("planned", "object|null?", "predicted before the run, for the longest outputs"),
            _field("predicted", "object|null?", "predicted for the tokens that were made"),
            _field("compared", "object?", "predicted and measured values, with the error"),
            _field("slurm", "list|null?", "what Slurm counted of earlier attempts"),
        ),
        open=True,
    ),
)


def schema_of(file_name: str) -> FileSchema | None:
    """The schema of a file of a run folder; None: it has none here."""
    return next(
        (kind for kind in (*LINE_FILES, *DOCUMENTS) if kind.pattern.fullmatch(file_name)), None
    )


def check_line(file_name: str, line: object) -> list[str]:
    """What is wrong with `line` of `file_name`, a sentence each; empty: nothing.

    Raises:
        ValueError: no schema is known for a file of that name.
    """
    kind = schema_of(file_name)
    if kind is None:
        raise ValueError(f"{file_name} is no file of a run with a schema")
    if not isinstance(line, dict):
        return [f"{file_name}: not an object"]
    faults = [fault for field in kind.fields if (fault := _fault(field, line)) is not None]
    if not kind.open:
        known = {field.name for field in kind.fields}
        faults += [f"{name} is not in the schema" for name in line if name not in known]
    return [f"{file_name}: {fault}" for fault in faults]


check_document = check_line


def _fault(field: Field, line: Mapping[str, object]) -> str | None:
    if field.name not in line:
        return None if field.optional else f"{field.name} is missing"
    value = line[field.name]
    if value is None:
        return None if field.nullable else f"{field.name} is null"
    is_flag = isinstance(value, bool) and field.kind != "bool"
    if is_flag or not isinstance(value, _TYPES[field.kind]):
        return f"{field.name} is {value!r}, not {field.kind}"
    return None
