"""A `tokenizer.model` read by sentencepiece itself: what OpenLLaMA and the first Llamas ship.

It gives the ids that the model was trained on. Special tokens are split off first, then each
stretch of text goes to sentencepiece, as transformers' original (slow) LlamaTokenizer did.

Invariants: without special tokens in the text, `encode` is BOS plus sentencepiece's own `encode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.errors import CheckpointError, PromptError
from mpipipe.models.chat import ChatRenderer, ChatTemplates
from mpipipe.models.foreign import DECODE_FAILED, ENCODE_FAILED, foreign_code
from mpipipe.models.tokenizer_base import Tokenizer

__all__ = ["SentencePieceTokenizer"]

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What stands beside `tokenizer.model`, in Llama's defaults where nothing does."""

    roles: Mapping[str, str]  # "bos_token" -> "<s>"
    special: Mapping[str, int]  # tokens that `decode` skips
    added: Mapping[str, int]  # other tokens that sentencepiece does not know
    add_bos: bool
    add_eos: bool
    prefix_every_stretch: bool  # of the text between special tokens ("legacy" in Llama's settings)


class SentencePieceTokenizer(Tokenizer):
    """Implements `Tokenizer` over one sentencepiece model."""

    decodes_beside = True

    def __init__(
        self,
        first: SentencePieceProcessor,
        later: SentencePieceProcessor,
        settings: _Settings,
        templates: ChatTemplates,
    ) -> None:
        super().__init__(ChatRenderer(templates, settings.roles))
        self._first = first  # encodes the start of a text, and decodes
        self._later = later  # encodes the stretches after special tokens
        self._settings = settings
        self._own_tokens = {**settings.added, **settings.special}
        self._added_texts = {number: token for token, number in settings.added.items()}
        self._special_ids = frozenset(settings.special.values())
        longest_first = sorted(self._own_tokens, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        last = max(self._own_tokens.values(), default=-1)
        self.vocab_size = max(first.get_piece_size(), last + 1)
        self.bos_token_id = self._own_tokens.get(settings.roles.get("bos_token", ""))
        eos = self._own_tokens.get(settings.roles.get("eos_token", ""))
        self.eos_token_ids = () if eos is None else (eos,)
        self.special_tokens = settings.special

    @staticmethod
    def open(folder: Path, templates: ChatTemplates) -> SentencePieceTokenizer:
        """Read `tokenizer.model` and the settings beside it.

        Raises:
            CheckpointError: a file is broken.
        """
        path = folder / "tokenizer.model"
        first = _load(path)
        settings = _read_settings(folder, first)
        later = first if settings.prefix_every_stretch else _without_prefix(first)
        return SentencePieceTokenizer(first, later, settings, templates)

    def _token_text(self, token_id: int) -> str:
        for text, number in self._own_tokens.items():
            if number == token_id:
                return text
        return str(self._first.id_to_piece(token_id))

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...] | PromptError]:
        """`encode` of every text: plain ones in one go, in threads, unless one of them fails."""
        is_plain = [len(self._stretches(text)) == 1 for text in texts]
        plain = [text for text, is_one in zip(texts, is_plain, strict=True) if is_one]
        before, behind = self._around() if add_special_tokens else ((), ())
        try:
            with foreign_code(*ENCODE_FAILED):
                ids = iter(self._first.encode(plain) if plain else ())
        except PromptError:
            return super().encode_all(texts, add_special_tokens)
        found: list[tuple[int, ...] | PromptError] = []
        for text, is_one in zip(texts, is_plain, strict=True):
            if is_one:
                found.append((*before, *next(ids), *behind))
            else:
                found += super().encode_all([text], add_special_tokens)
        return found

    def _stretches(self, text: str) -> list[str]:
        """Text and the tokenizer's own tokens in turn, text first."""
        # re.split with a group keeps what it splits at.
        return self._splitter.split(text) if self._own_tokens else [text]

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens before and behind a text."""
        bos = self.bos_token_id
        before = (bos,) if self._settings.add_bos and bos is not None else ()
        return before, self.eos_token_ids if self._settings.add_eos else ()

    def _encode(self, text: str, add_special_tokens: bool) -> Iterable[int]:
        before, behind = self._around() if add_special_tokens else ((), ())
        ids = [*before]
        for position, stretch in enumerate(self._stretches(text)):
            if position % 2:
                ids.append(self._own_tokens[stretch])
            elif stretch:
                ids += (self._later if position else self._first).encode(stretch)
        return [*ids, *behind]

    def _decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts(ids))

    def decode_all(self, all_ids: Sequence[Sequence[int]]) -> list[str | PromptError]:
        """`decode` of each of them: plain ones in one go, in threads, unless one of them fails."""
        pieces = [self._pieces(ids) for ids in all_ids]
        try:
            with foreign_code(*DECODE_FAILED):
                plain = [run for run in pieces if run is not None]
                texts = iter(self._first.decode(plain) if plain else ())
        except PromptError:
            return super().decode_all(all_ids)
        found: list[str | PromptError] = []
        for ids, run in zip(all_ids, pieces, strict=True):
            found += super().decode_all([ids]) if run is None else [next(texts)]
        return found

    def _pieces(self, ids: Sequence[int]) -> list[int] | None:
        """Those of sentencepiece that have a text; None: some are tokens that it does not know."""
        if not self._added_texts.keys().isdisjoint(ids):
            return None
        num_pieces = self._first.get_piece_size()
        return [n for n in ids if 0 <= n < num_pieces and n not in self._special_ids]

    def _texts(self, ids: Sequence[int]) -> Iterator[str]:
        num_pieces = self._first.get_piece_size()
        run: list[int] = []
        for number in ids:
            if number in self._added_texts:
                yield self._first.decode(run)
                run = []
                yield self._added_texts[number]
            elif 0 <= number < num_pieces and number not in self._special_ids:
                run.append(number)
        yield self._first.decode(run)


def _load(path: Path) -> SentencePieceProcessor:
    require_content(path)
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a sentencepiece model ({error}): the copy was cut off, or the file is "
            "of another tokenizer; copy it again"
        ) from error


def _without_prefix(processor: SentencePieceProcessor) -> SentencePieceProcessor:
    """The same model, but a text gets no leading space."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    model.ParseFromString(processor.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def _read_settings(folder: Path, processor: SentencePieceProcessor) -> _Settings:
    config = _optional_object(folder / "tokenizer_config.json")
    stated = {**_optional_object(folder / "special_tokens_map.json"), **config}
    roles = {role: text for role in _ROLES if (text := _content(stated.get(role)))}
    for role, number in zip(_ROLES, _model_ids(processor), strict=True):
        if number >= 0:
            roles.setdefault(role, processor.id_to_piece(number))
    listed = _listed_tokens(folder, config)
    known = {text: _id_of(text, processor, listed) for text in roles.values()}
    special = {text: number for text, number in known.items() if number is not None}
    special |= _control_pieces(processor)
    special |= {text: number for text, (number, is_special) in listed.items() if is_special}
    added = {text: number for text, (number, is_special) in listed.items() if not is_special}
    return _Settings(
        roles=roles,
        special=special,
        added={t: n for t, n in added.items() if processor.piece_to_id(t) != n},
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
        prefix_every_stretch=config.get("legacy") is not False,
    )


def _optional_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _content(token: object) -> str:
    """A token is written as its text, or as an object with its text and flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _model_ids(processor: SentencePieceProcessor) -> tuple[int, ...]:
    """In the order of `_ROLES`; -1 where the model has none."""
    return (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id())


def _listed_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """Token -> (id, special?) from `added_tokens.json` and `tokenizer_config.json`."""
    listed = {
        text: (number, False)
        for text, number in _optional_object(folder / "added_tokens.json").items()
        if isinstance(number, int)
    }
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and _content(token) and str(number).isdigit():
            listed[_content(token)] = (int(number), bool(token.get("special")))
    return listed


def _id_of(
    text: str, processor: SentencePieceProcessor, listed: Mapping[str, tuple[int, bool]]
) -> int | None:
    """A token that neither the model nor the files number cannot occur."""
    if text in listed:
        return listed[text][0]
    number = int(processor.piece_to_id(text))
    is_unknown = number == processor.unk_id() and text != processor.id_to_piece(number)
    return None if is_unknown else number


def _control_pieces(processor: SentencePieceProcessor) -> dict[str, int]:
    numbers = range(processor.get_piece_size())
    return {processor.id_to_piece(n): n for n in numbers if processor.is_control(n)}
