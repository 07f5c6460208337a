"""What turns prompts into tokens: templates, tokenizers and their files. Needs transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from mpipipe.config.prompts import PromptLine, read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.models.chat import ChatRenderer, ChatTemplates, RenderLimits
from mpipipe.models.tokenizer import open_tokenizer
from mpipipe.models.tokenizer_base import Tokenizer
from mpipipe.runtime.requests import prepare
from tests.fuzz import seeds
from tests.fuzz.engine import Check, Target
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_json_lines

__all__ = ["TEXT_TARGETS"]

# Quick to give up, and never tired of broken templates.
_LIMITS = RenderLimits(cpu_s=0.5, max_failing_s=math.inf, max_failed_s=math.inf)
_SLOW_TEMPLATE_S = 5.0  # 20 s by the clock: a process that a template has ended is started again
_TAG_END = re.compile(rb"[%}]}")
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m.content | trim + eos_token }}{% endfor %}"
)
_TOOLS = (
    "{% set ns = namespace(n=0) %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.role.upper()[:1] }}: {{ m['content'] }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}"
    "({{ c.function.arguments }}){% endfor %}{% endif %}\n{% endfor %}"
    "{% if thinking %}<think>{% endif %}{{ 7 // ns.n }}"
)
_TEMPLATES = (_CHATML, _STRICT, _TOOLS)
# Each costs the process that renders, and seconds: only now and then.
_HOSTILE = (
    b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    b"{{ 'a' * 10**9 }}",
    b"{{ 9 ** 9 ** 9 }}",
)
_HOSTILE_SHARE = 0.001
_JINJA = (
    b"{{ messages }}",
    b"{{ 1/0 }}",
    b"{{ messages[9] }}",
    b"{{ x.y.z }}",
    b"{{ none + 1 }}",
    b"{% break %}",
    b"{% for i in range(99999) %}a{% endfor %}",
    b"{% for i in range(100000000) %}{% endfor %}",
    b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    b"{% include 'x' %}",
    b"{% import 'x' as y %}",
    b"{{ ''.__class__.__mro__ }}",
    b"{{ messages | tojson }}",
    b"{{ strftime_now('%Y') }}",
    b"{{ raise_exception(1) }}",
    b"{{ messages | sort }}",
    b"{{ '%d' | format('x') }}",
    b"{{ messages.pop() }}",
    b"{{ 'a' | int(base=99) }}",
    b"{% set messages = 3 %}",
    b"{{ '\\ud800' }}",
    b"{% generation %}{% endgeneration %}",
    b"{{ {}[[]] }}",
    b"{{ 'x'.encode('nope') }}",
    b"{{ '{0.a}'.format(1) }}",
    b"{{ range(-1)[0] }}",
    b"{% raw %}",
    b"{#",
    b"{{",
    b"}}",
    b"%}",
    b"{{ messages | map(attribute='content') | join }}",
    b"{{ lipsum }}",
    b"{{ dict(a=1)['b'].c }}",
    b"{% extends 3 %}",
    b"{% call x() %}{% endcall %}",
    b"{{ 'a' | tojson(indent=-5) }}",
    b"{{ 'a' | wordwrap(0) }}",
    b"{{ ['a'] | batch(0) | list }}",
)


def _raw_tokenizer() -> RawTokenizer:
    """One token a byte, and the special ones."""
    vocabulary = {name: number for number, name in enumerate(_SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    raw = RawTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    return raw


_FACTS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "added_tokens_decoder": {
        "2": {"content": "<|im_start|>", "special": True, "normalized": False},
        "3": {"content": "<|im_end|>", "special": True},
    },
    "model_max_length": 128,
    "clean_up_tokenization_spaces": False,
}


def _write_folder(folder: Path, template: str, *, sentencepiece: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    facts = {**_FACTS, "chat_template": template}
    if sentencepiece:
        facts |= {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {}}
        SentencePieceTrainer.train(
            sentence_iterator=iter([f"the quick brown fox number {n} jumps" for n in range(50)]),
            model_prefix=str(folder / "tokenizer"),
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
        )
    else:
        _raw_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_bytes(seeds.MODEL_CONFIGS[0])
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def _lines(path: Path, content: bytes) -> list[PromptLine]:
    path.write_bytes(content)
    return read_prompts(path, GenerationConfig())


def _prepare(lines: Sequence[PromptLine], tokenizer: Tokenizer) -> None:
    prepared = prepare(lines, tokenizer, add_special_tokens=True)
    assert prepared.num_prompts == len(lines), "a line is a request or an error record"
    for request in prepared.requests:
        assert request.prompt_ids
        assert all(0 <= number < tokenizer.vocab_size for number in request.prompt_ids)


def _messages(folder: Path) -> Check:
    tokenizers = [
        open_tokenizer(_write_folder(folder / f"model{n}", template, sentencepiece=n == 0))
        for n, template in enumerate(_TEMPLATES)
    ]

    def check(content: bytes) -> None:
        lines = _lines(folder / "prompts.jsonl", content)
        for tokenizer in tokenizers:
            _prepare(lines, tokenizer)

    return check


def _template(folder: Path) -> Check:
    """Templates of one renderer: its process takes much longer to start than to render."""
    named = {"default": ""}
    tokenizer = open_tokenizer(_write_folder(folder / "model", _CHATML))
    renderer = ChatRenderer(ChatTemplates(named), {"bos_token": "<s>"}, _LIMITS)
    conversations = [
        (line.messages, line.chat_options)
        for line in _lines(folder / "prompts.jsonl", seeds.PROMPTS[1])
        if line.messages is not None
    ]

    def check(content: bytes) -> None:
        named["default"] = content.decode("utf-8", "replace")
        for messages, options in conversations:
            tokenizer.encode(renderer.render(messages, options), add_special_tokens=False)

    return check


def _mutate_template(rng: Random, content: bytes, corpus: Sequence[bytes]) -> bytes:
    """Bytes changed, or something put in: most times where a template can be read again."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content, corpus)
    between = [0, *(found.end() for found in _TAG_END.finditer(content)), len(content)]
    place = rng.choice(between) if rng.random() < 0.9 else rng.randint(0, len(content))
    added = rng.choice(_HOSTILE if rng.random() < _HOSTILE_SHARE else _JINJA)
    return content[:place] + added + content[place:]


