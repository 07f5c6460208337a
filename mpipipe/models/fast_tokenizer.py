"""A tokenizer that the `tokenizers` library runs alone, kept for starts without transformers.

transformers does not take a `tokenizer.json` as it is: many of its classes build the tokenizer
anew, not in all versions alike. So what it made of a folder is the truth, and is kept in the cache
under a digest of the folder's files and of both libraries' versions: the tokenizer in the form of
`tokenizers`, and the few facts beside it. The next start reads that, and gives the same ids and
texts without importing transformers (a second or more).

Invariants: no file of the cache is trusted to be whole; without a cache that can be written, all
works as before.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpipipe.demo.model import cache_folder
from mpipipe.errors import PromptError
from mpipipe.models.chat import ChatRenderer, ChatTemplates
from mpipipe.models.foreign import DECODE_FAILED, ENCODE_FAILED, foreign_code
from mpipipe.models.tokenizer_base import Tokenizer
from mpipipe.plain_values import from_json, to_json
from mpipipe.topology.packages import package_versions

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

__all__ = ["FastTokenizer", "TokenizerFacts", "is_plain", "kept_tokenizer", "known_ids"]

_FORMAT = 3
_MOST_KEPT = 32  # of a few MB each; every version of a folder or library makes one
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt"})
# What a class must leave to transformers' own base class, to be nothing but its `_tokenizer`.
_METHODS = (
    "__call__",
    "_decode",
    "_encode_plus",
    "convert_ids_to_tokens",
    "decode",
    "encode",
    "get_vocab",
)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a tokenizer of transformers knows beside its `tokenizers.Tokenizer`."""

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    roles: dict[str, str]  # "bos_token" → "<s>"
    special_tokens: dict[str, int]
    splits_special_tokens: bool  # special tokens written out in a text are text


def is_plain(backend: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizers` alone computes what `backend` does, or its class does more."""
    from transformers import PreTrainedTokenizerFast

    kind = type(backend)
    return isinstance(backend, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in _METHODS
    )


class FastTokenizer(Tokenizer):
    """Implements `Tokenizer` over one of `tokenizers`, which takes many texts in threads."""

    decodes_beside = True

    def __init__(
        self, backend: tokenizers.Tokenizer, facts: TokenizerFacts, templates: ChatTemplates
    ) -> None:
        super().__init__(ChatRenderer(templates, facts.roles))
        self._backend = backend
        self.vocab_size = facts.vocab_size
        self.bos_token_id = facts.bos_token_id
        self.eos_token_ids = facts.eos_token_ids
        self.special_tokens = facts.special_tokens

    @staticmethod
    def of(serialized: str, facts: TokenizerFacts, templates: ChatTemplates) -> FastTokenizer:
        """Its texts are neither cut nor filled up, whatever the file says."""
        import tokenizers  # runs of token ids need none

        backend = tokenizers.Tokenizer.from_str(serialized)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = facts.splits_special_tokens
        return FastTokenizer(backend, facts, templates)

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...] | PromptError]:
        """`encode` of every text: in one go, unless one of them fails."""
        try:
            with foreign_code(*ENCODE_FAILED):
                found = self._backend.encode_batch_fast(
                    list(texts), add_special_tokens=add_special_tokens
                )
                return [tuple(encoding.ids) for encoding in found]
        except PromptError:
            return super().encode_all(texts, add_special_tokens)

    def decode_all(self, all_ids: Sequence[Sequence[int]]) -> list[str | PromptError]:
        """`decode` of each of them: in one go, unless one of them fails."""
        try:
            with foreign_code(*DECODE_FAILED):
                known = [known_ids(ids, self.vocab_size) for ids in all_ids]
                return [*self._backend.decode_batch(known, skip_special_tokens=True)]
        except PromptError:
            return super().decode_all(all_ids)

    def _token_text(self, token_id: int) -> str:
        return str(self._backend.id_to_token(token_id))

    def _encode(self, text: str, add_special_tokens: bool) -> Iterable[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        known = known_ids(ids, self.vocab_size)
        text: str = self._backend.decode(known, skip_special_tokens=True)
        return text


def known_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Without those beyond the vocabulary."""
    if ids and max(ids) < vocab_size and min(ids) >= 0:
        return list(ids)
    return [number for number in ids if 0 <= number < vocab_size]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where a folder's tokenizer is kept: a checksum, a line of facts, then the tokenizer."""

    path: Path | None  # None: nowhere

    def read(self, templates: ChatTemplates) -> FastTokenizer | None:
        """What was kept; None: nothing that can be read."""
        if self.path is None:
            return None
        try:
            kept, _, rest = self.path.read_text(encoding="utf-8").partition("\n")
            if kept != _checksum(rest):
                return None
            first, _, serialized = rest.partition("\n")
            return FastTokenizer.of(serialized, from_json(TokenizerFacts, first), templates)
        except Exception:  # noqa: BLE001 - `tokenizers` raises it bare for a damaged file
            return None

    def write(self, serialized: str, facts: TokenizerFacts) -> None:
        """Keep it, where that can be done; readers see it whole or not at all."""
        if self.path is None:
            return
        rest = f"{to_json(facts)}\n{serialized}"
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self.path.parent, prefix=".tokenizer-")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    file.write(f"{_checksum(rest)}\n{rest}")
                Path(name).chmod(0o644)  # a cache folder may be shared
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            _remove_oldest(self.path.parent)


def kept_tokenizer(folder: Path, settings: Mapping[str, Any]) -> _Kept:
    """The place of what transformers makes of `folder` with `settings`.

    Nowhere, if there is no cache folder, or a file of the model's that may matter cannot be read.
    """
    digest = hashlib.sha256()
    libraries = list(package_versions(("transformers", "tokenizers")).values())
    digest.update(json.dumps([_FORMAT, libraries, settings], sort_keys=True).encode())
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file():
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"\n{path.name} {content}".encode())
        place = cache_folder() / "tokenizers"
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return _Kept(None)
    return _Kept(place / f"{digest.hexdigest()[:32]}.json")


def _remove_oldest(place: Path) -> None:
    """Keep the newest. One that is still in use is made again by the next start.

    Raises:
        OSError: another process has removed it first, or this one may not.
    """
    kept = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-_MOST_KEPT]:
        path.unlink()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
