"""`mpipipe bench quantize`: error of the logits and perplexity of weights in 8 bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mpipipe.bench.figures import number, share
from mpipipe.bench.quantization import FormRecord, TextOptions, measure_forms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.planning.plan import PipelinePlan

__all__ = ["quantize_command"]

_HEADER = ("quantize", "perplexity", "logits' error", "same choice", "GB", "load s", "read s")


def quantize_command(
    config: Path,
    overrides: Sequence[str],
    forms: Sequence[str],
    options: TextOptions,
) -> None:
    """Print a line for each form as soon as it is measured, and one JSON line each at the end.

    Raises:
        MpipipeError: what `mpipipe run` would refuse; forms before it are printed.
    """
    records: list[FormRecord] = []
    plans: list[PipelinePlan] = []
    try:
        for record in measure_forms(config, overrides, forms, options, planned=plans.append):
            if not records:
                print(_title(plans[0], record, options))
                print(_line(_HEADER))
            records.append(record)
            print(_line(_cells(record)), flush=True)
    finally:
        for record, plan in zip(records, plans, strict=False):
            print(json.dumps({**_facts(plan), **dataclasses.asdict(record)}))


def _facts(plan: PipelinePlan) -> dict[str, str]:
    return {"model": Path(plan.model_path).name, "dtype": plan.dtype, "device": plan.device}


def _title(plan: PipelinePlan, record: FormRecord, options: TextOptions) -> str:
    return (
        f"{Path(plan.model_path).name}, {plan.dtype} on {plan.device}: {record.num_tokens} tokens "
        f"in steps of at most {options.rows_per_step}"
    )


def _cells(record: FormRecord) -> tuple[str, ...]:
    error = record.logits_error
    return (
        record.quantize,
        number(record.perplexity, 4),
        "-" if error is None else f"{error:.2e}",
        share(record.same_choice, 1),
        number(record.weight_bytes / 1e9, 3),
        number(record.load_s, 1),
        number(record.read_s, 1),
    )


def _line(cells: Sequence[str]) -> str:
    first, *others = cells
    return "  ".join((first.ljust(8), *(cell.rjust(13) for cell in others)))
