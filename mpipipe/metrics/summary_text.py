"""The closing text of a run: a `RunSummary` as a few plain lines and an aligned table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpipipe.metrics.accounting import TimeParts
    from mpipipe.metrics.offload import OffloadUse
    from mpipipe.metrics.predicted import Compared, Prediction
    from mpipipe.metrics.replicas import ReplicaTotals
    from mpipipe.metrics.summary import RankReport, RunSummary

__all__ = ["summary_lines"]

_TIME_HEADER = (
    "stage", "rank", "host", "compute", "wait", "transfer", "send", "idle", "overhead",
    "bubble", "steady",
)  # fmt: skip
_REPLICA_HEADER = (
    "replica", "prompts", "output tokens", "tokens/s", "idle", "while work was left", "at the end",
)  # fmt: skip
_MEMORY_HEADER = ("stage", "rank", "load", "read", "weights", "KV cache", "before", "peak")
_OFFLOAD_HEADER = (
    "stage", "rank", "streamed a step", "host link", "of planned", "disk", "of planned",
    "gate wait",
)  # fmt: skip
_KV_HOST_HEADER = ("stage", "rank", "KV in host memory", "pages moved there", "back", "rate")
_LEFT_ALIGNED = ("host",)
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def summary_lines(summary: RunSummary) -> list[str]:
    """Lines for a terminal of 100 columns (long host names aside)."""
    ranks = _named(summary.ranks)
    return [
        *_headlines(summary),
        *_replica_table(summary.replicas),
        "",
        *_table(_TIME_HEADER, [_time_row(name, rank) for name, rank in ranks]),
        "",
        *_table(_MEMORY_HEADER, [_memory_row(name, rank) for name, rank in ranks]),
        *_offload_table(ranks),
        *_kv_host_table(ranks),
    ]


def _named(ranks: Sequence[RankReport]) -> list[tuple[str, RankReport]]:
    """Each with its stage; of several replicas as `replica.stage`."""
    several = any(rank.replica for rank in ranks)
    return [
        (f"{rank.replica}.{rank.stage.stage}" if several else str(rank.stage.stage), rank)
        for rank in ranks
    ]


def _replica_table(replicas: Sequence[ReplicaTotals]) -> list[str]:
    """What each replica did; nothing where there is one."""
    if not replicas:
        return []
    return ["", *_table(_REPLICA_HEADER, [_replica_row(replica) for replica in replicas])]


def _replica_row(replica: ReplicaTotals) -> tuple[str, ...]:
    return (
        str(replica.replica),
        f"{replica.num_completed + replica.num_failed:,}",
        f"{replica.num_output_tokens:,}",
        f"{replica.output_tokens_per_s:,.1f}",
        _share(replica.idle_ratio),
        _seconds(replica.starved_s),
        _seconds(replica.tail_s),
    )


def _headlines(summary: RunSummary) -> list[str]:
    requests, phases = summary.requests, summary.phases
    facts = {
        "prompts": _prompts(summary),
        "wall clock": (
            _seconds(phases.wall_s),
            f"boot {_seconds(phases.boot_s)}",
            f"load {_seconds(phases.load_s)}",
            f"generate {_seconds(phases.generate_s)}",
            f"shutdown {_seconds(phases.shutdown_s)}",
        ),
        **({"start": started} if (started := _start(summary)) else {}),
        **({"slowest boot": (slowest,)} if (slowest := _slowest_boot(summary)) else {}),
        "throughput": (
            f"{summary.output_tokens_per_s:,.1f} output tokens/s{_of_completed(summary)}",
            f"{summary.total_tokens_per_s:,.1f} tokens/s with prompts",
            _preemptions(summary),
        ),
        **_drafts(summary),
        "first token": (
            f"{_seconds(requests.ttft_p50_s)} p50",
            f"{_seconds(requests.ttft_p95_s)} p95",
        ),
        "completion": (
            f"{_seconds(requests.latency_p50_s)} p50",
            f"{_seconds(requests.latency_p95_s)} p95",
        ),
        "bubble": (
            f"{_share(summary.bubble_ratio)} of all stages' time",
            f"{_share(summary.steady_bubble_ratio)} in steady state",
        ),
        **_compared(summary),
    }
    return [f"{label:<14}{' · '.join(values)}" for label, values in facts.items()]


def _prompts(summary: RunSummary) -> tuple[str, ...]:
    requests = summary.requests
    return (
        f"{requests.num_completed:,} completed, {requests.num_failed:,} failed",
        *([f"{requests.num_unfinished:,} unfinished"] if requests.num_unfinished else []),
        *([f"{requests.num_kept:,} of earlier attempts"] if requests.num_kept else []),
        *([f"{requests.num_damaged:,} lines were damaged"] if requests.num_damaged else []),
        _prompt_tokens(summary),
        f"{requests.num_output_tokens:,} output tokens{_of_completed(summary)}",
    )


def _of_completed(summary: RunSummary) -> str:
    """What unfinished prompts have made so far is made again later, and in no figure."""
    return " of completed prompts" if summary.requests.num_unfinished else ""


def _compared(summary: RunSummary) -> dict[str, tuple[str, ...]]:
    """What was predicted, beside it what was measured, and by how much it is more or less."""
    compared = {each.name: each for each in summary.compared}
    if summary.predicted is None:
        return {}
    memory = _worst(summary.compared, "memory_bytes_")
    lines = {
        "predicted": (
            _beside("", compared.get("tokens_per_s"), _tokens_per_s),
            _beside("wall clock ", compared.get("wall_s"), _seconds),
        ),
        "": (
            _beside("start ", compared.get("start_s"), _seconds),
            _beside("memory ", memory, lambda value: _size(round(value))),
            _not_made(summary.predicted, summary.planned),
        ),
    }
    return {label: tuple(filter(None, values)) for label, values in lines.items() if any(values)}


def _beside(label: str, each: Compared | None, form: Callable[[float], str]) -> str:
    if each is None:
        return ""
    return f"{label}{form(each.predicted)}, measured {form(each.measured)} ({each.error:+.0%})"


def _not_made(predicted: Prediction, planned: Prediction | None) -> str:
    """Outputs may end early; what is predicted here is for the tokens that were made."""
    fewer = 0 if planned is None else planned.num_output_tokens - predicted.num_output_tokens
    return f"{fewer:,} fewer tokens than allowed" if fewer > 0 else ""


def _worst(compared: Sequence[Compared], prefix: str) -> Compared | None:
    """The stage's figure that is farthest from its prediction."""
    named = [each for each in compared if each.name.startswith(prefix)]
    return max(named, key=lambda each: abs(each.error), default=None)


