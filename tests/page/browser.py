"""Headless Chromium, run once per page: what it logs, asks the network for, and lays out.

`python -m tests.page.browser` installs it on Debian as root, where it is missing; the tests
themselves install nothing, and fail without it.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.slurm.packages import ClusterUnavailableError, install_programs

__all__ = ["Visit", "lay_out", "visit"]

LIMIT_S = 150
LEFT_OUT_WITH = "MPIPIPE_PAGE_TESTS=off"
# Runs in a copy of the page: sizes of what could stick out, and where each text of a plot is.
_SCRIPT = """
<script>
const box = (e) => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom]; };
const measured = {
  page: [document.documentElement.scrollWidth, window.innerWidth],
  scrolled: [...document.querySelectorAll(".scroll")].map((e) => [e.scrollWidth, e.clientWidth]),
  ink: getComputedStyle(document.querySelector("svg")).color,
  plots: [...document.querySelectorAll("svg")].map((e) => ({
    title: e.querySelector("title").textContent, box: box(e),
    texts: [...e.querySelectorAll("g[id*='-text_']")].map(box),
  })),
};
const result = document.createElement("script");
result.type = "application/json"; result.id = "measured";
result.textContent = JSON.stringify(measured);
document.body.appendChild(result);
</script>
"""


class Visit:
    """What a browser did with a page."""

    def __init__(self, console: Sequence[str], requests: Sequence[str], dom: str) -> None:
        self.console = console
        self.requests = requests  # of the page, not of the browser for itself
        self.dom = dom


def visit(page: Path, scratch: Path) -> Visit:
    """Open a page as it is."""
    log = scratch / "net.json"
    log.unlink(missing_ok=True)
    ended = _run(page, scratch, [f"--log-net-log={log}", "--net-log-capture-mode=Everything"])
    console = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
    return Visit(console, _requests(log), ended.stdout)


def lay_out(page: Path, scratch: Path, *, width: int = 1280, dark: bool = False) -> dict[str, Any]:
    """Sizes and places of what is on the page, in a window of `width` pixels."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy = scratch / "measured.html"
    copy.write_text(text.replace("</body>", f"{_SCRIPT}</body>"), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = _run(copy, scratch, [f"--window-size={width},900", scheme]).stdout
    found = re.search(r'id="measured">(.*?)</script>', dom)
    assert found is not None, dom[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def _run(page: Path, scratch: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium")
    assert program is not None, (
        "there is no chromium: run `python -m tests.page.browser` as root on Debian, or leave the "
        f"suite out with {LEFT_OUT_WITH}"
    )
    profile = scratch / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=2000",
        *words, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(
        command,
        env={**os.environ, "HOME": str(scratch)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )


def _requests(log: Path) -> list[str]:
    """URLs that the page asked for, its own file apart; the browser's own have no origin."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params") or {} for event in events]
    return [
        found["url"]
        for found in asked
        if "url" in found and found.get("initiator", "not an origin") != "not an origin"
    ]


if __name__ == "__main__":
    try:
        install_programs({"chromium": "chromium"}, f"leave the suite out with {LEFT_OUT_WITH}")
    except ClusterUnavailableError as error:
        sys.exit(str(error))
