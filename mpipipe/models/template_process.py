"""The process that renders chat templates: `python -m mpipipe.models.template_process`.

A template is code of the model's author, and the messages are the user's: together they can loop
for ever, take all memory, or crash the interpreter, also inside one call into C that no exception
interrupts. So they run here, where the kernel's limits hold, and never in a rank.

One line of JSON in, `{"template", "messages", "options"}`, one line out, `{"text"}` or `{"error"}`.
First line in: the limits; first line out: `{"ready": true}`. A rendering that takes more than its
processor time is ended by SIGPROF, and this process with it; one that takes too much memory gets a
MemoryError. The end of the input ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from mpipipe.models.foreign import in_short

__all__ = ["main"]

_PAGE_BYTES = resource.getpagesize()


def main() -> None:
    """Serve until the input ends."""
    _settle_signals()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from transformers.utils.chat_template_utils import render_jinja_template

    limits = json.loads(sys.stdin.readline())
    _limit_memory(limits["memory_bytes"])
    _answer({"ready": True})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limits["cpu_s"])
        try:
            answer = _render(render_jinja_template, line, limits["max_characters"])
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except BaseException as error:  # noqa: BLE001 - a template may raise anything
            answer = {"error": in_short(error)}
        _answer(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _settle_signals() -> None:
    """What ends the ranks is not meant for this process, which ends with its input."""
    for number in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, number), signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _limit_memory(memory_bytes: int) -> None:
    """Allow so much beside what Python and its modules take already."""
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * _PAGE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + memory_bytes
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _render(render: Any, line: str, max_characters: int) -> dict[str, str]:
    asked = json.loads(line)
    rendered, _ = render(
        conversations=[asked["messages"]], chat_template=asked["template"], **asked["options"]
    )
    text = rendered[0]
    # What a template makes of a large conversation is large; of a small one it is not.
    allowed = max_characters + 8 * len(line)
    if len(text) > allowed:
        return {"error": f"it made a text of {len(text)} characters, more than {allowed}"}
    return {"text": text}


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
