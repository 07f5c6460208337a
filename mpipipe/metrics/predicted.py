"""What was predicted of a run beside what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Compared", "Prediction", "StagePrediction", "compared", "compared_fields"]


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """One stage. Seconds are means over its steps of one kind."""

    replica: int
    stage: int
    prefill_step_s: float
    decode_step_s: float
    # The peak: on a GPU what torch reserves; on a CPU the resident size (VmHWM) beyond that before
    # loading, which Python and its libraries take (`RankReport.used_bytes`).
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of the tokens that a run has made, or, before it, of those that it may make at most."""

    num_prompt_tokens: int
    num_output_tokens: int
    tokens_per_s: float  # output tokens over `generate_s`
    generate_s: float
    start_s: float  # from the start of the processes until they generate: boot and load
    load_s: float  # of it: weights
    stages: tuple[StagePrediction, ...]
    source: str  # of the step times: rates, a profile, an earlier run

    @property
    def wall_s(self) -> float:
        """From the start of the processes to the last completion."""
        return self.start_s + self.generate_s


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure. `error`: by what share of the prediction the measured value is larger."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """0.05: it was 5 % more than predicted."""
        return self.measured / self.predicted - 1


def compared(*figures: tuple[str, float, float]) -> tuple[Compared, ...]:
    """Of (name, predicted, measured) those that both are known of: 0 is not known."""
    return tuple(
        Compared(name, predicted, measured)
        for name, predicted, measured in figures
        if predicted > 0 and measured > 0
    )


def compared_fields(figures: tuple[Compared, ...]) -> dict[str, dict[str, Any]]:
    """As they stand in `metrics.json`, by name."""
    return {
        each.name: {
            "predicted": each.predicted,
            "measured": each.measured,
            "error": round(each.error, 6),
        }
        for each in figures
    }
