"""What of a model's files is staged: the choice by name, and the pieces that it becomes.

Everything that decides a completion comes along, and the licence. Weights come in one form: the
safetensors files where there are some. What is left out is told, so that nothing is missed later.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.fingerprint import CODE_FILES, TEMPLATE_FILES, TOKENIZER_FILES
from mpipipe.checkpoint.index import SAFETENSORS, TORCH, CheckpointIndex, read_index
from mpipipe.checkpoint.jsonfile import read_json_object
from mpipipe.checkpoint.spec import read_spec
from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME
from mpipipe.errors import CheckpointError
from mpipipe.staging.expected import SUMS_NAME, ExpectedHash, expected_hashes, lost_files
from mpipipe.staging.layout import TensorPlan, index_of, lay_out
from mpipipe.staging.pieces import BuiltPiece, CopiedPiece, MadePiece, Piece
from mpipipe.staging.record import Conversion, SourceFile
from mpipipe.staging.tensors import GgufReader, IndexReader, TensorReader

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "Source",
    "chosen_names",
    "is_weights",
    "open_folder",
    "open_gguf_file",
    "source_file",
    "with_tokenizer",
]

DEFAULT_SHARD_BYTES = 5 * 10**9
CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
_WORDS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README*")
_SETTINGS = ("*.json",)
_TOKENIZER = (*TOKENIZER_FILES, *TEMPLATE_FILES)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx",
            "*.ot", "*.npz", "*.index.json")  # fmt: skip
_WEIGHT_NAMES = {
    SAFETENSORS: ("model.safetensors", "model.safetensors.index.json"),
    TORCH: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
_OWN = (MANIFEST_NAME, UNFINISHED_NAME, SUMS_NAME)


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be staged."""

    described: str  # path, or hf:org/name
    revision: str  # commit on the hub; empty: a path
    read: Mapping[str, SourceFile]  # every file that is read, by its name
    pieces: tuple[Piece, ...]  # small ones first, then weights, the index of shards last
    hashed_first: Mapping[str, tuple[Path, ExpectedHash | None]]  # what conversions read
    left_out: tuple[str, ...] = ()
    reader: TensorReader | None = None  # of a conversion
    is_fetched_late: bool = False  # each piece comes over the network when it is written


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights in some form, or lists such files."""
    return _matches(name, _WEIGHTS)


def chosen_names(names: Iterable[str]) -> tuple[str, ...]:
    """Of a folder's files those that come along, weights apart; sorted."""
    patterns = (*_SETTINGS, *_TOKENIZER, *CODE_FILES, *_WORDS)
    return tuple(
        sorted(
            name
            for name in names
            if _matches(name, patterns) and not is_weights(name) and name not in _OWN
        )
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def source_file(path: Path) -> SourceFile:
    """Size and time of `path`.

    Raises:
        CheckpointError: it cannot be looked at.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    return SourceFile(stat.st_size, stat.st_mtime_ns)


def open_folder(
    folder: Path,
    conversion: Conversion,
    *,
    described: str = "",
    revision: str = "",
    told: Mapping[str, ExpectedHash] | None = None,
) -> Source:
    """The model in `folder`, checked for completeness.

    Args:
        folder: a model as transformers writes it.
        conversion: how its weights are changed.
        described: where it comes from, if not from this folder.
        revision: of what it comes from.
        told: hashes that are known besides those that the folder tells.

    Raises:
        CheckpointError: no model, a file missing, cut off or damaged.
        UnsupportedModelError: not a model that runs here.
    """
    spec = read_spec(folder)
    index = read_index(folder)
    elsewhere = () if conversion.tokenizer is None else _TOKENIZER
    _require_arrived(folder, lambda name: not _matches(name, elsewhere))
    expected = {**expected_hashes(folder), **(told or {})}
    names = _files_below(folder)
    copied = chosen_names(names)
    weights = (*(path.name for path in index.files), *_listing(index))
    converted = index.format != SAFETENSORS or conversion.dtype or conversion.shard_bytes
    reader: TensorReader | None = None
    if converted:
        reader = IndexReader(index, is_tied=spec.tied_embeddings)
        built = _built(reader, conversion)
        config = _with_dtype(folder / CONFIG_NAME, conversion.dtype)
        small = _copies(folder, [n for n in copied if n not in config], expected)
        pieces = [*_made(config), *small, *built]
    else:
        pieces = _copies(folder, [*copied, *weights], expected)
    read = {name: source_file(folder / name) for name in (*copied, *weights)}
    first = [CONFIG_NAME, *weights] if converted else []
    return Source(
        described or str(folder.absolute()),
        revision,
        read,
        tuple(pieces),
        {name: (folder / name, expected.get(name)) for name in first},
        tuple(sorted(set(names) - set(read) - set(_OWN))),
        reader,
    )


def _require_arrived(folder: Path, is_read: Callable[[str], bool]) -> None:
    """Raises CheckpointError where a file that comes along is listed and not there.

    Weights apart, for which `read_index` looks.
    """
    told = lost_files(folder)
    lost = [name for name in chosen_names(told) if is_read(name)]
    if lost:
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        raise CheckpointError(
            f"{folder} lacks {shown}, which {told[lost[0]]} lists: bring it along, or take it off "
            "that list where the model is to be staged without it"
        )


def _listing(index: CheckpointIndex) -> tuple[str, ...]:
    """The file that says which shard holds what, where the model is in shards."""
    alone, listing = _WEIGHT_NAMES[index.format]
    return () if index.files[0].name == alone else (listing,)


def _files_below(folder: Path) -> list[str]:
    """Names of the files of `folder`, of subfolders those that templates may be in; no hidden."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    deeper = [path for pattern in TEMPLATE_FILES for path in folder.glob(pattern)]
    paths = {path for path in (*found, *deeper) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _copies(
    folder: Path, names: Iterable[str], expected: Mapping[str, ExpectedHash]
) -> list[Piece]:
    return [
        CopiedPiece(
            name, source_file(folder / name).num_bytes, _at(folder / name), expected.get(name)
        )
        for name in names
    ]


def _at(path: Path) -> Callable[[], Path]:
    return lambda: path


def _made(contents: Mapping[str, bytes]) -> list[Piece]:
    return [MadePiece(name, content) for name, content in contents.items()]


def _built(reader: TensorReader, conversion: Conversion) -> list[Piece]:
    tensors: Sequence[TensorPlan] = reader.plans(conversion.dtype)
    shards = lay_out(tensors, conversion.shard_bytes or DEFAULT_SHARD_BYTES)
    built: list[Piece] = [BuiltPiece(shard, reader) for shard in shards]
    return [*built, *_made(index_of(shards))]


def _with_dtype(path: Path, dtype: str | None) -> dict[str, bytes]:
    """config.json that states the type of converted weights; none: it is copied."""
    if dtype is None:
        return {}
    config = read_json_object(path)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{path.parent} holds quantised weights, whose types belong to their scheme: stage it "
            "without --dtype"
        )
    inner = config.get("text_config")
    for part in (config, inner):
        if isinstance(part, dict) and (part is config or {"dtype", "torch_dtype"} & part.keys()):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    return {path.name: _json(config)}


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


# ---- GGUF ----------------------------------------------------------------------------------------


def open_gguf_file(
    path: Path,
    conversion: Conversion,
    *,
    described: str = "",
    revision: str = "",
    told: ExpectedHash | None = None,
) -> Source:
    """The model in a GGUF file: decoded weights, its config, its tokenizer.

    Raises:
        CheckpointError: no GGUF file, cut off or damaged.
        UnsupportedModelError: an architecture, setting or tokenizer that has no place.
        EnvironmentSetupError: the package `gguf` is not installed.
    """
    from mpipipe.gguf_model import open_gguf, tokenizer_files

    model = open_gguf(path)
    reader = GgufReader(model)
    config = {**model.config, "dtype": conversion.dtype or model.dtype}
    _require_runnable(config)
    made = {CONFIG_NAME: _json(config), GENERATION_NAME: _json(model.generation_config)}
    if conversion.tokenizer is None:
        made |= tokenizer_files(model)
    expected = told or expected_hashes(path.parent).get(path.name)
    return Source(
        described or str(path.absolute()),
        revision,
        {path.name: source_file(path)},
        (*_made(made), *_built(reader, conversion)),
        {path.name: (path, expected)},
        (),
        reader,
    )


def _require_runnable(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError for a model that cannot be split into stages."""
    with tempfile.TemporaryDirectory(prefix="mpipipe-config-") as folder:
        (Path(folder) / CONFIG_NAME).write_bytes(_json(config))
        read_spec(Path(folder))


def with_tokenizer(source: Source, folder: Path) -> Source:
    """`source` with the tokenizer's files of `folder` in the place of its own.

    Raises:
        CheckpointError: there are none, or not all that are listed.
    """
    found = _files_below(folder) if folder.is_dir() else []
    names = [name for name in found if _matches(name, _TOKENIZER)]
    if not names:
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, …): give the folder "
            "of the original model"
        )
    _require_arrived(folder, lambda name: _matches(name, _TOKENIZER))
    own = {piece.name for piece in source.pieces if _matches(piece.name, _TOKENIZER)}
    kept = [piece for piece in source.pieces if piece.name not in own]
    read = {name: file for name, file in source.read.items() if name not in own}
    added = {name: source_file(folder / name) for name in names}
    pieces = (*_copies(folder, names, expected_hashes(folder)), *kept)
    return replace(source, read={**read, **added}, pieces=pieces)
