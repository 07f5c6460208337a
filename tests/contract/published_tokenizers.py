"""The tokenizer files of OpenLLaMA and OPT, as published, of small trained vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

__all__ = [
    "CORPUS", "OPENLLAMA", "OPT_SETTINGS", "SP_KINDS", "WORDS", "flat", "save_opt_tokenizer",
    "save_sentencepiece", "train_bpe", "train_sentencepiece", "write",
]  # fmt: skip

_SENTENCE = "the quick brown fox jumps over a lazy dog while seven wise owls judge vexing riddles"
WORDS = tuple(_SENTENCE.split())
CORPUS = [
    " ".join(WORDS[(i * k + i) % len(WORDS)] for i in range(3, 15)) + f" {k * 37}."
    for k in range(1, 80)
] + ["naïve café über straße", "def f(x):\n    return x + 1"]

# As Llama's own models are trained (nothing normalised), and with sentencepiece's defaults.
SP_KINDS: dict[str, dict[str, Any]] = {
    "identity": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "nmt_nfkc": {},
}


def flat(token: str) -> dict[str, object]:
    """A token as the files of published models write it."""
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    return {"content": token, **flags}


# What OpenLLaMA puts beside tokenizer.model.
OPENLLAMA = {
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 2048,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "clean_up_tokenization_spaces": False,
    **{
        role: {"__type": "AddedToken", **flat(text)}
        for role, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    },
}
# tokenizer_config.json of the published OPT models.
OPT_SETTINGS = {
    "errors": "replace",
    **{
        role: {"__type": "AddedToken", **flat("</s>")}
        for role in ("unk_token", "bos_token", "eos_token")
    },
    "pad_token": "<pad>",
    "add_prefix_space": False,
    "add_bos_token": True,
    "tokenizer_class": "GPT2Tokenizer",
}


def write(path: Path, content: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def train_sentencepiece(folder: Path, kind: str = "identity") -> Path:
    """A `tokenizer.model` of 400 pieces in `folder`."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **SP_KINDS[kind],
    )
    return folder / "tokenizer.model"


def save_sentencepiece(
    folder: Path, model: Path, *, config: Mapping[str, object] | None = None
) -> None:
    """`tokenizer.model`, and with `config` the two files beside it."""
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    if config is not None:
        write(folder / "tokenizer_config.json", config)
        roles = {role: flat(text) for role, text in (("bos_token", "<s>"), ("eos_token", "</s>"))}
        write(folder / "special_tokens_map.json", roles)


def train_bpe() -> RawTokenizer:
    """A byte-level BPE of 420 tokens that begins with OPT's special ones."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


def save_opt_tokenizer(
    folder: Path, raw: RawTokenizer, *, config: Mapping[str, object] | None = None
) -> None:
    """`vocab.json` and `merges.txt`, and with `config` `tokenizer_config.json`."""
    raw.model.save(str(folder))
    if config is not None:
        write(folder / "tokenizer_config.json", config)
