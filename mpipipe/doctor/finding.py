"""What the doctor says: findings, and the report they make.

Invariants: *fatal* means that the job would fail, or run on devices that the user did not ask for;
*warning* that it would run, but slower, or that something will be missing. A finding that is not OK
has a remedy. `checks` decide what is amiss, `cli.doctor` prints it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpipipe.errors import EXIT_BUG, EXIT_ENVIRONMENT, EXIT_OK, MpipipeError

__all__ = ["DoctorReport", "Finding", "Severity", "fatal", "ok", "split_advice", "warning"]

Value = float | int | str


class Severity(str, enum.Enum):
    """How bad it is, better ones first."""

    OK = "ok"
    WARNING = "warning"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `rank` and `host` say where; neither: the job as a whole."""

    check: str  # "group.name", e.g. "gpu.driver"
    severity: Severity
    what: str  # with values
    cause: str = ""
    remedy: str = ""
    rank: int | None = None
    host: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)  # units in the names
    exit_code: int = EXIT_ENVIRONMENT  # of the job that this would end; only with FATAL

    @property
    def group(self) -> str:
        """What `check` begins with."""
        return self.check.partition(".")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"severity": self.severity.value}

    def at(self, host: str, rank: int | None = None) -> Finding:
        """The same, of one host or of one rank."""
        return dataclasses.replace(self, host=host, rank=rank)

    @staticmethod
    def of_error(check: str, error: MpipipeError, *, rank: int | None = None) -> Finding:
        """What would end the job with `error`."""
        what, remedy = split_advice(str(error))
        exit_code = error.exit_code or EXIT_BUG
        return Finding(check, Severity.FATAL, what, remedy=remedy, rank=rank, exit_code=exit_code)


def split_advice(sentence: str) -> tuple[str, str]:
    """What an error says happened, and what it advises after its first colon outside of brackets.

    The advice is empty where what follows is a value rather than words.
    """
    depth = 0
    for position, letter in enumerate(sentence):
        depth += (letter in "([{") - (letter in ")]}")
        if depth <= 0 and sentence.startswith(": ", position):
            advice = sentence[position + 2 :]
            if " " in advice:
                return sentence[:position], advice
    return sentence, ""


def ok(check: str, what: str, **values: Value) -> Finding:
    """A finding that all is well."""
    return Finding(check, Severity.OK, what, values=values)


def warning(check: str, what: str, cause: str, remedy: str, **values: Value) -> Finding:
    """A finding that something could be better."""
    return Finding(check, Severity.WARNING, what, cause, remedy, values=values)


def fatal(
    check: str,
    what: str,
    cause: str,
    remedy: str,
    exit_code: int = EXIT_ENVIRONMENT,
    **values: Value,
) -> Finding:
    """A finding that the job would be lost, with `exit_code`."""
    return Finding(check, Severity.FATAL, what, cause, remedy, values=values, exit_code=exit_code)


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All findings of one visit."""

    findings: tuple[Finding, ...]
    num_ranks: int
    hosts: tuple[str, ...]
    elapsed_s: float

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding."""
        order = list(Severity)
        return max((f.severity for f in self.findings), key=order.index, default=Severity.OK)

    @property
    def exit_code(self) -> int:
        """0 unless something is fatal; then what the first fatal finding would end the job with."""
        fatals = (f.exit_code for f in self.findings if f.severity is Severity.FATAL)
        return next(fatals, EXIT_OK)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; `launch/README.md` documents it."""
        return {
            "severity": self.worst.value,
            "exit_code": self.exit_code,
            "num_ranks": self.num_ranks,
            "hosts": list(self.hosts),
            "elapsed_s": round(self.elapsed_s, 3),
            "findings": [finding.to_dict() for finding in self.findings],
        }
