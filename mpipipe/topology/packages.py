"""Which versions of Python packages are installed; nothing is imported to find out."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

__all__ = ["package_versions"]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each of `packages`, by the name it is installed under; None: it is not."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
