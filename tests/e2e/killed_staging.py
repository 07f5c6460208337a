"""`mpipipe stage-model` that a signal ends in the middle of a file, at a place that is the same
every time: `python killed_staging.py SIGNAL NUMBER_OF_THE_FILE stage-model SRC DST …`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mpipipe.cli.main import main
from mpipipe.staging import stage
from mpipipe.staging.pieces import Piece, write_piece
from mpipipe.staging.record import FileRecord

number = signal.Signals[sys.argv[1]]
files_left = int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]


def write(folder: Path, piece: Piece, took: Callable[[int], object]) -> FileRecord:
    """`write_piece`, and the signal after the first bytes of the file that is meant."""
    global files_left  # noqa: PLW0603 - the script's only state
    files_left -= 1

    def told(num_bytes: int) -> None:
        if files_left == 0:
            os.kill(os.getpid(), number)
        took(num_bytes)

    return write_piece(folder, piece, told)


if __name__ == "__main__":
    stage.write_piece = write  # type: ignore[attr-defined]
    main()