def _tokens_per_s(value: float) -> str:
    return f"{value:,.1f} tokens/s"


_START_SHARE = 0.03  # of the start; smaller parts are told together


def _start(summary: RunSummary) -> tuple[str, ...]:
    """What the seconds until the first token went to, on the head."""
    parts = summary.start_parts
    whole_s = sum(parts.values())
    told = {name: s for name, s in parts.items() if s >= _START_SHARE * whole_s}
    rest_s = whole_s - sum(told.values())
    seconds = [f"{name} {_seconds(s)}" for name, s in told.items()]
    if not seconds:
        return ()
    return (f"first token after {_seconds(whole_s)}", *seconds, f"rest {_seconds(rest_s)}")


def _slowest_boot(summary: RunSummary) -> str:
    """Which rank had most to do until it was ready, waiting left out, and what took it longest."""
    rank = summary.slowest_boot
    if rank is None:
        return ""
    seconds_of: dict[str, float] = {}
    for part in rank.boot:
        if part.name != "wait":
            seconds_of[part.name] = seconds_of.get(part.name, 0.0) + part.seconds
    name = max(seconds_of, key=lambda name: seconds_of[name])
    read = sum(part.num_bytes for part in rank.boot if part.name == name)
    what = f"{name}, {_size(read)}" if read else name
    took = f"rank {rank.rank} on {rank.host} took {_seconds(rank.boot_own_s)}"
    return f"{took}, {_seconds(seconds_of[name])} of it: {what}"


