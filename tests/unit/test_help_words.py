"""What `--help` prints is what the commands say of themselves."""

from __future__ import annotations

from collections.abc import Iterator

import typer.main
from rich.text import Text

from mpipipe.cli.main import app


def helps(command: object, path: str = "mpipipe") -> Iterator[tuple[str, str]]:
    """Names and texts of the command, its options and arguments, and those below it."""
    for part in (command, *getattr(command, "params", ())):
        name = path if part is command else f"{path} {getattr(part, 'name', '')}"
        yield name, getattr(part, "help", None) or ""
    for name, below in getattr(command, "commands", {}).items():
        yield from helps(below, f"{path} {name}")


def test_no_word_of_a_help_is_taken_for_markup() -> None:
    """Typer hands help texts to Rich, which leaves out `[what looks like a tag]`."""
    told = dict(helps(typer.main.get_command(app)))
    assert {"mpipipe run", "mpipipe bench throughput work", "mpipipe logs tail"} <= set(told)
    assert {name: Text.from_markup(text).plain for name, text in told.items()} == told
