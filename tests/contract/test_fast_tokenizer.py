"""What is kept of a tokenizer computes what transformers does, without it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from mpipipe.models import tokenizer as opening
from mpipipe.models.fast_tokenizer import FastTokenizer
from mpipipe.models.tokenizer import open_tokenizer
from tests.contract.published_tokenizers import OPT_SETTINGS, save_opt_tokenizer, train_bpe, write

TEXTS = [
    "the quick brown fox",
    "  two  leading   and trailing  ",
    "line\nbreak\n\n    indented\ttab",
    "naïve café ﬁne ½ 漢字 🙂 é \x00",
    "<s>the fox</s>the dog <tool>x</tool>  <|im_end|>\n",
    "12345 6.78 , . !",
    "",
    " ",
]
Make = Callable[[Path], None]


def _generic(folder: Path) -> None:
    raw = train_bpe()
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    raw.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("</tool>", normalized=False)])
    raw.add_special_tokens([AddedToken("<|im_end|>", rstrip=True)])
    raw.enable_truncation(3)
    raw.enable_padding()
    raw.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
            "clean_up_tokenization_spaces": True,
        },
    )


def _llama(folder: Path) -> None:
    """Byte fallback, as Llama 2 and Mistral have; transformers builds this class anew."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ["▁", "t", "h", "e", "f", "o", "x", "th", "the", "▁the", "fo", "fox", "▁fox"]:
        vocab[piece] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox")]
    raw = RawTokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, **settings},
    )


def _digits(folder: Path) -> None:
    """As SmolLM2: a class of byte-level BPE with another splitter than the class has."""
    raw = train_bpe()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "split_special_tokens": True},
    )


def _opt(folder: Path) -> None:
    save_opt_tokenizer(folder, train_bpe(), config=OPT_SETTINGS)


@pytest.fixture(params=[_generic, _llama, _digits, _opt])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    request.param(made)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def forbid_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(opening, "_open_with_transformers", fail)


def test_the_first_start_and_those_after_it_compute_what_transformers_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    first = open_tokenizer(folder)
    forbid_transformers(monkeypatch)
    later = open_tokenizer(folder)
    for tokenizer in (first, later):
        assert isinstance(tokenizer, FastTokenizer)
        for special in (True, False):
            expected = [tuple(reference.encode(t, add_special_tokens=special)) for t in TEXTS]
            assert [tokenizer.encode(text, special) for text in TEXTS] == expected
            assert tokenizer.encode_all(TEXTS, special) == expected
        vocabulary = reference.get_vocab()
        assert tokenizer.vocab_size == max(vocabulary.values()) + 1
        assert tokenizer.bos_token_id == reference.bos_token_id
        assert tokenizer.eos_token_ids == (reference.eos_token_id,)
        ids = list(range(tokenizer.vocab_size))
        for some in (ids, ids[::-1], ids[40:60], *(tokenizer.encode(t, True) for t in TEXTS)):
            assert tokenizer.decode(some) == reference.decode(
                list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        names = [tokenizer.token_text(number) for number in ids]
        assert names == [str(reference.convert_ids_to_tokens(number)) for number in ids]
    assert first.special_tokens == later.special_tokens


def test_a_changed_folder_is_opened_anew(folder: Path) -> None:
    open_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    write(path, {**json.loads(path.read_text()), "eos_token": "<s>"})
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_token_ids == (tokenizer.special_tokens["<s>"],)


def test_a_token_that_two_files_call_special_and_not_is_left_to_transformers(
    tmp_path: Path,
) -> None:
    """In transformers it stays special; the written form of its tokenizer has forgotten that."""
    _generic(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {"2": {"content": "</s>", "special": False, **flags}}
    write(path, {**json.loads(path.read_text()), "added_tokens_decoder": added})
    reference = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = reference.encode("the</s> fox")
    assert 2 in ids
    for _ in range(2):
        assert open_tokenizer(tmp_path).decode(ids) == reference.decode(
            ids, skip_special_tokens=True
        )


def test_another_version_of_transformers_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generic(tmp_path)
    open_tokenizer(tmp_path)
    monkeypatch.setattr(
        "mpipipe.models.fast_tokenizer.package_versions", lambda names: dict.fromkeys(names, "0.0")
    )
    forbid_transformers(monkeypatch)
    with pytest.raises(Exception, match="transformers was asked"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}\n{}", b"\xff\n", b"damaged"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, cache: Path, content: bytes) -> None:
    _generic(tmp_path)
    expected = open_tokenizer(tmp_path).encode("the fox", True)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert open_tokenizer(tmp_path).encode("the fox", True) == expected
    assert kept.read_bytes() == whole


def test_a_cache_with_another_digit_is_made_again(tmp_path: Path, cache: Path) -> None:
    _generic(tmp_path)
    open_tokenizer(tmp_path)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    at = max(whole.rfind(b"%d" % digit) for digit in range(10))
    kept.write_bytes(whole[:at] + (b"1" if whole[at : at + 1] != b"1" else b"2") + whole[at + 1 :])
    open_tokenizer(tmp_path)
    assert kept.read_bytes() == whole


def test_a_file_that_cannot_be_read_and_a_missing_home_keep_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generic(tmp_path)
    expected = open_tokenizer(tmp_path).encode("the fox", True)
    for path in cache.iterdir():
        path.unlink()
    (tmp_path / "NOTES.txt").write_text("ours")
    opened = Path.open

    def refusing(path: Path, *words: Any, **more: Any) -> Any:
        if path.name == "NOTES.txt":
            raise PermissionError(path)
        return opened(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refusing)
        assert open_tokenizer(tmp_path).encode("the fox", True) == expected

    def homeless() -> Path:
        raise RuntimeError("no home folder")

    monkeypatch.setattr("mpipipe.models.fast_tokenizer.cache_folder", homeless)
    assert open_tokenizer(tmp_path).encode("the fox", True) == expected
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generic(tmp_path)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MPIPIPE_CACHE", str(tmp_path / "file"))
    assert open_tokenizer(tmp_path).encode("the fox", False)


def test_the_cache_keeps_the_newest(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generic(tmp_path)
    monkeypatch.setattr("mpipipe.models.fast_tokenizer._MOST_KEPT", 2)
    cache.mkdir(parents=True)
    for name, age_s in (("old", 300), ("older", 400), ("new", 100)):
        path = cache / f"{name}.json"
        path.touch()
        os.utime(path, (time.time() - age_s,) * 2)
    open_tokenizer(tmp_path)
    names = {path.name for path in cache.iterdir()}
    assert len(names) == 2
    assert "new.json" in names
    forbid_transformers(monkeypatch)
    open_tokenizer(tmp_path)  # what was just kept is the other one
