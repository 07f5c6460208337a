"""What has ended is written beside the event loop, in the order in which it ended, and once."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.errors import OutputError, PromptError
from mpipipe.job.generating import _KeptCompletions
from mpipipe.metrics.log import NullLog
from mpipipe.run_folder.file_thread import FileThread
from mpipipe.types import Completion, FinishReason

LIMIT_S = 20.0


def completion(index: int, *, failed: bool = False) -> Completion:
    if failed:
        return Completion.rejected(f"p{index}", index, PromptError("too_long", "too long"))
    return Completion(f"p{index}", index, "", (3,), FinishReason.LENGTH, 1, 0.0, 0.0, 0.0)


class Writer:
    """A journal whose disk answers when it is told to."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked = threading.Event()
        self.calls: list[list[int]] = []
        self.fails = False

    def write(self, *completions: Completion) -> None:
        self.asked.set()
        assert self.answers.wait(LIMIT_S), "the event loop waits for the disk"
        if self.fails:
            raise OutputError("the disk is full")
        self.calls.append([completion.index for completion in completions])


class Events(NullLog):
    """A log that keeps of which requests it was told."""

    def __init__(self) -> None:
        self.debugged: list[object] = []
        self.informed: list[object] = []

    def debug(self, event: str, **fields: object) -> None:
        assert event == "completed"
        self.debugged.append(fields["request"])

    def info(self, event: str, **fields: object) -> None:
        assert event == "completed"
        self.informed.append((fields["request"], fields["error"]))


def kept_by(writer: Writer, log: Events) -> tuple[_KeptCompletions, FileThread]:
    files = FileThread()
    job: Any = SimpleNamespace(files=files, log=log)
    made: Any = writer
    return _KeptCompletions(job, made), files


def test_what_ends_while_the_disk_does_not_answer_is_written_together() -> None:
    writer, log = Writer(), Events()

    async def run() -> None:
        kept, files = kept_by(writer, log)
        kept.take(completion(0))
        await asyncio.to_thread(writer.asked.wait, LIMIT_S)
        for index in range(1, 100):
            kept.take(completion(index, failed=index == 50))
        writer.answers.set()
        await files.run(lambda: None)  # all that was posted is done
        files.close()

    asyncio.run(run())
    assert [index for call in writer.calls for index in call] == list(range(100))
    assert [len(call) for call in writer.calls] == [1, 32, 32, 32, 3]
    assert log.informed == [("p50", "too_long")]
    assert log.debugged == [f"p{index}" for index in range(100) if index != 50]


def test_one_that_cannot_be_written_is_told_to_the_next() -> None:
    writer = Writer()
    writer.fails = True
    writer.answers.set()

    async def run() -> None:
        kept, files = kept_by(writer, Events())
        kept.take(completion(0))
        with pytest.raises(OutputError):
            await files.run(lambda: None)
        with pytest.raises(OutputError):
            kept.take(completion(1))
        files.close()

    asyncio.run(run())
    assert writer.calls == []
