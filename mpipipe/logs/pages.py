"""The pages and the lnav format that come with the package."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["FILES_PAGE", "LNAV_FORMAT", "QUESTIONS_PAGE", "page"]

FILES_PAGE = "FILES.md"
QUESTIONS_PAGE = "QUESTIONS.md"
LNAV_FORMAT = "mpipipe.lnav.json"


def page(name: str) -> str:
    """The text of one of them."""
    return files("mpipipe.logs").joinpath(name).read_text("utf-8")
