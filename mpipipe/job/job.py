"""A run while it runs: what all that a rank does for it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpipipe.metrics.summary import PhaseTimes
from mpipipe.run_folder.file_thread import FileThread

if TYPE_CHECKING:
    from mpipipe.config.load import LoadedConfig
    from mpipipe.job.acquire import Acquired
    from mpipipe.job.supervision import RankPage
    from mpipipe.job.view import JobView
    from mpipipe.metrics.identity import RunIdentity
    from mpipipe.metrics.log import RunLog
    from mpipipe.run_folder.status_file import ProgressFile
    from mpipipe.runtime.ranks import Ranks

__all__ = ["Job", "Marks"]


@dataclass(slots=True)
class Marks:
    """When the phases of the run ended, in seconds of the run's clock."""

    started_s: float
    booted_s: float = 0.0
    loaded_s: float = 0.0
    generated_s: float = 0.0

    def phases(self, now_s: float) -> PhaseTimes:
        """How long each took; the last ends now."""
        return PhaseTimes(
            boot_s=self.booted_s - self.started_s,
            load_s=self.loaded_s - self.booted_s,
            generate_s=self.generated_s - self.loaded_s,
            shutdown_s=now_s - self.generated_s,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A run that has its folder, and where it reports to."""

    ranks: Ranks
    loaded: LoadedConfig
    acquired: Acquired
    identity: RunIdentity  # of this rank, in every line that it writes
    log: RunLog
    view: JobView
    marks: Marks
    progress: ProgressFile
    page: RankPage
    first_manifest: dict[str, Any] = field(default_factory=dict)  # of the head
    files: FileThread = field(default_factory=FileThread)  # while the run generates

    def warn(self, message: str) -> None:
        """Tell the user and the log."""
        self.log.warning("journal", message=message)
        self.view.warned(message)
