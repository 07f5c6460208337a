"""What a model folder holds, in a few digests: whether two runs see the same model.

For every file that decides a completion: its size and SHA-256, of large weight files that of their
header, their end and blocks spread evenly over them. So it takes a bounded number of reads a file,
whatever its size; times and paths do not count. `index` checks whether the files are whole.

Two weight files of one size and one header that differ between the blocks only are taken for equal.
A `.bin` file has no such gap: the directory at its end holds a checksum of every tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError

__all__ = [
    "CODE_FILES",
    "TEMPLATE_FILES",
    "TOKENIZER_FILES",
    "digest_files",
    "model_fingerprint",
]

_WHOLE_BYTES = 4 * 1024**2  # smaller weight files are read whole
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 32
_START_BYTES = _END_BYTES = 256 * 1024  # the header; the directory of a `.bin` file

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json",
                    "added_tokens.json", "*.model", "*.tiktoken")  # fmt: skip
TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*")
CODE_FILES = ("*.py",)


def model_fingerprint(
    folder: Path, tokenizer_folder: Path, *, has_weights: bool, has_code: bool
) -> dict[str, dict[str, str]]:
    """The digests of each part of a model by the names of its files.

    `has_weights`: off for random weights, which follow from `config.json`; `has_code`: code of the
    checkpoint is run.

    Raises:
        CheckpointError: a file cannot be read, or the weights are not whole.
    """
    weights = read_index(folder).files if has_weights else ()
    return {
        "the model's weights": digest_files(weights, sampled=True),
        "the model's config.json": digest_files([folder / "config.json"]),
        "the model's generation_config.json": digest_files(
            _found(folder, ("generation_config.json",))
        ),
        "the model's code": digest_files(_found(folder, CODE_FILES if has_code else ())),
        "the tokenizer": digest_files(_found(tokenizer_folder, TOKENIZER_FILES)),
        "the chat templates": digest_files(_found(tokenizer_folder, TEMPLATE_FILES)),
    }


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file())


def digest_files(paths: Iterable[Path], *, sampled: bool = False) -> dict[str, str]:
    """File name → size and SHA-256 of its content, or of samples of it where it is large.

    Raises:
        CheckpointError: one cannot be read.
    """
    return {path.name: _digest(path, sampled=sampled) for path in paths}


def _digest(path: Path, *, sampled: bool) -> str:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not sampled or size <= _WHOLE_BYTES:
                return f"{size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            digest = hashlib.sha256()
            for offset, num_bytes in _samples(size):
                digest.update(os.pread(file.fileno(), num_bytes, offset))
            return f"{size}:sampled:{digest.hexdigest()}"
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): mend its rights, or copy the model again"
        ) from error


def _samples(size: int) -> list[tuple[int, int]]:
    """Where a large file of `size` bytes is looked at: offsets and lengths."""
    step = size // _NUM_BLOCKS
    blocks = [(index * step, _BLOCK_BYTES) for index in range(1, _NUM_BLOCKS)]
    return [(0, _START_BYTES), *blocks, (size - _END_BYTES, _END_BYTES)]
