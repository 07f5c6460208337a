"""Fetching from a model hub, on a machine that has a network: the only place that does.

`huggingface_hub` downloads, goes on with what was broken off, and knows the user's token. Names and
hashes come from the hub's own listing, at one commit, whatever happens to the branch meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.errors import CheckpointError, EnvironmentSetupError, MpipipeError, OutputError
from mpipipe.staging.expected import ExpectedHash

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["HubAddress", "HubFile", "HubListing", "fetch_file", "list_model"]

PREFIX = "hf:"
_ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[^@\s]+))?"
)


@dataclass(frozen=True, slots=True)
class HubAddress:
    """`hf:org/name`, with `/file.gguf` where one file is meant, and `@revision`."""

    repo: str
    file: str = ""
    revision: str = ""  # branch, tag or commit; empty: the default branch

    @property
    def described(self) -> str:
        """Without the revision."""
        return f"{PREFIX}{self.repo}" + (f"/{self.file}" if self.file else "")

    @classmethod
    def parse(cls, text: str) -> HubAddress | None:
        """None: `text` is a path.

        Raises:
            CheckpointError: it begins as an address and is none.
        """
        if not text.startswith(PREFIX):
            return None
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise CheckpointError(
                f"{text!r} is not the address of a model: hf:ORG/NAME, hf:ORG/NAME@REVISION, or "
                "hf:ORG/NAME/FILE.gguf"
            )
        return cls(match["repo"], match["file"] or "", match["revision"] or "")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository."""

    num_bytes: int
    expected: ExpectedHash | None


@dataclass(frozen=True, slots=True)
class HubListing:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, HubFile]
    num_parameters: int = 0  # of its safetensors files; 0: the hub does not tell


def list_model(address: HubAddress) -> HubListing:
    """What the repository holds.

    Raises:
        CheckpointError: there is no such model or revision, or it may not be read.
        EnvironmentSetupError: no network, or `huggingface_hub` is not installed.
    """
    hub = _hub()
    with _told(address):
        found = hub.HfApi().model_info(
            address.repo, revision=address.revision or None, files_metadata=True
        )
    files = {sibling.rfilename: _file(sibling) for sibling in found.siblings or ()}
    told = getattr(found, "safetensors", None)
    return HubListing(str(found.sha), files, int(told.total) if told is not None else 0)


def _file(sibling: Any) -> HubFile:
    lfs = sibling.lfs
    if lfs is not None:
        return HubFile(int(lfs.size), ExpectedHash("sha256", str(lfs.sha256), "the hub"))
    expected = ExpectedHash("git", str(sibling.blob_id), "the hub") if sibling.blob_id else None
    return HubFile(int(sibling.size or 0), expected)


def fetch_file(
    address: HubAddress, commit: str, name: str, folder: Path, took: Callable[[int], object]
) -> Path:
    """Bring one file into `folder`, or go on with it; `took` hears of the bytes, and may raise.

    Raises:
        CheckpointError: the hub does not give it.
        EnvironmentSetupError: the network was lost.
        OutputError: it cannot be written.
    """
    hub = _hub()
    with _told(address):
        path = hub.hf_hub_download(
            address.repo, name, revision=commit, local_dir=folder, tqdm_class=_counter(took)
        )
    return Path(path)


def _counter(took: Callable[[int], object]) -> type[Any]:
    """A progress bar, as the library wants one, that only counts."""
    from tqdm.std import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*arguments, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            took(int(n or 0))

    return Counter


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise EnvironmentSetupError(
            "models are fetched with the package `huggingface_hub`, which is not installed: "
            "pip install 'mpipipe[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _told(address: HubAddress) -> Iterator[None]:
    """What the library raises becomes a sentence."""
    from huggingface_hub import errors

    at = f"@{address.revision}" if address.revision else ""
    try:
        yield
    except MpipipeError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{address.described} asks for its terms to be accepted: do so on its page, then "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"the hub has no {address.described}{at}, or shows it to members only: check name "
            "and revision; for a private model `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise EnvironmentSetupError(
            "HF_HUB_OFFLINE is set, so nothing is fetched: unset it for this command, on a "
            "machine that has a network"
        ) from error
    except Exception as error:  # HTTP libraries raise classes of their own
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise OutputError(
                f"{error.filename} could not be written ({error.strerror}): free space there, or "
                "mend its rights, and give the same command again"
            ) from error
        raise EnvironmentSetupError(
            f"{address.described} could not be fetched ({type(error).__name__}: {error}): is there "
            "a network here? What was fetched is kept: give the same command again"
        ) from error
