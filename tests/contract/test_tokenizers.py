from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from mpipipe.errors import CheckpointError, PromptError
from mpipipe.models.chat import read_chat_templates
from mpipipe.models.tokenizer import (
    TransformersTokenizer,
    open_tokenizer,
)
from mpipipe.models.tokenizer_base import Tokenizer
from tests.contract.chat_ids import chat_ids
from tests.contract.published_tokenizers import (
    CORPUS,
    OPENLLAMA,
    OPT_SETTINGS,
    SP_KINDS,
    flat,
    save_opt_tokenizer,
    save_sentencepiece,
    train_bpe,
    train_sentencepiece,
    write,
)

TEXTS = [
    "the quick brown fox",
    "  two  leading   and trailing  ",
    " one leading space",
    "line\nbreak\n\n    indented\ttab",
    "naïve café ﬁne ½ 漢字 🙂 é",
    "12345 6.78",
    "unseen ZEBRA words!",
    "",
    " ",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS_CHAT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
    "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
)
LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a tokenizer tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


# --- sentencepiece -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SP_KINDS)
def sp_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), request.param)


def sp_folder(folder: Path, model: Path, *, config: Mapping[str, object] | None = None) -> Path:
    save_sentencepiece(folder, model, config=config)
    write(folder / "config.json", LLAMA_CONFIG)
    return folder


@pytest.mark.parametrize("config", [None, OPENLLAMA], ids=["alone", "as OpenLLaMA"])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_are_its_own(
    tmp_path: Path, sp_model: Path, config: Mapping[str, object] | None, text: str
) -> None:
    tokenizer = open_tokenizer(sp_folder(tmp_path, sp_model, config=config))
    own = SentencePieceProcessor(model_file=str(sp_model))
    ids = own.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == tuple(ids)
    assert tokenizer.encode(text, add_special_tokens=True) == (own.bos_id(), *ids)
    assert tokenizer.decode(ids) == own.decode(ids)


@pytest.mark.parametrize("text", ["the quick brown fox", "naïve dog", "judge 12345\nowls"])
def test_sentencepiece_ids_are_those_of_transformers_where_it_keeps_to_the_model(
    tmp_path: Path, sp_model: Path, text: str
) -> None:
    if "\n" in text and b"nmt_nfkc" in sp_model.read_bytes():
        text = text.replace("\n", " ")  # transformers drops the normaliser
    folder = sp_folder(tmp_path, sp_model, config=OPENLLAMA)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert open_tokenizer(folder).encode(text, True) == tuple(reference.encode(text))


def test_sentencepiece_special_tokens(tmp_path: Path, sp_model: Path) -> None:
    tokenizer = open_tokenizer(sp_folder(tmp_path, sp_model))
    own = SentencePieceProcessor(model_file=str(sp_model))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), 400)
    ids = tokenizer.encode("<s>the fox</s>the dog", add_special_tokens=False)
    assert ids == (1, *own.encode("the fox"), 2, *own.encode("the dog"))
    assert tokenizer.decode((1, *own.encode("the fox"), own.unk_id(), 2)) == "the fox"


def test_sentencepiece_text_after_a_special_token_without_the_legacy_space(
    tmp_path: Path, sp_model: Path
) -> None:
    folder = sp_folder(tmp_path, sp_model, config={**OPENLLAMA, "legacy": False})
    tokenizer, own = open_tokenizer(folder), SentencePieceProcessor(model_file=str(sp_model))
    ids = tokenizer.encode("the fox</s>dog", add_special_tokens=False)
    before, after = ids[: ids.index(2)], ids[ids.index(2) + 1 :]
    assert before == tuple(own.encode("the fox"))
    assert "".join(own.id_to_piece(list(after))) == "dog"


def test_sentencepiece_settings_are_obeyed(tmp_path: Path, sp_model: Path) -> None:
    config = {**OPENLLAMA, "add_bos_token": False, "add_eos_token": True}
    tokenizer = open_tokenizer(sp_folder(tmp_path, sp_model, config=config))
    own = SentencePieceProcessor(model_file=str(sp_model))
    assert tokenizer.encode("the fox", add_special_tokens=True) == (*own.encode("the fox"), 2)


def test_sentencepiece_added_tokens(tmp_path: Path, sp_model: Path) -> None:
    added = {"400": {**flat("<|im_end|>"), "special": True}, "401": {**flat("<tool>")}}
    config = {**OPENLLAMA, "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    tokenizer = open_tokenizer(sp_folder(tmp_path, sp_model, config=config))
    own = SentencePieceProcessor(model_file=str(sp_model))
    ids = tokenizer.encode("the fox<tool><|im_end|>", add_special_tokens=False)
    assert ids == (*own.encode("the fox"), 401, 400)
    assert tokenizer.decode(ids) == "the fox<tool>"
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size) == ((400,), 402)


