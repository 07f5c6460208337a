"""The one exception tree: grouped by what the user can do about it, each with its exit code.

Every message has three parts: what happened (with values), the likely cause, what to do. A user
error (`MpipipeError`) is shown as that sentence; anything else is our own bug and keeps its
traceback.
"""

from __future__ import annotations

import errno

__all__ = [
    "EXIT_BUG",
    "EXIT_CHECKPOINT",
    "EXIT_CONFIG",
    "EXIT_ENVIRONMENT",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_PEER_LOST",
    "EXIT_PROMPTS",
    "EXIT_REGRESSION",
    "EXIT_REQUEUE",
    "ChannelClosedError",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "EnvironmentSetupError",
    "MpipipeError",
    "NumericsError",
    "OutOfPagesError",
    "OutputError",
    "PeerLostError",
    "PlanError",
    "PromptError",
    "ProtocolMismatchError",
    "RankCountError",
    "RemoteError",
    "SettingError",
    "StoppedByUserError",
    "StoppedError",
    "UnsupportedModelError",
    "is_out_of_memory",
    "is_stop",
]

EXIT_OK = 0
EXIT_BUG = 1  # an unexpected exception: please report it
EXIT_CONFIG = 2  # command line, configuration, plan or output folder
EXIT_CHECKPOINT = 3  # model folder missing, incomplete or of an unsupported family
EXIT_PROMPTS = 4  # the run finished, but at least one prompt became an error record
EXIT_ENVIRONMENT = 5  # MPI, ranks, memory, devices
EXIT_PEER_LOST = 6  # a rank died, hung or raised during the run
EXIT_REGRESSION = 7  # `report --against`: something became worse beyond the noise (4: not judged)
EXIT_REQUEUE = 75  # told to stop (SIGTERM, SIGUSR1): stopped cleanly, start it again to go on
EXIT_INTERRUPTED = 130  # Ctrl-C: stopped cleanly too, but nothing starts it again by itself


class MpipipeError(Exception):
    """A condition the user can mend; `str()` of it is the sentence to show."""

    exit_code = EXIT_BUG


class ConfigError(MpipipeError):
    """The configuration, command line or prompt file path is wrong: edit it."""

    exit_code = EXIT_CONFIG


class SettingError(ConfigError, ValueError):
    """An argument of the library is wrong; a `ValueError` too, as scripts expect."""


class PlanError(ConfigError):
    """Layers, stages and memory do not fit together: change the pipeline or memory section."""


class OutputError(ConfigError):
    """The run folder cannot be used: choose another one."""


class CheckpointError(MpipipeError):
    """The model folder is missing, incomplete or inconsistent: copy it again or fix the path."""

    exit_code = EXIT_CHECKPOINT


class UnsupportedModelError(CheckpointError):
    """The model family cannot be split into stages."""


class PromptError(MpipipeError):
    """One prompt cannot be completed. `kind` is the machine-readable word in its error record."""

    exit_code = EXIT_PROMPTS

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class EnvironmentSetupError(MpipipeError):
    """MPI, devices, memory or the launch itself do not suit the run."""

    exit_code = EXIT_ENVIRONMENT


class RankCountError(EnvironmentSetupError):
    """The number of ranks is not what replicas, stages and lanes take."""


class ProtocolMismatchError(EnvironmentSetupError):
    """Two ranks run different versions, configurations or plans."""


class DeadlineError(EnvironmentSetupError):
    """Other ranks did not answer within the deadline."""


class NumericsError(ConfigError):
    """The model produced NaN or infinity: choose another `model.dtype`, or check the weights."""


class PeerLostError(MpipipeError):
    """A rank died, hung or raised while the pipeline was running.

    `lost` is the rank, where one is known. `told_by` is the rank that tells the user; None: the
    one that raises it.
    """

    exit_code = EXIT_PEER_LOST

    def __init__(
        self, message: str, *, lost: int | None = None, told_by: int | None = None
    ) -> None:
        super().__init__(message)
        self.lost = lost
        self.told_by = told_by


class RemoteError(MpipipeError):
    """Another rank reported a user error; carries that error's kind and exit code."""

    def __init__(self, message: str, *, kind: str, exit_code: int, rank: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.exit_code = exit_code
        self.rank = rank


class StoppedError(MpipipeError):
    """The run was told to stop: nothing is wrong, and it can go on later."""

    exit_code = EXIT_REQUEUE


class StoppedByUserError(StoppedError):
    """The same by Ctrl-C: nothing starts it again by itself."""

    exit_code = EXIT_INTERRUPTED


class ChannelClosedError(MpipipeError):
    """A channel was used after it was closed (our own bug unless shutting down)."""


class OutOfPagesError(MpipipeError):
    """More pages were asked for than are free (the scheduler must check first)."""


# What libraries say when memory is short, where they have no exception for it:
# torch's CPU allocator, C++, mmap, the loader of shared objects, threads without room for a stack.
_OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "failed to map segment from shared object",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or the error that it was raised from, says that memory is short."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError | OSError | ImportError):
            text = str(cause).lower()
            if any(words in text for words in _OUT_OF_MEMORY_WORDS):
                return True
        cause = cause.__cause__
    return False


def is_stop(error: BaseException) -> bool:
    """Whether the run was told to stop, on this rank or another: a later start goes on with it."""
    return isinstance(error, MpipipeError) and error.exit_code in {EXIT_REQUEUE, EXIT_INTERRUPTED}
