"""Incremental text against the whole text, with real tokenizers of every kind and any ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.models.tokenizer_base import Tokenizer
from mpipipe.scheduler.detokenize import IncrementalDetokenizer

CORPUS = [f"the fox, number {k}, jumps über straße 漢字 and back {k * 7}" for k in range(60)]
SPECIAL = ("<s>", "</s>", "<|im_end|>")
KINDS = ("byte-level", "sentencepiece", "byte fallback")


@dataclass(frozen=True)
class Stand:
    """A tokenizer, and ids of its kinds of tokens."""

    tokenizer: Tokenizer
    byte_ids: Sequence[int]  # the id of each byte
    special_ids: tuple[int, ...]
    judges_runs: bool  # a bad byte undoes the characters before it


def byte_level() -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return raw


def byte_fallback() -> RawTokenizer:
    """As the Llamas of `tokenizer.json`: bytes where no piece fits, judged run by run."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁the", "▁fox", "jumps", "a", ",", "▁and"]
    raw = RawTokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return raw


def train_sentencepiece(folder: Path) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )


@pytest.fixture(scope="module", params=KINDS)
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stand:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        train_sentencepiece(folder)
        own = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        tokenizer = open_tokenizer(folder)
        byte_ids = [own.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return Stand(tokenizer, byte_ids, (own.bos_id(), own.eos_id()), judges_runs=False)
    raw = byte_level() if request.param == "byte-level" else byte_fallback()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    tokenizer = open_tokenizer(folder)
    ids = tuple(tokenizer.special_tokens[token] for token in SPECIAL)
    if request.param == "byte fallback":
        return Stand(tokenizer, range(256), ids, judges_runs=True)
    texts = {tokenizer.token_text(n): n for n in range(tokenizer.vocab_size)}
    bytes_of = [texts[raw.pre_tokenizer.pre_tokenize_str(chr(b))[0][0]] for b in range(128)]
    high = [texts[letter] for letter in high_letters()]
    return Stand(tokenizer, [*bytes_of, *high], ids, judges_runs=False)


def high_letters() -> list[str]:
    """What byte-level tokenizers write for the bytes from 128 on."""
    printable = [*range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in [*range(0x21, 0x7F), *printable]]
    letters = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letters.get(byte, chr(byte)) for byte in range(128, 256)]


def pushed(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> str:
    """All pieces."""
    stream = IncrementalDetokenizer(decode)
    return "".join([*(stream.push(i) for i in ids), stream.finish()])


def pieces_are_prefixes(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> None:
    stream, out, whole = IncrementalDetokenizer(decode), "", decode(ids)
    for place, token_id in enumerate(ids, start=1):
        out += stream.push(token_id)
        assert whole.startswith(out), f"{ids[:place]}: {out!r} is no start of {whole!r}"
    assert out + stream.finish() == whole


def valid_ids(stand: Stand, dice: random.Random) -> list[int]:
    """Words, characters in single bytes, and runs of special tokens between any two ids."""
    ids: list[int] = []
    for _ in range(dice.randrange(1, 12)):
        text = dice.choice(["the fox", " and", "a", "é", "漢字", "😀", "€", " ", "  x"])
        if dice.random() < 0.6:
            ids += [stand.byte_ids[byte] for byte in text.encode()]
        else:
            ids += stand.tokenizer.encode(text, add_special_tokens=False)
    for _ in range(dice.randrange(3)):
        place = dice.randrange(len(ids) + 1)
        special = dice.choices([*stand.special_ids, 10**6], k=dice.choice([1, 2, 70, 200]))
        ids[place:place] = special
    return ids


def any_ids(stand: Stand, dice: random.Random) -> list[int]:
    """Anything: bytes that are no UTF-8, cut characters, tokens of no vocabulary."""
    pools: list[Sequence[int]] = [
        stand.byte_ids[0x80:],
        stand.byte_ids,
        stand.special_ids,
        range(-1, stand.tokenizer.vocab_size + 2),
        [stand.byte_ids[byte] for byte in "漢😀".encode()],
    ]
    ids: list[int] = []
    while len(ids) < 60:
        ids += dice.choices(dice.choice(pools), k=dice.randrange(1, 25))
    return ids


def test_a_character_is_whole_however_many_special_tokens_lie_in_it(stand: Stand) -> None:
    for character in ("é", "€", "😀"):
        first, *rest = [stand.byte_ids[byte] for byte in character.encode()]
        ids = [first, *stand.special_ids * 50, *rest, *stand.tokenizer.encode("a", False)]
        whole = stand.tokenizer.decode(ids)
        assert character in whole
        assert pushed(stand.tokenizer.decode, ids) == whole


def test_valid_text_comes_out_whole_from_any_tokens(stand: Stand) -> None:
    dice = random.Random(1)
    for _ in range(400):
        pieces_are_prefixes(stand.tokenizer.decode, valid_ids(stand, dice))


def test_bytes_that_are_no_text_come_out_as_the_decoder_says(stand: Stand) -> None:
    dice = random.Random(2)
    for _ in range(400):
        ids = any_ids(stand, dice)
        if stand.judges_runs:  # what was out may be undone: it must go on, and not fail
            pushed(stand.tokenizer.decode, ids)
        else:
            pieces_are_prefixes(stand.tokenizer.decode, ids)


@pytest.mark.parametrize("kind", ["words", "special", "bad bytes", "straddling"])
def test_the_cost_of_a_token_does_not_grow(stand: Stand, kind: str) -> None:
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return stand.tokenizer.decode(ids)

    word = stand.tokenizer.encode("the fox jumps over 漢字", add_special_tokens=False)
    repeated = {
        "words": word,
        "special": stand.special_ids,
        "bad bytes": [stand.byte_ids[0xFF]],
        "straddling": [stand.byte_ids[byte] for byte in "漢漢".encode()][1:5],
    }[kind]
    ids = [stand.byte_ids[0xE2], *(list(repeated) * 3000)[:3000]]
    pushed(decode, ids)
    assert decoded < 60 * len(ids)
