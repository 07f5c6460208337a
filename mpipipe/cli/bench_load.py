"""`mpipipe bench load`: how fast a stage comes from its files, as a table and JSON lines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from mpipipe.bench.load import LoadBench
from mpipipe.cli.plan import ranks_of_this_host
from mpipipe.config.load import load_config
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.resolve import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["load_command"]

_COLUMNS = (
    "cache", "GB", "load GB/s", "of read+keep", "of read+drop", "converting", "bytes read", "reads",
    "from storage", "host MiB beside weights",
)  # fmt: skip


def load_command(
    config: Path, overrides: Sequence[str], *, stages: int, stage: int, cold: bool, repeat: int
) -> None:
    """Measure in this process and print.

    Raises:
        MpipipeError: what `mpipipe run` would refuse, or there is no such stage.
    """
    loaded = load_config(config, overrides)
    model = read_model(loaded)
    settings = model.loaded.config
    ranks = ranks_of_this_host(model.loaded, stages)
    plan = make_plan(settings, model.spec, ranks, str(model.folder), notes=model.notes)
    measured = LoadBench(plan, stage, trust_remote_code=settings.model.trust_remote_code)
    records = [measured.measure(cold=state, repeat=repeat) for state in ((False, True)[: 1 + cold])]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        table.add_row(*_row(record))
    first = records[0]
    print(
        f"{first['model']}, stage {stage} of {stages}, as {first['dtype']} on {first['device']}; "
        f"medians of {repeat}"
    )
    Console(width=140).print(table)
    print("\n".join(map(json.dumps, records)))


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    size, peak = record["bytes"], record["peak_bytes"]
    on_host = record["parameter_bytes"] if record["device"] == "cpu" else 0
    return (
        record["state"],
        f"{size / 1e9:.3f}",
        f"{size / 1e9 / record['load_s']:.2f}",
        f"{record['keep_s'] / record['load_s']:.0%}",
        f"{record['drop_s'] / record['load_s']:.0%}",
        f"{record['convert_s'] / record['load_s']:.0%}",
        f"{record['read_ratio']:.4f}",
        str(record["num_reads"]),
        f"{record['storage_bytes'] / size:.0%}",
        "-" if peak is None else f"{(peak - on_host) / 2**20:.0f}",
    )
