"""The tables of what the parts of `gpu_suite` left, as Markdown: one run of it, or two compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mpipipe.bench.figures import number, share, stage_cells
from mpipipe.bench.gpu_parts import SHAPES
from mpipipe.bench.gpu_suite import Result
from mpipipe.bench.gpu_suite_pairs import pair_lines
from mpipipe.bench.whole_run import MEDIAN_PROMPT, RUN_MODE

__all__ = ["compare_lines", "table_lines"]

# The target on two GPUs, and vLLM 0.26.0 on the same kind of machine on two GPUs and on one.
_HELD_AGAINST: dict[tuple[str, str], tuple[int | None, int | None, int | None]] = {
    ("openllama_3b", "512x512x128"): (16_000, 9_860, 5_270),
    ("openllama_3b", "128x1024x256"): (9_500, 5_236, 3_057),
    ("openllama_3b", "64x512x128"): (9_500, 6_368, None),
    ("openllama_3b", "32x512x128"): (6_200, 3_641, 3_698),
    ("openllama_3b", "1x512x128"): (420, 313, 335),
    ("llama3_8b", "512x512x128"): (13_500, 12_268, 6_974),
    ("llama3_8b", "128x1024x256"): (9_500, 7_995, 5_608),
    ("llama3_8b", "64x512x128"): (6_800, 5_478, None),
    ("llama3_8b", "1x512x128"): (225, 196, 200),
}
# Weak scaling: (work on one GPU, work on two) with the same rows in every slot.
_SCALING = ("64x512x128", "128x512x128")
# Seconds to the first token of OpenLLaMA-3B over two GPUs, by what is in the kernel cache.
_START_TARGETS_S = {"cold": 15.0, "warm": 8.0}
_LEAST_PART_S = 0.3  # of a start: smaller parts are told together
# A run's generate phase over `bench throughput` of the same work.
_FILE_TARGET = 0.95

Record = dict[str, Any]
# Part, model with its variant, work, number of GPUs, and whether these are seconds of a start.
_Figure = tuple[str, str, str, str, bool]


def table_lines(results: Sequence[Result], seconds: float) -> list[str]:
    """Ours beside everything it is held against."""
    records = [record for result in results for record in result.records]
    peers = {
        (record["shape"], record["work"], record["ranks"]): record
        for record in records
        if record.get("peer")
    }
    runs = [record for record in records if record.get("mode") == RUN_MODE]
    ours = [record for record in records if not record.get("peer") and record not in runs]
    lines = []
    if ours or not runs:
        header = (
            "model", "work", "GPUs", "tokens/s", "target", "vLLM", "floor", "of floor",
            "transformers 1 GPU", "device_map 2 GPUs", "ms/round", "of decode floor", "bubble",
            "steady", "CPU µs/step", "GiB",
        )  # fmt: skip
        lines += [*_header(*header), *(_row(record, peers) for record in ours), ""]
        lines += [*_scaling_lines(ours), *_boot_lines(ours)]
    lines += [*_start_lines(runs), *_file_lines(runs, ours), *pair_lines(ours)]
    if measured := [*ours, *runs]:
        lines += [_where(measured), ""]
    lines += ["| part | seconds | outcome |", "|---|---:|---|"]
    lines += [f"| {r.part.name} | {r.seconds:.0f} | {r.problem or 'ok'} |" for r in results]
    return [*lines, "", f"All parts: {seconds:.0f} s."]


def _header(*names: str) -> list[str]:
    """The first two columns are text."""
    return [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]


def _where(records: Sequence[Record]) -> str:
    """Of the first when and with which versions, of all on what."""
    devices = ", ".join(sorted({name for record in records for name in record["devices"]}))
    versions = ", ".join(f"{k} {v}" for k, v in records[0]["versions"].items() if v)
    return f"{records[0]['date']}, {devices}; {versions}."


def _row(record: Record, peers: Mapping[tuple[str, str, str], Record]) -> str:
    """One line of the table."""
    key, ranks, variant = (record["shape"], record["work"]), record["ranks"], record["variant"]
    target, *vllm = _HELD_AGAINST.get(key, (None, None, None))
    target = target if ranks == 2 and not variant else None
    speed = record["tokens_per_s"]
    shown = f"**{speed:,.0f}**" if target and speed >= target else f"{speed:,.0f}"
    peer = [peers.get((*key, number), {}) for number in ("1", "2")]
    cells = [
        f"{record['shape']}, {variant}" if variant else record["shape"],
        record["work"],
        str(ranks),
        shown,
        number(target),
        number(vllm[2 - ranks]),
        number((record["floor"] or {}).get("tokens_per_s")),
        share(record["share_of_floor"]),
        *(entry.get("error") or number(entry.get("tokens_per_s")) for entry in peer),
        number(record["ms_per_round"], 3),
        share(record["share_of_decode_floor"]),
        *stage_cells(record),
    ]
    return "| " + " | ".join(cells) + " |"


def _scaling_lines(ours: Sequence[Record]) -> list[str]:
    """Weak scaling from one GPU to two, every slot keeping its rows."""
    of = {
        (record["shape"], record["work"], record["ranks"]): record
        for record in ours
        if not record["variant"]
    }
    lines = []
    for shape in SHAPES:
        one, two = of.get((shape, _SCALING[0], 1)), of.get((shape, _SCALING[1], 2))
        if one and two and one["ms_per_round"] and two["ms_per_round"]:
            job = two["tokens_per_s"] / (2 * one["tokens_per_s"])
            decode = one["ms_per_round"] / two["ms_per_round"]
            text = (
                f"Weak scaling 1 → 2 GPUs, {shape}, {_SCALING[0]} → {_SCALING[1]} (64 rows in "
                f"every slot): decode {decode:.3f}, whole job {job:.3f}."
            )
            lines += [text, ""]
    return lines


def _boot_lines(ours: Sequence[Record]) -> list[str]:
    """From the start of the processes to the first token, once per part."""
    lines = []
    for part in dict.fromkeys(record["part"] for record in ours):
        boot = next(record["boot"] for record in ours if record["part"] == part)
        text = (
            f"{part}: first token {boot['first_token_s']:.1f} s after the process started (meet "
            f"{number(boot['greet_s'], 1)}, import {number(boot['import_s'], 1)}, load "
            f"{number(boot['load_s'], 1)} of which graphs {number(boot['capture_s'], 1)})."
        )
        lines += [text, ""]
    return lines


# ---- whole runs ----------------------------------------------------------------------------------


def _start_lines(runs: Sequence[Record]) -> list[str]:
    """From the start of the process to the first token, and where that went."""
    starts = [record for record in runs if record["kernels"]]
    if not starts:
        return []
    lines = _header(
        "start of", "kernel cache", "GPUs", "first token s", "target", "foretold until it "
        "generates", "measured", "launcher s", "entries kept", "parts in s",
    )  # fmt: skip
    for record in starts:
        first_s, phases = record["first_token_s"], record["phases"]
        target_s = _START_TARGETS_S[record["kernels"]] if _has_start_target(record) else None
        shown = f"**{first_s:.1f}**" if target_s and first_s <= target_s else f"{first_s:.1f}"
        shown += " (median prompt's)" if _is_median(record) else ""
        cells = [
            record["shape"],
            record["kernels"],
            str(record["ranks"]),
            shown,
            number(target_s),
            number(record["predicted"]["start_s"], 1),
            number(phases["boot_s"] + phases["load_s"], 1),
            number(record["command_s"] - phases["wall_s"], 1),
            number(record["num_cached_kernels"]),
            _parts(record["start"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _has_start_target(record: Record) -> bool:
    return (record["shape"], record["ranks"]) == (SHAPES[0], 2)


def _is_median(record: Record) -> bool:
    """Of trees that do not tell when the first of all prompts had its token."""
    return bool(record.get("first_token_of") == MEDIAN_PROMPT)


def _parts(start: Mapping[str, float]) -> str:
    """The largest first."""
    if not start:
        return "-"
    large = {name: seconds for name, seconds in start.items() if seconds >= _LEAST_PART_S}
    told = [f"{name} {large[name]:.1f}" for name in sorted(large, key=large.__getitem__)[::-1]]
    return ", ".join([*told, f"the rest {sum(start.values()) - sum(large.values()):.1f}"])


def _file_lines(runs: Sequence[Record], ours: Sequence[Record]) -> list[str]:
    """A run from a file to the merged file, beside `bench throughput` of the same work."""
    files = [record for record in runs if not record["kernels"]]
    if not files:
        return []
    lines = _header(
        "whole run of", "work", "GPUs", "tokens/s", "bench throughput", "of it", "target",
        "foretold tokens/s", "command s", "start s", "generate s", "merge s",
        "first step to merged file, prompts/s",
    )  # fmt: skip
    for record in files:
        bench = next((other for other in ours if _is_same_work(record, other)), None)
        speed, phases = record["tokens_per_s"], record["phases"]
        cells = [
            record["shape"],
            record["work"],
            str(record["ranks"]),
            number(speed),
            "-" if bench is None else number(bench["tokens_per_s"]) + _other_plan(record, bench),
            _share_of_bench(record, bench),
            share(_FILE_TARGET),
            number(record["predicted"]["tokens_per_s"]),
            number(record["command_s"], 1),
            number(phases["boot_s"] + phases["load_s"], 1),
            number(phases["generate_s"], 2),
            number(phases["shutdown_s"], 2),
            number(record["merged_per_s"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _is_same_work(run: Record, bench: Record) -> bool:
    """Other parts have the work too, under a plan for the largest of theirs."""
    is_its_bench = bench["part"].startswith("file_bench_")
    same = all(run[name] == bench[name] for name in ("shape", "ranks", "variant", "work"))
    return is_its_bench and same


def _share_of_bench(run: Record, bench: Record | None) -> str:
    """Bold where the target is reached, which is one for the same plan."""
    if bench is None:
        return share(None)
    of_bench = run["tokens_per_s"] / bench["tokens_per_s"]
    is_reached = of_bench >= _FILE_TARGET and not _other_plan(run, bench)
    return f"**{of_bench:.1%}**" if is_reached else share(of_bench, 1)


def _other_plan(run: Record, bench: Record) -> str:
    """A ratio of two plans says little of what files cost."""
    return "" if run["plan"]["hash"] == bench["plan"]["hash"] else " (another plan)"


# ---- before and after ----------------------------------------------------------------------------


def compare_lines(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Every line that one of the two has, beside the other's: medians where there are several.

    Tokens per second; of starts the seconds to the first token, where less is better. That of the
    median prompt, which is all that older trees tell, has a line of its own.
    """
    figures = [_figures(records) for records in (before, after)]
    names = dict.fromkeys((*figures[0], *figures[1]))
    lines = _header("part", "model", "work", "GPUs", "before", "after", "change")
    for name in names:
        part, shape, work, ranks, is_start = name
        known = [median(found[name]) if name in found else None for found in figures]
        digits = 1 if is_start else 0
        shown = (number(value, digits) for value in known)
        cells = [part, shape, work, ranks, *shown, _change(*known)]
        lines.append("| " + " | ".join(cells) + " |")
    for side, records in (("Before", before), ("After", after)):
        if own := [record for record in records if not record.get("peer")]:
            lines += ["", f"{side}: {_where(own)}"]
    return lines


def _figures(records: Sequence[Record]) -> dict[_Figure, list[float]]:
    """By part, as two parts may do one work under two plans."""
    found: dict[_Figure, list[float]] = {}
    for record in records:
        if record.get("error"):
            continue
        variant = record.get("variant") or record.get("peer")
        shape = f"{record['shape']}, {variant}" if variant else record["shape"]
        kernels, is_run = record.get("kernels"), record.get("mode") == RUN_MODE
        work = f"{record['work']} of a file" if is_run else record["work"]
        first = "first token s of the median prompt" if _is_median(record) else "first token s"
        work = f"{first}, {kernels} kernel cache" if kernels else work
        value = record["first_token_s" if kernels else "tokens_per_s"]
        name = (record["part"], shape, work, str(record["ranks"]), bool(kernels))
        found.setdefault(name, []).append(value)
    return found


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after / before - 1:+.1%}"
