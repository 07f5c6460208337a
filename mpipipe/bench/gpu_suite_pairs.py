"""Tables of parts of `gpu_parts` that are held against each other, as Markdown.

With and without: shared prefixes, drafts. One beside the other: lengths that differ and the same
tokens at fixed lengths, weights from a disk and the disk, forecasts and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpipipe.bench.figures import number, share
from mpipipe.bench.gpu_suite import Result
from mpipipe.bench.prediction_table import error_lines, prediction_header, prediction_row
from mpipipe.bench.workloads import BenchWork

__all__ = ["lines_of_tests", "pair_lines"]

Record = Mapping[str, Any]
# With a common prefix, and where nothing is shared; text that repeats, and text that does not.
_PREFIX_TARGETS = (4.0, 0.99)
_DRAFT_TARGETS = (1.5, 0.97)
_TAIL_TARGET = 0.97
_DISK_TARGET = 0.9


def pair_lines(records: Sequence[Record]) -> list[str]:
    """All of these tables for which there are records."""
    lines: list[str] = []
    for found in (_prefix_lines, _draft_lines, _tail_lines, _disk_lines, _prediction_lines):
        own = found(records)
        lines += [*own, ""] if own else []
    return lines


def _pairs(records: Sequence[Record], first: str, second: str) -> Iterator[tuple[Record, Record]]:
    """Records of the parts `first`… and `second`… of one model and work."""
    beside = {
        (record["part"].removeprefix(second), record["work"]): record
        for record in records
        if record["part"].startswith(second)
    }
    for record in records:
        if record["part"].startswith(first):
            other = beside.get((record["part"].removeprefix(first), record["work"]))
            if other is not None:
                yield record, other


def _rows(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    header = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    return [*header, *(f"| {' | '.join(row)} |" for row in rows)]


def _ratio(first: Record, second: Record, target: float) -> list[str]:
    """Both speeds, their ratio (bold where the target is reached), and the target."""
    ratio = first["tokens_per_s"] / second["tokens_per_s"]
    shown = f"**{ratio:.3f}**" if ratio >= target else f"{ratio:.3f}"
    speeds = (number(record["tokens_per_s"]) for record in (first, second))
    return [*speeds, shown, f"{target:g}"]


def _prefix_lines(records: Sequence[Record]) -> list[str]:
    rows = []
    each = _pairs(records, "prefix_each_", "apart_")
    for shared, apart in (*_pairs(records, "prefix_", "apart_"), *each):
        target = _PREFIX_TARGETS[0 if BenchWork.parse(shared["work"]).common_tokens else 1]
        of_all = f"{shared['num_shared_tokens']:,} of {shared['num_prompt_tokens']:,}"
        name = shared["part"].removeprefix("prefix_").replace("each_", "read by each row, ")
        rows.append([name, shared["work"], *_ratio(shared, apart, target), of_all])
    names = (
        "prefixes of",
        "work",
        "shared",
        "not shared",
        "ratio",
        "target",
        "tokens not computed",
    )
    return _rows(names, rows)


def _draft_lines(records: Sequence[Record]) -> list[str]:
    rows = []
    for drafts, without in _pairs(records, "drafts_", "undrafted_"):
        target = _DRAFT_TARGETS[0 if drafts["shape"] == "copying" else 1]
        use = drafts["drafts"]
        told = f"{use['num_accepted']:,} of {use['num_drafted']:,}"
        rows.append([drafts["shape"], drafts["work"], *_ratio(drafts, without, target), told])
    return _rows(("drafts of", "work", "on", "off", "ratio", "target", "accepted"), rows)


def _tail_lines(records: Sequence[Record]) -> list[str]:
    own = {
        (record["part"], record["work"]): record
        for record in records
        if record["part"].startswith("tail_")
    }
    rows = []
    for (part, work), record in own.items():
        even = own.get((part, f"{work}xeven"))
        if even is not None:
            rows.append([record["shape"], work, *_ratio(record, even, _TAIL_TARGET)])
    names = ("tail of", "work", "tokens/s", "same tokens at fixed lengths", "ratio", "target")
    return _rows(names, rows)


def _disk_lines(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        disk = record.get("disk")
        if disk is not None:
            plain = " · ".join(f"{rate / 1e9:.2f}" for rate in disk["plain"].values())
            reached = disk["of_plain"] >= _DISK_TARGET
            of_plain = f"**{disk['of_plain']:.1%}**" if reached else f"{disk['of_plain']:.1%}"
            cells = [number(disk["bytes_per_step"] / 2**30, 2), f"{disk['rate'] / 1e9:.2f}", plain]
            cells += [of_plain, share(_DISK_TARGET), share(disk["from_disk"])]
            cells.append(number(disk["passes_before"], 1))
            rows.append(
                [record["shape"], record["work"], number(record["tokens_per_s"], 1), *cells]
            )
    names = (
        "from a disk", "work", "tokens/s", "GiB a step", "GB/s", "plain reads, 1 · 8 threads",
        "of it", "target", "read from the disk", "passes before",
    )  # fmt: skip
    return _rows(names, rows)


def _prediction_lines(records: Sequence[Record]) -> list[str]:
    own = [record for record in records if "by_rates" in record]
    if not own:
        return []
    return [*prediction_header(), *map(prediction_row, own), "", *error_lines(own)]


def lines_of_tests(results: Sequence[Result]) -> list[str]:
    """Of each part with tests what pytest counted, and the names of those that failed."""
    lines = []
    for result in results:
        if result.part.has_tests:
            counts = "; ".join(result.test_counts) or "no part of them came to its end"
            lines.append(f"{result.part.name}, {result.seconds:.0f} s, {counts}")
            lines += [f"  {result.problem}"] if result.problem else []
            lines += [f"  failed: {name}" for name in result.failed_tests]
    return lines
