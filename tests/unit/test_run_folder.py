"""Who may write to a run folder, which one a job gets, and what lasts when a node is lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpipipe.clock import MonotonicClock
from mpipipe.config.load import load_config
from mpipipe.config.prompts import PromptLine
from mpipipe.errors import ConfigError, OutputError
from mpipipe.job import generating
from mpipipe.job.acquire import Acquired, acquire_folder
from mpipipe.job.ending import report
from mpipipe.metrics.log import NullLog
from mpipipe.run_folder.file_thread import FileThread
from mpipipe.run_folder.files import write_whole
from mpipipe.run_folder.journal import CompletionWriter
from mpipipe.run_folder.lock import lock_folder
from mpipipe.run_folder.status_file import ProgressFile
from mpipipe.topology.slurm import SlurmJob
from mpipipe.types import Completion, FinishReason

NOW = datetime(2020, 11, 22, 12, 0, tzinfo=UTC)
FIRST, AGAIN = SlurmJob("7", 0, None), SlurmJob("7", 1, None)
FINGERPRINT = {"model.path": "/models/a", "model.dtype": "float16", "generation.seed": 0}


def acquire(job: SlurmJob | None, *words: str, **differs: object) -> Acquired:
    """What a run named `demo` of one prompt acquires; it lets go of the folder at once."""
    loaded = load_config(None, ["name=demo", *words])
    acquired = acquire_folder(loaded, [PromptLine(0, 1, "a")], FINGERPRINT | differs, job)
    with closing(acquired):
        return acquired


def begin(folder: Path, job: SlurmJob | None, **differs: object) -> None:
    """What a run leaves in `folder` that has begun to generate."""
    folder.mkdir(parents=True, exist_ok=True)
    attempt = {"job": job.label if job else None}
    document = {"basis": FINGERPRINT | differs, "attempts": [attempt]}
    (folder / "manifest.json").write_text(json.dumps(document))
    (folder / "completions_rank_0.jsonl").write_text('{"id": "a"}\n')


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- the folder of a job -------------------------------------------------------------------------


def test_a_requeued_job_finds_the_folder_that_it_was_given(tmp_path: Path) -> None:
    folder = acquire(FIRST).folder
    assert folder == tmp_path / "runs" / "demo-7"
    begin(folder, FIRST)
    again = acquire(AGAIN)
    assert again.folder == folder
    assert again.earlier.kept_ids == {"a"}
    assert list(folder.glob(".*")) == []


def test_a_requeued_job_that_ended_while_it_booted_takes_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo-7"
    folder.mkdir(parents=True)
    (folder / "rank_0.log").touch()
    (folder / "status.json").write_text('{"job_id": "7"}')
    again = acquire(AGAIN)
    assert (again.folder, again.is_resumed) == (folder, False)


def test_a_further_run_of_a_job_has_a_folder_of_its_own_and_finds_it_again(tmp_path: Path) -> None:
    begin(tmp_path / "runs" / "demo-7", FIRST)
    second = acquire(FIRST, **{"generation.seed": 1}).folder
    assert second.name == "demo-7.2"
    begin(second, FIRST, **{"generation.seed": 1})
    assert acquire(AGAIN, **{"generation.seed": 1}).folder == second
    assert acquire(AGAIN, **{"generation.seed": 2}).folder.name == "demo-7.3"
    assert acquire(AGAIN, "output.resume=false").folder.name == "demo-7.3"


def test_which_run_to_go_on_with_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"set output\.dir to the folder"):
        acquire(None, "output.resume=true")
    assert acquire(None).folder.name.startswith("demo-20")


def test_another_dtype_is_refused_with_what_to_set(tmp_path: Path) -> None:
    begin(tmp_path / "runs" / "demo-7", FIRST)
    with pytest.raises(OutputError, match=r"'bfloat16' now.*set model\.dtype=float16"):
        acquire(AGAIN, **{"model.dtype": "bfloat16"})


def test_a_requeued_job_does_not_go_on_with_the_run_of_another(tmp_path: Path) -> None:
    begin(tmp_path / "x", SlurmJob("6", 0, None))
    with pytest.raises(OutputError, match="already holds a run"):
        acquire(AGAIN, "output.dir=x")
    assert acquire(AGAIN, "output.dir=x", "output.resume=true").is_resumed
    assert not acquire(AGAIN, "output.dir=x", "output.overwrite=true").is_resumed
    begin(tmp_path / "x", FIRST)
    assert acquire(AGAIN, "output.dir=x", "output.overwrite=true").is_resumed


# ---- one writer ----------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, FIRST)
    (tmp_path / "status.json").write_text('{"job_id": "7", "num_restarts": 0}')
    with pytest.raises(OutputError, match="another run of job 7 is writing"):
        acquire(None, f"output.dir={tmp_path}", "output.overwrite=true")
    lock_folder(tmp_path, AGAIN).close()  # the server of a lost node's files may still hold it
    first.close()
    acquire(None, f"output.dir={tmp_path}", "output.overwrite=true")


def test_a_run_that_is_refused_leaves_the_folder_to_others(tmp_path: Path) -> None:
    begin(tmp_path / "x", None)
    for _ in range(2):
        with pytest.raises(OutputError, match="already holds a run"):
            acquire(None, "output.dir=x")
    assert not (tmp_path / "x" / ".lock").exists()


def test_a_lock_that_was_removed_while_we_waited_is_taken_anew(tmp_path: Path) -> None:
    taken = []

    def take(descriptor: int, _: int) -> None:
        taken.append(os.fstat(descriptor).st_ino)
        if len(taken) == 1:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()

    lock_folder(tmp_path, None, take=take)
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("state", "age_s", "job", "free"),
    [
        ("generating", 5, None, False),
        ("generating", 5, FIRST, False),
        ("generating", 5, AGAIN, True),
        ("generating", 60, None, True),
        ("stopped", 5, None, True),
    ],
)
def test_where_there_are_no_locks_the_status_of_a_run_counts(
    state: str, age_s: float, job: SlurmJob | None, free: bool, tmp_path: Path
) -> None:
    def take(_: int, __: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    then = (NOW - timedelta(seconds=age_s)).isoformat()
    status = {"state": state, "updated_at": then, "job_id": "7", "num_restarts": 0}
    (tmp_path / "status.json").write_text(json.dumps(status))
    try:
        lock_folder(tmp_path, job, now=lambda: NOW, take=take).close()
    except OutputError:
        assert not free
    else:
        assert free


DEEP = b"[" * 100_000
ODD_STATUS = [
    b"", b"{", b"[]", b"1", b"null", b"\0\0", b"\xff", DEEP, b'{"state": []}', b'{"state": {}}',
    b'{"state": "generating"}', b'{"state": "generating", "updated_at": 7}',
    b'{"state": "generating", "updated_at": "yesterday"}',
    b'{"state": "generating", "updated_at": "2020-11-22T12:00:00"}',
    b'{"job_id": "7", "num_restarts": "0"}', b'{"job_id": ["7"], "num_restarts": null}',
    b'{"job_id": "7", "num_restarts": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("content", ODD_STATUS, ids=lambda content: repr(content[:60]))
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EAGAIN])
def test_a_status_of_odd_content_says_nothing(content: bytes, code: int, tmp_path: Path) -> None:
    def take(_: int, __: int) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "status.json").write_bytes(content)
    if code == errno.EAGAIN:  # the lock itself says that another run is there
        with pytest.raises(OutputError, match="another run"):
            lock_folder(tmp_path, SlurmJob("8", 1, None), now=lambda: NOW, take=take)
    else:
        lock_folder(tmp_path, AGAIN, now=lambda: NOW, take=take).close()


# ---- what lasts ----------------------------------------------------------------------------------


def completion(name: str) -> Completion:
    return Completion(
        request_id=name, index=0, text="", token_ids=(), finish_reason=FinishReason.LENGTH,
        num_prompt_tokens=1, queue_s=0.0, ttft_s=0.0, latency_s=0.0,
    )  # fmt: skip


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "x.json", list[tuple[str, bool]]()

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        seen.append((name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"{}", durable=False)
    assert seen == []
    path.unlink()
    write_whole(path, b"{}")
    assert seen == [("x.partial", False), (tmp_path.name, True)]


def test_completions_reach_the_disk_while_the_run_goes_on_and_no_step_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, allowed, threads = threading.Event(), threading.Event(), set[int]()

    def fsync(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            threads.add(threading.get_ident())
            begun.set()
            assert allowed.wait(20)

    monkeypatch.setattr(os, "fsync", fsync)
    with CompletionWriter(tmp_path, 0) as writer:
        writer.write(completion("a"))
        assert begun.wait(20)
        writer.write(completion("b"))  # while the disk is busy
        allowed.set()
    assert len(threads) == 1
    assert len((tmp_path / "completions_rank_0.jsonl").read_text().splitlines()) == 2


def test_a_disk_that_loses_completions_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        CompletionWriter(tmp_path, 0) as writer,
    ):
        writer.write(completion("a"))


def test_a_lock_lets_go_where_its_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    lock = lock_folder(tmp_path, None)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lost)
        lock.close()
    lock_folder(tmp_path, None).close()


def test_a_stop_may_still_come_when_all_is_written(tmp_path: Path) -> None:
    """Ranks are told to stop until they have left: it must not end a run that is done as a bug."""
    ignored = SimpleNamespace(info=lambda *_, **__: None, finished=lambda *_: None)
    told: list[str] = []
    job: Any = SimpleNamespace(
        acquired=Acquired(tmp_path, None, "0" * 12, 1), log=ignored, view=ignored,
        files=FileThread(),
        ranks=SimpleNamespace(stop=SimpleNamespace(reason="")), progress=ProgressFile(tmp_path),
    )  # fmt: skip
    requests = SimpleNamespace(num_failed=0, num_unfinished=0)
    summary: Any = SimpleNamespace(requests=requests, to_dict=dict)

    async def end() -> None:
        assert await report(job, summary) == 0
        job.files.post(lambda: told.append("stop"))
        await job.files.run(lambda: told.append("done"))

    asyncio.run(end())
    assert told == ["stop", "done"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_the_head_answers_while_it_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others who are told to stop meanwhile ask it, and take no answer for its death."""
    loop: asyncio.AbstractEventLoop
    answered, merging = threading.Event(), asyncio.Event()

    def merge(*_: object) -> None:
        loop.call_soon_threadsafe(merging.set)
        assert answered.wait(20), "the event loop waits for the files"

    async def answer() -> None:
        await merging.wait()
        answered.set()

    async def complete() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()

        async def generate(_: object) -> Any:
            for each in list[Completion]():
                yield each

        nothing = SimpleNamespace(
            mesh=SimpleNamespace(rank=0),
            tasks=asyncio,
            clock=MonotonicClock(),
            stop=SimpleNamespace(reason=""),
        )
        view = SimpleNamespace(generating=lambda *_: None, ended=lambda: None)
        session: Any = SimpleNamespace(ranks=nothing, generate=generate)
        job: Any = SimpleNamespace(
            acquired=Acquired(tmp_path, None, "0" * 12, 1), log=NullLog(), view=view,
            loaded=load_config(None, []), files=FileThread(), marks=SimpleNamespace(),
        )  # fmt: skip
        prompts: Any = SimpleNamespace(num_prompts=0, rejected=(), requests=())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answer())
            await generating.complete(job, session, prompts, {})

    async def idle(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(generating, "merge_completions", merge)
    monkeypatch.setattr(generating, "_tell", lambda *_: None)
    monkeypatch.setattr(generating, "_show", idle)
    asyncio.run(complete())
