"""A model on a hub: first its listing, then, where there is something to do, a `Source`.

Small files are fetched at once, weights one by one as they are written: so a copy needs its own
size and that of one file more. What has to be converted is fetched whole, and needs both sizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mpipipe.checkpoint.spec import read_spec
from mpipipe.errors import CheckpointError, MpipipeError
from mpipipe.staging.hub import HubAddress, HubListing, fetch_file, list_model
from mpipipe.staging.pieces import CopiedPiece
from mpipipe.staging.record import Conversion, SourceFile
from mpipipe.staging.source import Source, chosen_names, open_folder, open_gguf_file

__all__ = [
    "SOURCE_FOLDER",
    "HubModel",
    "fetched_bytes",
    "forget_fetched",
    "forgotten_if_refused",
    "list_hub",
    "open_hub",
    "weight_names",
]

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


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on a hub at one commit: what will be fetched of it, once it is."""

    address: HubAddress
    listing: HubListing
    conversion: Conversion
    small: tuple[str, ...]
    weights: tuple[str, ...]  # of one form, their index among them

    @property
    def is_converted(self) -> bool:
        """Whether it is fetched whole, then written anew."""
        changed = self.conversion.dtype or self.conversion.shard_bytes
        return bool(changed) or self.weights[0].endswith((".bin", ".gguf"))

    def needed_bytes(self, staged: Mapping[str, int]) -> int:
        """What fetch and copy still take together, where files of `staged` (sizes) are in place.

        Of a conversion as near as the listing tells, and not more than it takes.
        """
        sizes = {name: self.listing.files[name].num_bytes for name in (*self.small, *self.weights)}
        if self.is_converted:
            small = sum(sizes[name] for name in self.small)
            return sum(sizes.values()) + small + self._converted_bytes() - sum(staged.values())
        missing = [size for name, size in sizes.items() if name not in staged]
        return sum(missing) + max(missing, default=0)

    def _converted_bytes(self) -> int:
        """Of the weights as they will be."""
        stored = sum(self.listing.files[name].num_bytes for name in self.weights)
        item_bytes = {None: 0, "float32": 4}.get(self.conversion.dtype, 2)
        if item_bytes == 0:
            return stored
        if self.listing.num_parameters and not self.weights[0].endswith((".bin", ".gguf")):
            return self.listing.num_parameters * item_bytes
        return stored * item_bytes // 4  # its floats have 4 bytes at most


def list_hub(address: HubAddress, conversion: Conversion) -> HubModel:
    """The model at `address`; nothing is fetched.

    Raises:
        CheckpointError: no such model, or none that is read.
        EnvironmentSetupError: no network, or a package is missing.
    """
    listing = list_model(address)
    if address.file:
        if address.file not in listing.files:
            held = ", ".join(n for n in sorted(listing.files) if n.endswith(".gguf")) or "none"
            raise CheckpointError(
                f"there is no {address.file} in hf:{address.repo}; its GGUF files are: {held}"
            )
        return HubModel(address, listing, conversion, (), (address.file,))
    small, weights = chosen_names(listing.files), weight_names(listing.files)
    return HubModel(address, listing, conversion, small, weights)


def open_hub(model: HubModel, destination: Path, took: Callable[[int], object]) -> Source:
    """`model` as a source; small files, and what is converted, are fetched now.

    Raises:
        CheckpointError: not a whole model.
        UnsupportedModelError: not a model that runs here.
        EnvironmentSetupError: the network was lost, or a package is missing.
    """
    address, listing = model.address, model.listing
    folder = destination / SOURCE_FOLDER

    def fetch(name: str) -> Path:
        return fetch_file(address, listing.commit, name, folder, took)

    if not _fetched_names(folder) <= {*model.small, *model.weights}:
        forget_fetched(destination)  # of another model, or commit
    if address.file:
        return _open_gguf(model, fetch)
    for name in model.small:
        fetch(name)
    read_spec(folder)
    if not model.is_converted:
        return _fetched_late(model, fetch)
    for name in model.weights:
        fetch(name)
    told = {n: f.expected for n, f in listing.files.items() if f.expected is not None}
    source = open_folder(
        folder, model.conversion, described=address.described, revision=listing.commit, told=told
    )
    return replace(source, read=_read(listing, source.read))


def _fetched_names(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not path.parts[0].startswith(".")}


def _fetched_late(model: HubModel, fetch: Callable[[str], Path]) -> Source:
    """Files that are copied as they are: each is fetched when it is written, then forgotten."""
    listing, names = model.listing, (*model.small, *model.weights)

    def piece(name: str) -> CopiedPiece:
        file = listing.files[name]
        return CopiedPiece(
            name, file.num_bytes, lambda: fetch(name), file.expected, lambda path: path.unlink()
        )

    return Source(
        model.address.described,
        listing.commit,
        _read(listing, names),
        tuple(piece(name) for name in names),
        {},
        tuple(sorted(set(listing.files) - set(names))),
        is_fetched_late=True,
    )


def _open_gguf(model: HubModel, fetch: Callable[[str], Path]) -> Source:
    address, listing = model.address, model.listing
    source = open_gguf_file(
        fetch(address.file),
        model.conversion,
        described=address.described,
        revision=listing.commit,
        told=listing.files[address.file].expected,
    )
    hashed = dict.fromkeys([address.file], next(iter(source.hashed_first.values())))
    return replace(source, read=_read(listing, [address.file]), hashed_first=hashed)


def _read(listing: HubListing, names: Iterable[str]) -> dict[str, SourceFile]:
    """Of a hub's files only the sizes are known before they are read."""
    return {name: SourceFile(listing.files[name].num_bytes, 0) for name in names}


def fetched_bytes(destination: Path) -> int:
    """Of what an earlier attempt has fetched, and this one need not."""
    found = (destination / SOURCE_FOLDER).rglob("*")
    return sum(path.stat().st_size for path in found if path.is_file())


def forget_fetched(destination: Path) -> None:
    """Remove what was fetched, is in place by now, or will not be."""
    shutil.rmtree(destination / SOURCE_FOLDER, ignore_errors=True)


@contextmanager
def forgotten_if_refused(destination: Path, refusal: type[MpipipeError]) -> Iterator[None]:
    """A fetch that ends with `refusal` would not do the next time either: begin anew then."""
    try:
        yield
    except refusal:
        forget_fetched(destination)
        raise
