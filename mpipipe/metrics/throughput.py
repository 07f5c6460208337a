"""The figures of a timed job: the record of `mpipipe bench throughput`. Pure: it measures nothing.

Shares and ratios are fractions of 1, `_s` seconds, `ms_` milliseconds, `_us` microseconds, `_bytes`
bytes; null where nothing was measured, or the figure would be meaningless.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpipipe.metrics.accounting import StageTotals, TimeParts
from mpipipe.metrics.predicted import compared, compared_fields
from mpipipe.metrics.summary import RankReport, percentile, stage_figures

if TYPE_CHECKING:
    from mpipipe.metrics.predicted import Prediction
    from mpipipe.types import Completion

__all__ = ["FloorTimes", "JobTiming", "reports_since", "throughput_record"]


@dataclass(frozen=True, slots=True)
class FloorTimes:
    """The floors that the figures are compared with (`planning.roofline`), as plain numbers."""

    tokens_per_s: float
    prefill_s: float
    decode_round_s: float
    decode_tokens_per_s: float | None
    source: str


@dataclass(frozen=True, slots=True)
class JobTiming:
    """One timed generate call, seen from the head."""

    elapsed_s: float  # from submission to the last completion
    completions: tuple[Completion, ...]
    at_once: bool  # all sequences ran at the same time, with equal lengths

    @property
    def num_prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(completion.num_prompt_tokens for completion in self.completions)

    @property
    def num_output_tokens(self) -> int:
        """Over all prompts."""
        return sum(completion.num_output_tokens for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the elapsed time."""
        return self.num_output_tokens / self.elapsed_s

    @property
    def prefill_s(self) -> float:
        """Until every sequence had its first token; decode steps in between are in it."""
        return max(completion.ttft_s for completion in self.completions)

    @property
    def decode_s(self) -> float:
        """The rest."""
        return max(0.0, self.elapsed_s - self.prefill_s)

    @property
    def round_s(self) -> float | None:
        """One token for every sequence after prefill; None where not all ran at once."""
        longest = max(completion.num_output_tokens for completion in self.completions)
        return self.decode_s / (longest - 1) if self.at_once and longest > 1 else None

    def ms_per_token(self) -> float | None:
        """Median over sequences of the time per token after the first, in milliseconds."""
        return _ms(
            percentile(
                [
                    (completion.latency_s - completion.ttft_s) / (completion.num_output_tokens - 1)
                    for completion in self.completions
                    if completion.num_output_tokens > 1
                ],
                50,
            )
        )


def throughput_record(
    timing: JobTiming,
    reports: Sequence[RankReport],
    floor: FloorTimes | None,
    predicted: Prediction | None = None,
) -> dict[str, Any]:
    """The figures of one timed job.

    Args:
        timing: what the head saw.
        reports: of every rank, in stage order, for this job alone (`reports_since`).
        floor: None where the device's ceilings are not known.
        predicted: of this job; None: nothing is.
    """
    return {
        "tokens_per_s": timing.tokens_per_s,
        "total_tokens_per_s": (timing.num_prompt_tokens + timing.num_output_tokens)
        / timing.elapsed_s,
        "num_prompts": len(timing.completions),
        "num_prompt_tokens": timing.num_prompt_tokens,
        "num_output_tokens": timing.num_output_tokens,
        "elapsed_s": timing.elapsed_s,
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "ms_per_round": _ms(timing.round_s),
        "ms_per_steady_step": _ms(_steady_step_s(reports)),
        "ms_per_token_p50": timing.ms_per_token(),
        "ttft_p50_s": percentile([c.ttft_s for c in timing.completions], 50),
        "ttft_p95_s": percentile([c.ttft_s for c in timing.completions], 95),
        "floor": None if floor is None else dataclasses.asdict(floor),
        "share_of_floor": None if floor is None else timing.tokens_per_s / floor.tokens_per_s,
        "share_of_decode_floor": _decode_share(timing, floor),
        "stages": [_stage(report) for report in reports],
        "predicted": None if predicted is None else dataclasses.asdict(predicted),
        "compared": _compared(timing, reports, predicted),
    }


def _compared(
    timing: JobTiming, reports: Sequence[RankReport], predicted: Prediction | None
) -> dict[str, dict[str, float]]:
    """Predicted beside measured, of the job, and of each stage steps of one kind and memory."""
    if predicted is None:
        return {}
    figures = compared(
        ("tokens_per_s", predicted.tokens_per_s, timing.tokens_per_s),
        ("generate_s", predicted.generate_s, timing.elapsed_s),
        *stage_figures(predicted, reports),
    )
    return compared_fields(figures)


def reports_since(
    before: Sequence[RankReport], after: Sequence[RankReport]
) -> tuple[RankReport, ...]:
    """`after` with only what came after `before`; both of all ranks in the same order."""
    return tuple(
        dataclasses.replace(new, stage=_since(old.stage, new.stage))
        for old, new in zip(before, after, strict=True)
    )


def _since(old: StageTotals, new: StageTotals) -> StageTotals:
    assert old.stage == new.stage, (old.stage, new.stage)
    return StageTotals(
        stage=new.stage,
        num_steps=new.num_steps - old.num_steps,
        num_tokens=new.num_tokens - old.num_tokens,
        num_sampled=new.num_sampled - old.num_sampled,
        overall=_parts_since(old.overall, new.overall),
        num_steady_steps=new.num_steady_steps - old.num_steady_steps,
        steady=_parts_since(old.steady, new.steady),
        bytes_in=new.bytes_in - old.bytes_in,
        bytes_out=new.bytes_out - old.bytes_out,
        num_undivided=new.num_undivided - old.num_undivided,
        prefill=new.prefill - old.prefill,
        decode=new.decode - old.decode,
    )


def _parts_since(old: TimeParts, new: TimeParts) -> TimeParts:
    earlier: Mapping[str, float] = dataclasses.asdict(old)
    later: Mapping[str, float] = dataclasses.asdict(new)
    return TimeParts(**{part: later[part] - earlier[part] for part in later})


def _steady_step_s(reports: Sequence[RankReport]) -> float | None:
    """Mean over all stages' steady steps."""
    num_steps = sum(report.stage.num_steady_steps for report in reports)
    return sum(r.stage.steady.wall_s for r in reports) / num_steps if num_steps else None


def _decode_share(timing: JobTiming, floor: FloorTimes | None) -> float | None:
    round_s = timing.round_s
    return floor.decode_round_s / round_s if floor is not None and round_s else None


def _stage(report: RankReport) -> dict[str, Any]:
    """One rank's part of the record."""
    stage = report.stage
    return {
        "replica": report.replica,
        "stage": stage.stage,
        "rank": report.rank,
        "host": report.host,
        "num_steps": stage.num_steps,
        "num_steady_steps": stage.num_steady_steps,
        "bubble": stage.overall.bubble_ratio if stage.overall.wall_s > 0 else None,
        "steady_bubble": stage.steady.bubble_ratio if stage.steady.wall_s > 0 else None,
        "overall": dataclasses.asdict(stage.overall),
        "steady": dataclasses.asdict(stage.steady),
        "cpu_us_per_step": report.cpu_us_per_step,
        "head_us_per_step": report.head_us_per_step,
        "weight_bytes": report.weight_bytes,
        "kv_bytes": report.kv_bytes,
        "kv_host_bytes": report.kv_host_bytes,
        "gpu_peak_bytes": report.gpu_peak_bytes,
        "peak_rss_bytes": report.peak_rss_bytes,
        # Of the session so far, not of this job alone; null: all weights stand on the device.
        "offload": None if report.offload is None else dataclasses.asdict(report.offload),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
