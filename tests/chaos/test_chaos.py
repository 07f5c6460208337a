"""The short form for CI: each kind of blow once or so, on two and on three ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import prepare, run_points
from tests.chaos.chain import Job, reference

NUM_PROMPTS = 60
# A machine of two cores that is busy with other tests must not look like a frozen rank.
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return prepare(folder, num_prompts=NUM_PROMPTS, seed=1, deadline_s=DEADLINE_S)


@pytest.fixture(scope="module")
def right(job: Job) -> dict[str, list[int]]:
    """The tokens of a run that nothing is done to."""
    return reference(job, job.config.with_name("reference"))


@pytest.mark.timeout(1500)  # twelve starts at most, each with limits of its own
@pytest.mark.parametrize(
    ("num_ranks", "kinds"),
    [
        (2, ("kill", "stop-rank", "freeze", "kill-launcher")),
        (3, ("pause", "kill-supervisor", "kill-proxy", "ctrl-c")),
    ],
)
def test_nothing_is_lost_doubled_or_different(
    num_ranks: int,
    kinds: tuple[str, ...],
    job: Job,
    right: dict[str, list[int]],
    tmp_path: Path,
) -> None:
    points = list(run_points(job, tmp_path, right, kinds, [num_ranks], seed=1))
    assert not [f"{point.line()}\n{point.end.output}" for point in points if point.faults]
    dealt = [point.blow.kind for point in points if point.blow is not None and point.dealt]
    assert dealt == list(kinds), "every blow has met its run"
