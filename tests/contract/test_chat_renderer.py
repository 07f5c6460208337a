"""Chat templates as foreign code: as transformers renders them, whatever they do to one prompt."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mpipipe.config.chat_fields import ChatOptions
from mpipipe.errors import CheckpointError, EnvironmentSetupError, PromptError
from mpipipe.models import chat
from mpipipe.models.chat import (
    ChatRenderer,
    ChatTemplates,
    RenderLimits,
    read_chat_templates,
    start_early,
)
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.models.tokenizer_base import Tokenizer
from tests.contract.chat_ids import chat_ids

CHAT = (
    "{{ bos_token }}{% if tools %}{{ tools|tojson }}{% endif %}{% if terse %}Terse.{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.thinking %}[{{ m.thinking }}]"
    "{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "w", "description": "ü", "parameters": {}}}
QUICK = RenderLimits(cpu_s=0.3, memory_bytes=256 << 20, max_characters=100_000)

# What a template can do, by the content of the first message; and a word of the error.
DEEDS = {
    "raise": ("{{ raise_exception('no such role') }}", "no such role"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "undefined": ("{{ messages[7].content.x }}", "UndefinedError"),
    "type": ("{{ 'a' + 1 }}", "TypeError"),
    "overflow": ("{{ range(10 ** 9)|list }}", "OverflowError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "memory": ("{{ 'a' * 10 ** 12 }}", "memory"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(64) %}{% set n.s = n.s * 2 %}{% endfor %}",
        "memory",
    ),
    "size": ("{{ 'a' * 300000 }}", "300000 characters"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "0.3 s of processor time",
    ),
    "one call": ("{{ (messages|length + 8) ** 99999999 }}", "0.3 s of processor time"),
}


def renderer(template: str, limits: RenderLimits = QUICK) -> ChatRenderer:
    return ChatRenderer(ChatTemplates({"default": template}), {"bos_token": "<s>"}, limits)


@pytest.fixture(scope="module")
def misbehaving() -> ChatRenderer:
    branches = "".join(
        f"{{% elif messages[0].content == '{name}' %}}{deed}" for name, (deed, _) in DEEDS.items()
    )
    return renderer("{% if messages[0].content == 'good' %}fine" + branches + "{% endif %}")


@pytest.mark.parametrize("name", DEEDS)
def test_what_a_template_does_to_one_prompt_is_its_error_and_the_next_renders(
    misbehaving: ChatRenderer, name: str
) -> None:
    with pytest.raises(PromptError, match=DEEDS[name][1]) as caught:
        misbehaving.render([{"role": "user", "content": name}])
    assert caught.value.kind == "chat_template"
    assert len(str(caught.value)) < 700
    assert misbehaving.render([{"role": "user", "content": "good"}]) == "fine"


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ " + "(" * 9000, "{% endgeneration %}", "{{ x|no }}"]
)
def test_a_template_that_is_none_is_the_error_of_each_prompt(template: str) -> None:
    with pytest.raises(PromptError, match=r"Template|Recursion"):
        renderer(template).render([USER])


def test_a_template_that_never_ends_is_given_up_after_a_bounded_time() -> None:
    limits = RenderLimits(cpu_s=0.2, max_failing_s=0.5)
    endless = renderer(DEEDS["endless"][0], limits)
    for _ in range(4):  # at least 0.2 s each
        with pytest.raises(PromptError):
            endless.render([USER])
    started_s = time.process_time()
    for _ in range(1000):
        with pytest.raises(PromptError, match="counts as broken"):
            endless.render([USER])
    assert time.process_time() - started_s < 1.0


def test_quick_refusals_never_count_as_a_broken_template(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = RenderLimits()
    num_refused = 3000
    refusing = renderer(
        "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}yes", limits
    )
    assert refusing.render([USER]) == "yes"
    # Each takes half of what is cheap, on any machine; all together would be far too much.
    assert num_refused * limits.cheap_s / 2 > 1.5 * limits.max_failing_s
    readings = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(readings) * limits.cheap_s / 2)
    monkeypatch.setattr(chat, "time", clock)
    for _ in range(num_refused):
        with pytest.raises(PromptError, match="TemplateError: no"):
            refusing.render([{"role": "user", "content": "no"}])
    assert refusing.render([USER]) == "yes"


def test_odd_values_of_the_library_are_the_error_of_their_prompt() -> None:
    plain = renderer("{{ messages[0].content }}")
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for content in (object(), b"bytes", deep, 10**5000):
        with pytest.raises(PromptError, match="cannot be passed on"):
            plain.render([{"role": "user", "content": content}])
    assert plain.render([{"role": "user", "content": "\ud800 ü 漢"}]) == "\ud800 ü 漢"


def test_a_process_that_cannot_start_is_the_environments_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(EnvironmentSetupError, match="did not start"):
        renderer("x").render([USER])


# ---- as transformers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json_tokenizer(tmp_path_factory.mktemp("json"))


def write_json_tokenizer(folder: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "<|end|>")])
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>").save_pretrained(folder)
    return folder


OPTIONS: dict[str, tuple[ChatOptions, dict[str, Any]]] = {
    "plain": (ChatOptions(), {"add_generation_prompt": True}),
    "no cue": (ChatOptions(add_generation_prompt=False), {}),
    "tools": (ChatOptions(tools=(TOOL,)), {"add_generation_prompt": True, "tools": [TOOL]}),
    "words": (
        ChatOptions(template_kwargs={"terse": True, "bos_token": "<b>"}),
        {"add_generation_prompt": True, "terse": True, "bos_token": "<b>"},
    ),
    "continued": (
        ChatOptions(continue_final_message=True, add_generation_prompt=False),
        {"continue_final_message": True},
    ),
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "to go on": [USER, {"role": "assistant", "content": "Well, "}],
    "keys without values": [{**USER, "name": None}, {"role": "assistant", "content": "a\n"}],
    "thinking": [USER, {"role": "assistant", "content": "b", "reasoning_content": "because"}],
}


@pytest.mark.parametrize(
    "template", [CHAT, CHAT.replace("{{ m.content }}", "{{ m.content|trim }}")]
)
def test_conversations_render_as_in_transformers(json_folder: Path, template: str) -> None:
    reference = AutoTokenizer.from_pretrained(json_folder, local_files_only=True)
    ours = ChatRenderer(ChatTemplates({"default": template}), reference.special_tokens_map)
    for asked, (options, words) in OPTIONS.items():
        for name, messages in CONVERSATIONS.items():
            expected = reference.apply_chat_template(
                messages, chat_template=template, tokenize=False, **words
            )
            assert ours.render(messages, options) == expected, f"{name}, {asked}"


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    options = ChatOptions(continue_final_message=True)
    with pytest.raises(PromptError, match="continue_final_message"):
        renderer("{% if messages[0].content %}always this{% endif %}").render([USER], options)


# ---- where templates are -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox jumps over the dog"] * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.fixture(params=["sentencepiece", "tokenizer.json"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, sp_model: bytes) -> Path:
    if request.param == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(sp_model)
        (tmp_path / "tokenizer_config.json").write_text("{}")
    else:
        write_json_tokenizer(tmp_path)
    return tmp_path


def state(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def beside(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


FORMS: dict[str, Callable[[Path], None]] = {
    "text": lambda folder: state(folder, "A"),
    "list": lambda folder: state(
        folder, [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "T"}]
    ),
    "object": lambda folder: state(folder, {"default": "A", "tool_use": "T"}),
    "file": beside("chat_template.jinja", "A"),
    "legacy file": beside("chat_template.json", json.dumps({"chat_template": "A"})),
}


@pytest.mark.parametrize("form", FORMS)
def test_both_kinds_of_tokenizers_find_templates_in_every_form(folder: Path, form: str) -> None:
    FORMS[form](folder)
    tokenizer = open_tokenizer(folder)
    assert tokenizer.render([USER]) == "A"
    expected = "T" if form in {"list", "object"} else "A"
    assert tokenizer.render([USER], ChatOptions(tools=(TOOL,))) == expected
    assert chat_ids(tokenizer, [USER]) == tokenizer.encode("A", add_special_tokens=False)


def test_files_win_over_the_configuration_and_have_names(folder: Path) -> None:
    state(folder, "old")
    beside("chat_template.jinja", "A")(folder)
    beside("additional_chat_templates/tool_use.jinja", "T")(folder)
    assert read_chat_templates(folder).named == {"default": "A", "tool_use": "T"}
    reference = open_tokenizer(folder)
    assert reference.render([USER], ChatOptions(tools=(TOOL,))) == "T"


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (
            [{"name": "chat", "template": "A"}, {"name": "tool_use", "template": "T"}],
            "chat, tool_use",
        ),
        ([], "no chat template"),
        ("", "no chat template"),
        (5, "int"),
        (["A"], "list"),
        ([{"name": "default"}], "list"),
        ({"default": None}, "dict"),
    ],
)
def test_templates_that_serve_no_conversation_leave_prompts_alone(
    folder: Path, stated: object, words: str
) -> None:
    state(folder, stated)
    tokenizer = open_tokenizer(folder)
    with pytest.raises(PromptError, match=words) as caught:
        chat_ids(tokenizer, [USER])
    assert caught.value.kind == "no_chat_template"
    assert tokenizer.decode(tokenizer.encode("the fox", add_special_tokens=True)) == "the fox"


def test_a_template_file_that_is_no_text_is_a_broken_folder(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        open_tokenizer(folder)


# ---- texts that a tokenizer cannot take ----------------------------------------------------------


def outcome(tokenizer: Tokenizer, text: str) -> tuple[int, ...] | str:
    try:
        return tokenizer.encode(text, add_special_tokens=True)
    except PromptError as error:
        return error.kind


def test_a_text_that_is_no_unicode_fails_alone(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    texts = ["the fox", "broken \ud83d end", "the dog", ""]
    found = tokenizer.encode_all(texts, add_special_tokens=True)
    assert [f.kind if isinstance(f, PromptError) else f for f in found] == [
        outcome(tokenizer, text) for text in texts
    ]
    assert found[0] == outcome(tokenizer, "the fox") != "tokenizer"
    assert outcome(tokenizer, texts[1]) == "tokenizer"


def test_a_process_that_was_started_early_is_the_first_renderers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_early()
    (process,) = chat._EARLY
    monkeypatch.setattr(chat, "_started", lambda: pytest.fail("another process was started"))
    early = renderer("{{ messages[0].content }}")
    assert early.render([USER]) == "hi"
    assert early._process is process
    assert not chat._EARLY