def _time_row(name: str, rank: RankReport) -> tuple[str, ...]:
    parts, steady = rank.stage.overall, rank.stage.steady
    return (
        name,
        str(rank.rank),
        rank.host,
        *(
            _part(parts, seconds)
            for seconds in (
                parts.compute_s, parts.wait_s, parts.transfer_s, parts.send_s, parts.idle_s,
                parts.overhead_s,
            )
        ),
        _share(parts.bubble_ratio if parts.wall_s > 0 else None),
        _share(steady.bubble_ratio if steady.wall_s > 0 else None),
    )  # fmt: skip


def _memory_row(name: str, rank: RankReport) -> tuple[str, ...]:
    sizes = (
        rank.loaded_bytes, rank.weight_bytes, rank.kv_bytes, rank.baseline_rss_bytes,
        rank.peak_rss_bytes,
    )  # fmt: skip
    return (name, str(rank.rank), _seconds(rank.load_s), *(_size(size) for size in sizes))


def _offload_table(ranks: Sequence[tuple[str, RankReport]]) -> list[str]:
    """How the offloaded weights came; nothing where all stood on the devices."""
    rows = [
        _offload_row(name, rank, rank.offload) for name, rank in ranks if rank.offload is not None
    ]
    return ["", *_table(_OFFLOAD_HEADER, rows)] if rows else []


def _offload_row(name: str, rank: RankReport, use: OffloadUse) -> tuple[str, ...]:
    wall_s = rank.stage.overall.wall_s
    return (
        name,
        str(rank.rank),
        _size(use.bytes_per_step),
        *_rate(use.host_bytes_per_s, use.planned_host_bytes_per_s),
        *_rate(use.disk_bytes_per_s, use.planned_disk_bytes_per_s),
        f"{_seconds(use.wait_s)} {_share(use.wait_s / wall_s if wall_s > 0 else None):>4}",
    )


def _prompt_tokens(summary: RunSummary) -> str:
    """With those that were not computed."""
    told = f"{summary.requests.num_prompt_tokens:,} prompt tokens"
    shared = summary.num_shared_tokens
    if not shared:
        return told
    if summary.requests.num_unfinished:
        return f"{told}, {shared:,} in shared prefixes (unfinished prompts included)"
    return f"{told}, {shared:,} of them in shared prefixes"


def _preemptions(summary: RunSummary) -> str:
    told = f"{summary.num_preemptions:,} preemptions"
    return f"{told}, {summary.num_saved:,} by moving pages" if summary.num_saved else told


def _drafts(summary: RunSummary) -> dict[str, tuple[str, ...]]:
    told = summary.spared.words().get("drafts")
    return {} if told is None else {"drafts": (*told, "not in the prediction")}


def _kv_host_table(ranks: Sequence[tuple[str, RankReport]]) -> list[str]:
    """KV pages in host memory, and what moved there and back; nothing where there are none."""
    rows = [_kv_host_row(name, rank) for name, rank in ranks if rank.kv_host_bytes]
    return ["", *_table(_KV_HOST_HEADER, rows)] if rows else []


def _kv_host_row(name: str, rank: RankReport) -> tuple[str, ...]:
    use, own = rank.page_moves, (name, str(rank.rank), _size(rank.kv_host_bytes))
    if use is None:  # the cache of some layers
        return *own, "-", "-", "-"
    moved = (_size(use.saved_bytes), _size(use.restored_bytes))
    return *own, *moved, _rate(use.bytes_per_s, None)[0]


def _rate(measured: float | None, planned: float | None) -> tuple[str, str]:
    """Bytes per second, and their share of what the plan reckoned with."""
    if measured is None:
        return "-", "-"
    return f"{measured / 1e9:.2f} GB/s", _share(measured / planned if planned else None)


def _part(parts: TimeParts, seconds: float) -> str:
    share = seconds / parts.wall_s if parts.wall_s > 0 else None
    return f"{_seconds(seconds)} {_share(share):>4}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:,.1f} s"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in _BINARY_UNITS:
        if size < 1024 or unit == _BINARY_UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
