"""The life of a job: told to stop, requeued, a node or a rank lost, arrays; what status says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from mpipipe.errors import EXIT_PEER_LOST
from tests.slurm.scenarios import (
    ARRAY_PROMPTS,
    SEEN,
    TINY_PROMPTS,
    admin_requeue,
    array,
    held_in_the_queue,
    near_its_wall_time,
    node_loses_power,
    rank_killed,
    rank_killed_under_plain_srun,
    tiny_alone,
    told_to_stop,
)
from tests.slurm.site import JobEnd, read_jsonl

story = pytest.mark.story.with_args  # a marker with one function would decorate it


@story(tiny_alone)
def test_one_process_completes_the_tiny_job(end: dict[str, list[int]]) -> None:
    assert len(end) == TINY_PROMPTS


def check_it_went_on(end: JobEnd, alone: dict[str, list[int]], restarts: int = 1) -> None:
    """Ended well after so many restarts: nothing lost, nothing twice, what was first is kept."""
    assert end.state == "COMPLETED", end.log
    assert end.fields["Restarts"] == str(restarts)
    completions = end.completions()
    assert [record["id"] for record in completions] == list(alone)
    assert end.tokens() == alone
    first = end.observed["first"]
    assert SEEN <= len(first) < TINY_PROMPTS
    # The very lines of the first attempt, not the same prompts run again: times are never equal.
    for record in first:
        assert record in completions
    assert all(f"attempt {number + 1}" in end.log for number in range(restarts + 1))


@story(told_to_stop)
def test_a_job_near_its_wall_time_drains_goes_back_into_the_queue_and_completes(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    check_it_went_on(end, told(tiny_alone))
    assert "goes back into the queue" in end.log


@story(told_to_stop)
def test_status_follows_a_job_from_the_login_node(end: JobEnd) -> None:
    document = json.loads(end.observed["while_running"])
    assert [job["state"] for job in document["jobs"]] == ["RUNNING"]
    assert document["runs"][0]["status"]["state"] == "generating"
    assert document["runs"][0]["status"]["num_prompts"] == TINY_PROMPTS
    assert f"{TINY_PROMPTS} of {TINY_PROMPTS}" in end.observed["after"]


@story(held_in_the_queue)
def test_status_says_why_a_job_waits(end: subprocess.CompletedProcess[str]) -> None:
    assert end.returncode == 0, end.stderr
    assert "PENDING (JobHeldUser)" in end.stdout


@story(admin_requeue)
def test_a_requeued_job_goes_on_where_it_was(end: JobEnd, told: Callable[..., Any]) -> None:
    check_it_went_on(end, told(tiny_alone))


@story(node_loses_power)
def test_a_job_whose_node_died_goes_on_on_other_nodes(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    check_it_went_on(end, told(tiny_alone))
    assert end.observed["victim"] not in end.fields["NodeList"]


@story(rank_killed)
def test_a_killed_rank_ends_the_job_soon_and_its_output_is_whole(end: JobEnd) -> None:
    assert end.state == "FAILED", end.log
    assert end.fields["Restarts"] == "0"
    assert len(end.observed["ranks"]) == 1
    assert end.observed["took_s"] < 100  # without the 600 s of a silence
    for path in (end.folder / "outputs").glob("completions_rank_*.jsonl"):
        assert len(read_jsonl(path)) >= SEEN


@story(rank_killed)
def test_the_folder_of_a_failed_job_is_all_that_another_job_needs_to_go_on(
    end: JobEnd, told: Callable[..., Any]
) -> None:
    other = end.observed["continued"]
    check_it_went_on(other, told(tiny_alone), restarts=0)
    assert other.job_id != end.job_id
    assert "Going on in" in other.log


@story(rank_killed_under_plain_srun)
def test_a_killed_rank_ends_the_job_also_where_srun_does_not(
    end: tuple[int, str, float],
) -> None:
    code, said, took_s = end
    assert code in {EXIT_PEER_LOST, 128 + signal.SIGKILL}, said  # srun tells the largest code
    assert re.search(r"rank 1 on n4\b.* was killed by SIGKILL", said), said
    assert took_s < 90  # a silence of 10 s, then Slurm's KillWait; 31 s were seen on a busy machine


@story(near_its_wall_time)
def test_slurms_own_signal_before_the_wall_time_stops_a_job_in_order(end: str) -> None:
    assert "(SIGUSR1" in end
    assert "DUE TO TIME LIMIT" not in end


@story(array)
def test_tasks_of_an_array_keep_apart_also_when_one_is_put_back_into_the_queue(
    end: list[JobEnd], told: Callable[..., Any]
) -> None:
    alone = dict(list(told(tiny_alone).items())[:ARRAY_PROMPTS])
    assert [task.state for task in end] == ["COMPLETED"] * 2, end[0].log
    assert end[0].folder != end[1].folder
    for number, task in enumerate(end):
        assert task.tokens() == alone, "greedy: the seed changes nothing"
        assert task.fields["Restarts"] == str(int(task.observed["told"])), task.log
        assert f"generation.seed={number}" in (task.folder / "job.env").read_text()
