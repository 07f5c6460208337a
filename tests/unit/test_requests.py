"""From prompt lines to requests: what one line does to the others, with a scripted tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpipipe.config.chat_fields import PLAIN_CHAT, ChatOptions
from mpipipe.config.load import load_config
from mpipipe.config.prompts import PromptLine
from mpipipe.errors import CheckpointError, PromptError
from mpipipe.models.chat import ChatRenderer, ChatTemplates
from mpipipe.models.foreign import foreign_code, in_short
from mpipipe.models.tokenizer_base import Tokenizer
from mpipipe.planning.model_facts import read_model
from mpipipe.runtime.requests import PreparedPrompts, prepare, tokenize
from mpipipe.types import SamplingParams

VOCAB_SIZE = 200
SPECIAL = {"<bos>": 1, "<end>": 2, "<image>": VOCAB_SIZE, "<negative>": -3}


class ScriptedTokenizer(Tokenizer):
    """A token a letter, special ones by name; fails on "boom", and renders what is no "refuse"."""

    vocab_size = VOCAB_SIZE + 1
    bos_token_id = 1
    eos_token_ids = (2,)
    special_tokens: Mapping[str, int] = SPECIAL

    def __init__(self) -> None:
        super().__init__(ChatRenderer(ChatTemplates(), {}))
        self.options: list[ChatOptions] = []
        self.most_texts = 0

    def _token_text(self, token_id: int) -> str:
        return next(text for text, number in SPECIAL.items() if number == token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        if "boom" in text:
            raise PromptError("tokenizer", "it fails")
        ids = [1] if add_special_tokens else []
        while text:
            token = next((name for name in SPECIAL if text.startswith(name)), text[0])
            ids.append(SPECIAL.get(token, ord(token[0])))
            text = text.removeprefix(token)
        return tuple(ids)

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...] | PromptError]:
        self.most_texts = max(self.most_texts, len(texts))
        return super().encode_all(texts, add_special_tokens)

    def _decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def render(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = PLAIN_CHAT
    ) -> str:
        self.options.append(options)
        text = "".join(message["content"] for message in messages)
        if text == "refuse":
            raise PromptError("chat_template", "no such roles")
        return f"<bos>{text}"


def line(index: int, text: str = "", *, chat: str = "", **sampling: object) -> PromptLine:
    return PromptLine(
        index=index,
        line_number=index + 1,
        prompt_id=f"p{index}",
        text=None if chat else text,
        messages=({"role": "user", "content": chat},) if chat else None,
        sampling=SamplingParams().replace(**sampling),
    )


def prepared(
    lines: Sequence[PromptLine], tokenizer: ScriptedTokenizer | None = None, *, special: bool = True
) -> PreparedPrompts:
    return prepare(
        lines, tokenizer or ScriptedTokenizer(), add_special_tokens=special, vocab_size=VOCAB_SIZE
    )


@pytest.mark.parametrize(("token", "number"), [("<image>", 200), ("<negative>", -3)])
def test_a_token_without_an_embedding_is_the_error_of_its_prompt_only(
    token: str, number: int
) -> None:
    found = prepared([line(0, "a"), line(1, f"b{token}c"), line(2, "c"), line(3, chat=token)])
    assert [request.request_id for request in found.requests] == ["p0", "p2"]
    assert [rejected.error_kind for rejected in found.rejected] == ["unknown_token"] * 2
    for rejected in found.rejected:
        assert token in (rejected.error_message or "")
        assert str(number) in (rejected.error_message or "")


def ids(index: int, *numbers: int, **sampling: object) -> PromptLine:
    return PromptLine(
        index=index,
        line_number=index + 1,
        prompt_id=f"p{index}",
        sampling=SamplingParams().replace(**sampling),
        token_ids=numbers,
    )


def test_token_ids_are_taken_as_they_are() -> None:
    found = prepared([line(0, "a"), ids(1, 1, 1, 7), ids(2, 5, VOCAB_SIZE)])
    assert [request.prompt_ids for request in found.requests] == [(1, 97), (1, 1, 7)]
    assert [rejected.error_kind for rejected in found.rejected] == ["unknown_token"]
    assert "gives the token id 200" in (found.rejected[0].error_message or "")
    assert found.warnings == ()  # nothing was added to them


def test_random_weights_and_token_ids_need_no_tokenizer() -> None:
    shape = Path(__file__).parents[2] / "configs/shapes/openllama_3b"
    model = read_model(load_config(shape, ["model.weights=random"]))
    found = tokenize(model, [ids(0, 7, 8)])
    assert [request.prompt_ids for request in found.prompts.requests] == [(7, 8)]
    assert found.tokenizer is not None
    assert found.tokenizer.decode([7, 8]) == ""
    for needs_text in (line(1, "a"), ids(1, 7, stop=("a",))):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            tokenize(model, [ids(0, 7), needs_text])


def test_without_a_vocabulary_every_id_is_taken() -> None:
    found = prepare([line(0, "<image>")], ScriptedTokenizer(), add_special_tokens=False)
    assert [request.prompt_ids for request in found.requests] == [(200,)]


def test_what_fails_in_the_tokenizer_or_the_template_takes_no_other_prompt() -> None:
    lines = [line(0, "a"), line(1, "boom"), line(2, chat="refuse"), line(3, chat="b"), line(4, "")]
    broken = PromptLine(index=5, line_number=6, prompt_id="p5", error=PromptError("x", "broken"))
    found = prepared([*lines, broken], special=False)
    assert [request.prompt_ids for request in found.requests] == [(97,), (1, 98)]
    kinds = {rejected.request_id: rejected.error_kind for rejected in found.rejected}
    assert kinds == {"p1": "tokenizer", "p2": "chat_template", "p4": "empty_prompt", "p5": "x"}
    assert found.warnings == ()


def test_special_tokens_are_added_to_prompts_and_not_to_conversations() -> None:
    found = prepared([line(0, "a"), line(1, chat="a")])
    assert [request.prompt_ids for request in found.requests] == [(1, 97), (1, 97)]


def test_what_a_line_says_of_its_conversation_reaches_the_template() -> None:
    options = ChatOptions(tools=({"type": "function"},), continue_final_message=True)
    tokenizer = ScriptedTokenizer()
    asked = PromptLine(
        index=0,
        line_number=1,
        prompt_id="a",
        messages=({"role": "user", "content": "b"},),
        chat_options=options,
        sampling=SamplingParams(),
    )
    prepared([asked], tokenizer)
    assert tokenizer.options == [options]


def test_many_lines_keep_their_order_and_are_tokenised_in_parts() -> None:
    tokenizer = ScriptedTokenizer()
    lines = [line(i, chr(97 + i % 26)) if i % 3 else line(i, chat="x") for i in range(2000)]
    found = prepared(lines, tokenizer)
    assert [request.index for request in found.requests] == list(range(2000))
    assert found.requests[1000].prompt_ids == (1, 97 + 1000 % 26)
    assert tokenizer.most_texts < 600


def test_a_stop_string_that_is_a_special_token_becomes_a_stop_id() -> None:
    found = prepared([line(0, "a", stop=("<end>", "x<end>", "end"), stop_token_ids=(7, 2))])
    (request,) = found.requests
    assert request.sampling.stop == ("x<end>", "end")
    assert request.sampling.stop_token_ids == (7, 2)
    found = prepared([line(0, "a", stop=("<end>",))])
    assert found.requests[0].sampling.stop_token_ids == (2,)
    assert found.requests[0].sampling.stop == ()


def test_stop_ids_that_no_model_can_make_are_left_out_with_one_warning() -> None:
    lines = [line(i, "a", stop_token_ids=(3, 10**30)) for i in range(5)]
    found = prepared([*lines, line(5, "a", stop=("<image>",)), line(6, "a", stop_token_ids=(3,))])
    assert {request.sampling.stop_token_ids for request in found.requests} == {(3,), ()}
    (warning,) = found.warnings
    assert "6 prompts" in warning
    assert str(10**30) in warning


def test_prompts_that_begin_with_bos_are_counted_in_one_warning() -> None:
    lines = [line(0, "<bos>a"), line(1, "<bos>b"), line(2, "c"), line(3, chat="<bos>d")]
    found = prepared(lines)
    assert found.requests[0].prompt_ids == (1, 1, 97)  # unchanged, as in transformers
    (warning,) = found.warnings
    assert "2 prompts begin with <bos>" in warning
    assert prepared(lines, special=False).warnings == ()


def test_a_model_that_renders_no_conversation_is_told_once() -> None:
    found = prepared([line(0, chat="refuse"), line(1, "a"), line(2, chat="refuse")])
    (warning,) = found.warnings
    assert "none of the 2 prompts with messages" in warning
    assert "no such roles" in warning
    assert [request.request_id for request in found.requests] == ["p1"]


# ---- foreign code --------------------------------------------------------------------------------


class PanicException(BaseException):
    """What a panic in a Rust library looks like."""


PanicException.__module__ = "pyo3_runtime"


class UnspeakableError(Exception):
    """Its text is code that fails."""

    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        MemoryError(),
        RecursionError("deep"),
        PanicException("index"),
        UnspeakableError(),
    ],
)
def test_whatever_foreign_code_raises_is_the_error_of_the_prompt(error: BaseException) -> None:
    with (
        pytest.raises(PromptError, match="it fails") as caught,
        foreign_code("k", "it fails", "do"),
    ):
        raise error
    assert caught.value.kind == "k"
    assert type(error).__name__ in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_interrupts_are_not_the_error_of_a_prompt(error: BaseException) -> None:
    with pytest.raises(type(error)), foreign_code("k", "it fails", "do"):
        raise error


def test_an_endless_reason_is_cut() -> None:
    assert len(in_short(ValueError("x" * 10_000))) <= 300