def _file(name: str, *, sentencepiece: bool = False) -> Callable[[Path], Check]:
    """One file of a tokenizer's folder, opened and used anew with each input.

    Not for conversations: each tokenizer starts a process of its own for them.
    """

    def open_in(folder: Path) -> Check:
        model = _write_folder(folder / "model", _TEMPLATES[0], sentencepiece=sentencepiece)
        lines = _lines(folder / "prompts.jsonl", seeds.PROMPTS[0])

        def check(content: bytes) -> None:
            (model / name).write_bytes(content)
            tokenizer = open_tokenizer(model)
            _prepare(lines, tokenizer)
            tokenizer.decode(range(-1, 310))

        return check

    return open_in


def _text(folder: Path) -> Check:
    tokenizers = [
        open_tokenizer(_write_folder(folder / f"model{n}", _TEMPLATES[0], sentencepiece=n == 1))
        for n in range(2)
    ]

    def check(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        for tokenizer in tokenizers:
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert all(0 <= number < tokenizer.vocab_size for number in ids)
            tokenizer.decode([*ids, -1, 2**31, 2**40])
            tokenizer.decode(content)

    return check


_FACTS_SEEDS = (
    json.dumps({**_FACTS, "chat_template": _TEMPLATES[0]}).encode(),
    json.dumps(
        {**_FACTS, "chat_template": [{"name": "default", "template": _TEMPLATES[1]}]}
    ).encode(),
    json.dumps(
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    ).encode(),
)
_TEMPLATE_SEEDS = tuple(template.encode() for template in _TEMPLATES)

TEXT_TARGETS: tuple[Target, ...] = (
    Target("template", _template, _TEMPLATE_SEEDS, _mutate_template, slow_s=_SLOW_TEMPLATE_S),
    Target("template-messages", _messages, seeds.PROMPTS, mutate_json_lines),
    Target("tokenizer-text", _text, seeds.TEXTS, mutate_bytes),
    Target("tokenizer-template", _file("chat_template.jinja"), _TEMPLATE_SEEDS, _mutate_template),
    Target(
        "tokenizer-template-sentencepiece",
        _file("chat_template.jinja", sentencepiece=True),
        _TEMPLATE_SEEDS,
        _mutate_template,
    ),
    Target("tokenizer-facts", _file("tokenizer_config.json"), _FACTS_SEEDS, mutate_json),
    Target(
        "tokenizer-facts-sentencepiece",
        _file("tokenizer_config.json", sentencepiece=True),
        _FACTS_SEEDS,
        mutate_json,
    ),
    Target(
        "tokenizer-json",
        _file("tokenizer.json"),
        (_raw_tokenizer().to_str().encode(),),
        mutate_json,
    ),
)
