"""Which code runs: the commit of the source tree, or of what was installed from one."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from mpipipe.topology.command import Runner, output_of, run_child

__all__ = ["installed_commit", "source_commit", "tree_commit"]

_PACKAGE = "mpipipe"
_TREE = Path(__file__).parents[2]
_LIMIT_S = 5.0  # a tree on a busy file system


def source_commit() -> dict[str, Any] | None:
    """`commit` and `dirty` of the code that runs; None: of no known commit."""
    return tree_commit(_TREE) or installed_commit(_direct_url())


def tree_commit(tree: Path, run: Runner = run_child) -> dict[str, Any] | None:
    """Of the git work tree whose root is `tree`; dirty: a file that git knows was changed.

    None: it is none, or there is no git to ask.
    """
    if not (tree / ".git").exists():  # of a work tree beside the first one it is a file
        return None
    commit = output_of(run, ("git", "-C", str(tree), "rev-parse", "HEAD"), _LIMIT_S)
    if commit is None:
        return None
    status = ("git", "-C", str(tree), "status", "--porcelain", "--untracked-files=no")
    changed = output_of(run, status, _LIMIT_S)
    return {"commit": commit.strip(), "dirty": None if changed is None else bool(changed.strip())}


def installed_commit(direct_url: str) -> dict[str, Any] | None:
    """Of a package that pip has installed from a git URL, as its `direct_url.json` tells (PEP 610).

    None: it came from an index, a folder, or nothing tells.
    """
    try:
        told = json.loads(direct_url)
        return {"commit": str(told["vcs_info"]["commit_id"]), "dirty": False}
    except (ValueError, KeyError, TypeError):
        return None


def _direct_url() -> str:
    try:
        return metadata.distribution(_PACKAGE).read_text("direct_url.json") or ""
    except metadata.PackageNotFoundError:
        return ""
