"""One cluster for the whole suite; the stories of the chosen tests start at once, side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import demo_model, tiny_model
from tests.slurm.cluster import Cluster
from tests.slurm.held import prepare
from tests.slurm.packages import ClusterUnavailableError
from tests.slurm.scenarios import TINY_PROMPTS
from tests.slurm.site import Site, installations

__all__ = ["demo_model", "tiny_model"]

SIDE_BY_SIDE = 6
LONGEST = ("demo_in_image", "experiment")  # these begin first
STORY_LIMIT_S = 1500
RESTARTS = pytest.StashKey[list[str]]()
TIMES = pytest.StashKey[list[str]]()

Story = Callable[..., Any]


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker."""
    config.addinivalue_line("markers", "story(function, *arguments): what the test looks at")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A limit for stories that run beside other suites.

    MPIPIPE_SLURM_TESTS=off: for machines that cannot have the cluster, and only by choice.
    """
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.timeout(STORY_LIMIT_S + 60))
        if os.environ.get("MPIPIPE_SLURM_TESTS") == "off":
            item.add_marker(pytest.mark.skip(reason="MPIPIPE_SLURM_TESTS=off"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what the cluster's caretaker did."""
    for text in terminalreporter.config.stash.get(RESTARTS, []):
        terminalreporter.write_sep("=", "a node of the cluster was restarted")
        terminalreporter.write_line(text)
    if times := terminalreporter.config.stash.get(TIMES, []):
        terminalreporter.write_sep("=", "seconds from when to when a story took")
        for text in times:
            terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The running cluster; the suite fails, and does not skip, where it does not come up."""
    cluster = Cluster()
    request.config.stash[RESTARTS] = cluster.restarts
    try:
        try:
            cluster.open()
        except ClusterUnavailableError as error:
            pytest.fail(str(error), pytrace=False)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def site(
    cluster: Cluster,
    demo_model: Path,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Site:
    """A user's account: installations, models, a job that takes some seconds."""
    folder = tmp_path_factory.mktemp("site")
    prompts = folder / "prompts.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"{i} is"} for i in range(TINY_PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "tiny.toml"
    config.write_text(
        f'model.path = "{tiny_model}"\nprompts.path = "{prompts}"\nmodel.dtype = "float32"\n'
        "generation.max_new_tokens = 48\ngeneration.ignore_eos = true\n"
        "pipeline.threads_per_rank = 1\npipeline.max_sequences_per_slot = 1\n"
        "memory.num_kv_pages = 64\n"
    )
    prepare(folder / "held")
    return Site(cluster, installations(folder), folder, config)


class Stories:
    """Stories that were started, each once, and how they ended."""

    def __init__(self, pool: ThreadPoolExecutor, site: Site, times: list[str]) -> None:
        self._pool = pool
        self._site = site
        self._times = times
        self._began_s = time.monotonic()
        self._started: dict[tuple[Any, ...], Future[Any]] = {}

    def start(self, story: Story, *arguments: str) -> Future[Any]:
        """The running or ended story; started unless it was."""
        key = (story, *arguments)
        if key not in self._started:
            self._started[key] = self._pool.submit(self._live, story, *arguments)
        return self._started[key]

    def _live(self, story: Story, *arguments: str) -> Any:
        begin_s = time.monotonic() - self._began_s
        try:
            return story(self._site, *arguments)
        finally:
            end_s = time.monotonic() - self._began_s
            name = " ".join((story.__name__, *arguments))
            self._times.append(f"{begin_s:6.1f} {end_s:6.1f}  {name}")

    def end_of(self, story: Story, *arguments: str) -> Any:
        """How it ended; an assertion that failed on the way is raised here."""
        return self.start(story, *arguments).result(timeout=STORY_LIMIT_S)


@pytest.fixture(scope="session")
def stories(request: pytest.FixtureRequest, site: Site) -> Iterator[Stories]:
    """The stories of all chosen tests: the longest begin, then the tests' order."""
    pool = ThreadPoolExecutor(SIDE_BY_SIDE)
    times: list[str] = []
    request.config.stash[TIMES] = times
    stories = Stories(pool, site, times)
    marked = [item.get_closest_marker("story") for item in request.session.items]
    chosen = [marker.args for marker in marked if marker is not None]
    for story in sorted(chosen, key=lambda story: story[0].__name__ not in LONGEST):
        stories.start(*story)
    yield stories
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def end(request: pytest.FixtureRequest, stories: Stories) -> Any:
    """How the test's story ended."""
    return stories.end_of(*request.node.get_closest_marker("story").args)


@pytest.fixture(scope="session")
def told(stories: Stories) -> Callable[..., Any]:
    """How another story ended, to compare with."""
    return stories.end_of
