"""A model on a hub as a `Source`: small files at once, weights one by one as they are written.

So a copy needs its own size and that of one file more. What has to be converted is fetched whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import CheckpointError
from mpipipe.staging.hub import HubAddress, HubListing, fetch_file, list_model
from mpipipe.staging.pieces import CopiedPiece
from mpipipe.staging.record import Conversion, SourceFile
from mpipipe.staging.source import Source, chosen_names, open_folder, open_gguf_file

__all__ = ["SOURCE_FOLDER", "forget_fetched", "open_hub", "weight_names"]

SOURCE_FOLDER = ".mpipipe-source"  # in the destination: what was fetched and is not in place yet
_FORMS = (
    ("model.safetensors", "model", ".safetensors"),
    ("pytorch_model.bin", "pytorch_model", ".bin"),
)


def weight_names(names: Iterable[str]) -> tuple[str, ...]:
    """Of a repository's files the weights of one form, in the order of `checkpoint/index.py`.

    Raises:
        CheckpointError: it has none that are read.
    """
    names = sorted(names)
    for alone, stem, suffix in _FORMS:
        if alone in names:
            return (alone,)
        if f"{alone}.index.json" in names:
            shards = [n for n in names if n.startswith(f"{stem}-") and n.endswith(suffix)]
            return (*shards, f"{alone}.index.json")
    gguf = [name for name in names if name.endswith(".gguf")]
    hint = f"; of its GGUF files name one: …/{gguf[0]}" if gguf else ""
    raise CheckpointError(
        "the repository has no model.safetensors, pytorch_model.bin, or shards of them with "
        f"their index{hint}"
    )


def open_hub(
    address: HubAddress, conversion: Conversion, destination: Path, took: Callable[[int], object]
) -> Source:
    """The model at `address`; small files, and what is converted, are fetched now.

    Raises:
        CheckpointError: no such model, or not a whole one.
        UnsupportedModelError: not a model that runs here.
        EnvironmentSetupError: no network, or a package is missing.
    """
    listing = list_model(address)
    folder = destination / SOURCE_FOLDER

    def fetch(name: str) -> Path:
        return fetch_file(address, listing.commit, name, folder, took)

    if address.file:
        return _open_gguf(address, listing, conversion, fetch)
    weights = weight_names(listing.files)
    small = chosen_names(listing.files)
    for name in small:
        fetch(name)
    read_spec(folder)
    told = {n: f.expected for n, f in listing.files.items() if f.expected is not None}
    if conversion.dtype or conversion.shard_bytes or weights[0].endswith(".bin"):
        for name in weights:
            fetch(name)
        source = open_folder(
            folder, conversion, described=address.described, revision=listing.commit, told=told
        )
        return replace(source, read=_read(listing, source.read))

    return _fetched_late(address, listing, (*small, *weights), fetch)


def _fetched_late(
    address: HubAddress,
    listing: HubListing,
    names: Sequence[str],
    fetch: Callable[[str], Path],
) -> Source:
    """Files that are copied as they are: each is fetched when it is written, then forgotten."""

    def piece(name: str) -> CopiedPiece:
        file = listing.files[name]
        return CopiedPiece(
            name, file.num_bytes, lambda: fetch(name), file.expected, lambda path: path.unlink()
        )

    return Source(
        address.described,
        listing.commit,
        _read(listing, names),
        tuple(piece(name) for name in names),
        {},
        tuple(sorted(set(listing.files) - set(names))),
        is_fetched_late=True,
    )


def _open_gguf(
    address: HubAddress,
    listing: HubListing,
    conversion: Conversion,
    fetch: Callable[[str], Path],
) -> Source:
    if address.file not in listing.files:
        held = ", ".join(n for n in sorted(listing.files) if n.endswith(".gguf")) or "none"
        raise CheckpointError(
            f"there is no {address.file} in hf:{address.repo}; its GGUF files are: {held}"
        )
    source = open_gguf_file(
        fetch(address.file),
        conversion,
        described=address.described,
        revision=listing.commit,
        told=listing.files[address.file].expected,
    )
    hashed = dict.fromkeys([address.file], next(iter(source.hashed_first.values())))
    return replace(source, read=_read(listing, [address.file]), hashed_first=hashed)


def _read(listing: HubListing, names: Iterable[str]) -> dict[str, SourceFile]:
    """Of a hub's files only the sizes are known before they are read."""
    return {name: SourceFile(listing.files[name].num_bytes, 0) for name in names}


def forget_fetched(destination: Path) -> None:
    """Remove what was fetched and is in place by now."""
    shutil.rmtree(destination / SOURCE_FOLDER, ignore_errors=True)