def test_sentencepiece_chat(tmp_path: Path, sp_model: Path) -> None:
    config = {**OPENLLAMA, "chat_template": BOS_CHAT}
    tokenizer = open_tokenizer(sp_folder(tmp_path, sp_model, config=config))
    own = SentencePieceProcessor(model_file=str(sp_model))
    ids = chat_ids(tokenizer, [{"role": "user", "content": "the fox"}])
    assert ids == (1, *own.encode("the fox"), 2)
    with pytest.raises(PromptError, match="start with the user"):
        chat_ids(tokenizer, [{"role": "assistant", "content": "x"}])


# --- vocab.json and merges.txt (OPT) -------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_bpe() -> RawTokenizer:
    return train_bpe()


def opt_folder(
    folder: Path, raw: RawTokenizer, *, config: Mapping[str, object] | None = None
) -> Path:
    save_opt_tokenizer(folder, raw, config=config)
    write(folder / "config.json", {"model_type": "opt", "vocab_size": 420})
    return folder


@pytest.mark.parametrize("config", [None, OPT_SETTINGS], ids=["bare", "as published"])
@pytest.mark.parametrize("text", TEXTS)
def test_opt_ids_begin_with_the_closing_token(
    tmp_path: Path, raw_bpe: RawTokenizer, config: Mapping[str, object] | None, text: str
) -> None:
    tokenizer = open_tokenizer(opt_folder(tmp_path, raw_bpe, config=config))
    ids = raw_bpe.encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=True) == (2, *ids)
    assert tokenizer.encode(text, add_special_tokens=False) == tuple(ids)
    assert tokenizer.decode((2, *ids)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (2, (2,))


def test_opt_ids_are_those_of_the_class_that_opt_names(
    tmp_path: Path, raw_bpe: RawTokenizer
) -> None:
    folder = opt_folder(tmp_path, raw_bpe, config=OPT_SETTINGS)
    reference = GPT2Tokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        assert open_tokenizer(folder).encode(text, True) == tuple(reference.encode(text))


def test_opt_saved_again_by_transformers_encodes_the_same(
    tmp_path: Path, raw_bpe: RawTokenizer
) -> None:
    folder = opt_folder(tmp_path, raw_bpe, config=OPT_SETTINGS)
    again = tmp_path / "again"
    AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(again)
    first, second = open_tokenizer(folder), open_tokenizer(again)
    for text in TEXTS:
        assert first.encode(text, True) == second.encode(text, True)


def test_a_bare_gpt2_is_not_given_what_opt_has(tmp_path: Path, raw_bpe: RawTokenizer) -> None:
    folder = opt_folder(tmp_path, raw_bpe)
    write(folder / "config.json", {"model_type": "gpt2"})
    assert open_tokenizer(folder).encode("the fox", True) == tuple(raw_bpe.encode("the fox").ids)


# --- tokenizer.json ----------------------------------------------------------------------------


@pytest.fixture
def json_folder(tmp_path: Path, raw_bpe: RawTokenizer) -> Path:
    raw = RawTokenizer.from_str(raw_bpe.to_str())
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def json_tokenizer(json_folder: Path) -> Tokenizer:
    return open_tokenizer(json_folder)


@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>the fox<|im_end|>"])
def test_tokenizer_json_ids_are_those_of_the_tokenizers_library(
    json_folder: Path, json_tokenizer: Tokenizer, text: str
) -> None:
    raw = RawTokenizer.from_file(str(json_folder / "tokenizer.json"))
    encoded = raw.encode(text).ids
    assert json_tokenizer.encode(text, add_special_tokens=True) == tuple(encoded)
    assert json_tokenizer.decode(encoded) == raw.decode(encoded)


def test_chat_ids_are_those_of_transformers(json_folder: Path, json_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be wise"}, {"role": "user", "content": "the fox?"}]
    reference = AutoTokenizer.from_pretrained(json_folder, local_files_only=True)
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert chat_ids(json_tokenizer, messages) == tuple(expected)
    assert json_tokenizer.eos_token_ids == (reference.convert_tokens_to_ids("<|im_end|>"),)


def test_spaces_before_punctuation_are_not_cleaned_up(json_tokenizer: Tokenizer) -> None:
    text = "the fox , it 's a dog ."
    assert json_tokenizer.decode(json_tokenizer.encode(text, False)) == text


# --- every form --------------------------------------------------------------------------------


@pytest.fixture(params=["sentencepiece", "vocab and merges", "tokenizer.json"])
def any_folder(
    request: pytest.FixtureRequest, tmp_path: Path, raw_bpe: RawTokenizer
) -> Iterator[Path]:
    if request.param == "sentencepiece":
        yield sp_folder(tmp_path, train_sentencepiece(tmp_path))
    elif request.param == "vocab and merges":
        yield opt_folder(tmp_path, raw_bpe)
    else:
        yield request.getfixturevalue("json_folder")


def test_ids_beyond_the_vocabulary_are_skipped(any_folder: Path) -> None:
    tokenizer = open_tokenizer(any_folder)
    ids = tokenizer.encode("the quick fox", add_special_tokens=False)
    strange = (tokenizer.vocab_size, *ids, 10**6, -1)
    assert tokenizer.decode(strange) == tokenizer.decode(ids) == "the quick fox"
    assert tokenizer.decode(()) == ""


@pytest.mark.parametrize("special", [True, False])
def test_many_texts_at_once_have_the_ids_of_each_alone(any_folder: Path, special: bool) -> None:
    tokenizer = open_tokenizer(any_folder)
    texts = [*TEXTS, *CORPUS, "<s>the fox</s>"]
    assert tokenizer.encode_all(texts, special) == [tokenizer.encode(t, special) for t in texts]
    assert tokenizer.encode_all([], special) == []


def test_many_completions_at_once_have_the_texts_of_each_alone(any_folder: Path) -> None:
    tokenizer = open_tokenizer(any_folder)
    texts = [*TEXTS, *CORPUS, "<s>the fox</s>"]
    ids = [tokenizer.encode(text, True) for text in texts]
    ids += [(), (tokenizer.vocab_size, *ids[0], -1), *[each[1:-1] for each in ids]]
    assert tokenizer.decode_all(ids) == [tokenizer.decode(each) for each in ids]
    assert tokenizer.decode_all([]) == []


def test_what_a_class_does_with_texts_and_ids_is_done_in_batches_too(json_folder: Path) -> None:
    """Only what transformers hands to `tokenizers` as it is goes there directly."""

    class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _decode(self, *args: object, **settings: object) -> str:
            return str(super()._decode(*args, **settings)).upper()

    templates = read_chat_templates(json_folder)
    plain = PreTrainedTokenizerFast.from_pretrained(json_folder, local_files_only=True)
    shouting = Shouting.from_pretrained(json_folder, local_files_only=True)
    ids = plain.encode("the fox")
    assert TransformersTokenizer(plain, templates).decode_all([ids, ids]) == ["the fox"] * 2
    assert TransformersTokenizer(shouting, templates).decode_all([ids, ids]) == ["THE FOX"] * 2
    assert TransformersTokenizer(plain, templates).plain() is not None
    assert TransformersTokenizer(shouting, templates).plain() is None


def test_special_tokens_are_those_without_a_text(any_folder: Path) -> None:
    tokenizer = open_tokenizer(any_folder)
    assert tokenizer.special_tokens
    for text, number in tokenizer.special_tokens.items():
        assert tokenizer.decode([number]) == ""
        assert tokenizer.encode(text, add_special_tokens=False) == (number,)
        assert tokenizer.token_text(number) == text


def test_a_text_beyond_the_model_is_encoded_without_a_warning(json_folder: Path) -> None:
    settings = json.loads((json_folder / "tokenizer_config.json").read_text())
    write(json_folder / "tokenizer_config.json", {**settings, "model_max_length": 16})
    tokenizer = open_tokenizer(json_folder)
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    try:
        assert len(tokenizer.encode("the quick fox " * 30, True)) > 16
    finally:
        logger.removeHandler(listener)
    assert said == []


def test_a_model_without_a_chat_template_says_so(tmp_path: Path, raw_bpe: RawTokenizer) -> None:
    tokenizer = open_tokenizer(opt_folder(tmp_path, raw_bpe))
    with pytest.raises(PromptError, match="no chat template") as caught:
        chat_ids(tokenizer, [{"role": "user", "content": "hello"}])
    assert caught.value.kind == "no_chat_template"


# --- what is wrong with a folder -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], r"no tokenizer: tokenizer\.json, tokenizer\.model, or vocab\.json with merges\.txt"),
        (["vocab.json"], r"only vocab\.json is there"),
        (["merges.txt"], r"only merges\.txt is there"),
    ],
)
def test_a_missing_tokenizer_lists_the_files_that_would_do(
    tmp_path: Path, files: list[str], words: str
) -> None:
    write(tmp_path / "config.json", LLAMA_CONFIG)
    for name in files:
        write(tmp_path / name, {})
    with pytest.raises(CheckpointError, match=words):
        open_tokenizer(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer folder"):
        open_tokenizer(tmp_path / "nowhere")


def test_a_tokenizer_that_needs_code_says_so(tmp_path: Path) -> None:
    write(tmp_path / "config.json", LLAMA_CONFIG)
    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    write(tmp_path / "tokenizer_config.json", {"auto_map": auto_map})
    with pytest.raises(CheckpointError, match=r"model\.trust_remote_code"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
@pytest.mark.parametrize(
    "content", [b"", b'{"model": {', b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / "config.json", LLAMA_CONFIG)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        open_tokenizer(tmp_path)


def test_a_tokenizer_json_of_something_else(tmp_path: Path) -> None:
    write(tmp_path / "config.json", LLAMA_CONFIG)
    write(tmp_path / "tokenizer.json", {"hello": 1})
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_tokenizer(tmp_path)
