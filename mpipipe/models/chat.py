"""Conversations to text through the model's chat template, in a process of its own.

Templates are found as transformers finds them: `chat_template.jinja` (called `default`) with
`additional_chat_templates/<name>.jinja`, else `chat_template` in `tokenizer_config.json` (a text, a
list of `{"name", "template"}`, or an object of names and texts), else in `chat_template.json`.

The process (`template_process`) starts with the first conversation, or before (`start_early`),
serves all that follow, and is started again when a rendering ended it. It uses transformers' own
renderer, so the text is the one of `apply_chat_template`.

Invariants: whatever a template does to one conversation is a `PromptError` of that conversation,
within `RenderLimits`; all that a template wastes in failing is bounded, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.config.chat_fields import PLAIN_CHAT, ChatOptions
from mpipipe.errors import CheckpointError, EnvironmentSetupError, PromptError
from mpipipe.models.foreign import foreign_code

__all__ = [
    "ChatRenderer",
    "ChatTemplates",
    "Message",
    "RenderLimits",
    "chat_templates_of",
    "read_chat_templates",
    "start_early",
]

Message = Mapping[str, Any]  # keys "role" and "content", and what the template knows more

_DEFAULT, _WITH_TOOLS = "default", "tool_use"


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The templates of a model folder."""

    named: Mapping[str, str] = field(default_factory=dict)  # a template without a name: `default`
    problem: str = ""  # why what the folder says cannot be used as a template

    def select(self, *, with_tools: bool) -> str:
        """The template for a conversation, as transformers chooses it.

        Raises:
            PromptError: kind `no_chat_template`.
        """
        names = (_WITH_TOOLS, _DEFAULT) if with_tools else (_DEFAULT,)
        for name in names:
            if name in self.named:
                return self.named[name]
        raise PromptError(
            "no_chat_template",
            f'the prompt has "messages", but {self._lacking()}: use a "prompt", or copy the chat '
            "template of an instruction-tuned model into the model's folder",
        )

    def _lacking(self) -> str:
        if self.named:
            names = ", ".join(sorted(self.named))
            return f"none of the model's chat templates ({names}) is called {_DEFAULT}"
        return self.problem or "the model has no chat template"


def read_chat_templates(folder: Path) -> ChatTemplates:
    """The chat templates of a model folder, none where it has none.

    Raises:
        CheckpointError: a file that holds templates cannot be read.
    """
    named = {
        path.name.removesuffix(".jinja"): _text_of(path)
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (folder / "chat_template.jinja").exists():
        named[_DEFAULT] = _text_of(folder / "chat_template.jinja")
    if named:
        return ChatTemplates(named)
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        stated = read_json_object(path).get("chat_template") if path.exists() else None
        if stated:
            return chat_templates_of(stated, str(path))
    return ChatTemplates()


def chat_templates_of(stated: object, where: str) -> ChatTemplates:
    """The templates that a `chat_template` entry holds; one of no known form is a `problem`."""
    if isinstance(stated, str):
        return ChatTemplates({_DEFAULT: stated})
    pairs: list[tuple[object, object]] = []
    if isinstance(stated, dict):
        pairs = list(stated.items())
    elif isinstance(stated, list):
        pairs = [(e.get("name"), e.get("template")) for e in stated if isinstance(e, dict)]
    named = {n: text for n, text in pairs if isinstance(n, str) and isinstance(text, str) and text}
    form = type(stated).__name__
    return ChatTemplates(named, f"chat_template in {where} ({form}) holds no text of a template")


def _text_of(path: Path) -> str:
    require_content(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the chat template {path} cannot be read ({error}): it must be a text in UTF-8; copy "
            "the file again"
        ) from error


_KIND = "chat_template"
_REMEDY = "check their roles, their order and chat_template_kwargs, or the template"


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What the rendering of one conversation may take, and what all that fail may take together.

    Ordinary templates take some 50 µs and as many bytes as their text.
    """

    cpu_s: float = 2.0  # processor time of one rendering
    memory_bytes: int = 1 << 30
    max_characters: int = 4_000_000  # of the text, beside eight times what was given
    # Seconds that failed renderings took, each beyond `cheap_s`, after which the template counts as
    # broken: without one that went well between them, and altogether.
    max_failing_s: float = 8.0
    max_failed_s: float = 60.0
    cheap_s: float = 0.01


class ChatRenderer:
    """Renders conversations with the templates of one model.

    Args:
        templates: of the model's folder.
        special_tokens: what templates know by names such as `bos_token`.
        limits: for tests.
    """

    def __init__(
        self,
        templates: ChatTemplates,
        special_tokens: Mapping[str, str],
        limits: RenderLimits | None = None,
    ) -> None:
        self._templates = templates
        self._special_tokens = dict(special_tokens)
        self._limits = limits or RenderLimits()
        self._one_at_a_time = threading.Lock()  # the library prepares prompts in threads
        self._process: subprocess.Popen[str] | None = None
        self._failing_s = 0.0  # since the last rendering that went well
        self._failed_s = 0.0

    def render(self, messages: Sequence[Message], options: ChatOptions = PLAIN_CHAT) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` makes it.

        Raises:
            PromptError: kind `no_chat_template`, or `chat_template`: the template refuses the
                messages, fails on them, takes too long or too much, or has done so too often.
            EnvironmentSetupError: no process can be started.
        """
        template = self._templates.select(with_tools=bool(options.tools))
        with foreign_code(_KIND, "the conversation cannot be passed on", "use plain JSON values"):
            line = json.dumps(self._request(template, messages, options))
        with self._one_at_a_time:
            self._refuse_if_broken()
            started_s = time.monotonic()
            try:
                text = self._exchange(line)
            except PromptError:
                wasted_s = max(0.0, time.monotonic() - started_s - self._limits.cheap_s)
                self._failing_s += wasted_s
                self._failed_s += wasted_s
                raise
            self._failing_s = 0.0
            return text

    def _request(
        self, template: str, messages: Sequence[Message], options: ChatOptions
    ) -> dict[str, Any]:
        settings = {
            "tools": list(options.tools) or None,
            "add_generation_prompt": options.add_generation_prompt
            and not options.continue_final_message,
            "continue_final_message": options.continue_final_message,
        }
        return {
            "template": template,
            # As apply_chat_template does: a key without a value is the same as no key.
            "messages": [
                {key: value for key, value in message.items() if value is not None}
                for message in messages
            ],
            "options": {**self._special_tokens, **options.template_kwargs, **settings},
        }

    def _refuse_if_broken(self) -> None:
        limits = self._limits
        if self._failing_s < limits.max_failing_s and self._failed_s < limits.max_failed_s:
            return
        raise PromptError(
            _KIND,
            f"the model's chat template counts as broken: prompts before this one failed in it for "
            f"{self._failed_s:.0f} s; run this prompt without those, or mend the template",
        )

    def _exchange(self, line: str) -> str:
        answer = self._ask(self._running(), line)
        if answer is None:
            raise PromptError(_KIND, f"the model's chat template {self._cause_of_death()}")
        if "error" in answer:
            raise PromptError(
                _KIND,
                "the model's chat template does not accept the messages "
                f"({answer['error']}): {_REMEDY}",
            )
        return str(answer["text"])

    # ---- the process -----------------------------------------------------------------------------

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        try:
            process = _EARLY.pop() if _EARLY else _started()
        except OSError as error:
            raise _cannot_start(f"{error.strerror or error}") from error
        self._process = process
        weakref.finalize(self, _end_process, process)
        if self._ask(process, json.dumps(dataclasses.asdict(self._limits))) is None:
            code = self._end()
            raise _cannot_start(f"it ended with {code}")
        return process

    def _ask(self, process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
        """The answer to `line`; None when the process has ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            found: dict[str, Any] | None = json.loads(answer) if answer.endswith("\n") else None
        except BrokenPipeError:
            return None
        except BaseException:  # interrupted half-way: the next answer would be the wrong one
            self._end()
            raise
        return found

    def _end(self) -> int:
        """The exit status of the process, ended if it was not."""
        process, self._process = self._process, None
        return 0 if process is None else _end_process(process)

    def _cause_of_death(self) -> str:
        code = self._end()
        if code == -signal.SIGPROF:
            return (
                f"takes more than {self._limits.cpu_s:g} s of processor time for the messages: it "
                f"may never end; {_REMEDY}"
            )
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"crashed the process that renders it ({cause}): {_REMEDY}"


_EARLY: list[subprocess.Popen[str]] = []  # no renderer's yet


def start_early() -> None:
    """Start the process of the first renderer: it imports for a second or more before it serves."""
    with suppress(OSError):  # the renderer will tell
        _EARLY.append(_started())


def _started() -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "mpipipe.models.template_process"]
    # It must find the same modules, wherever this process has them from.
    places = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
        encoding="ascii",
    )


def _end_process(process: subprocess.Popen[str]) -> int:
    """Its exit status: its own where it has ended already."""
    if process.returncode is None:
        try:
            process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    return process.returncode


def _cannot_start(reason: str) -> EnvironmentSetupError:
    return EnvironmentSetupError(
        f"the process that renders chat templates did not start ({reason}): the limits on "
        "processes or memory (ulimit) may be too low; raise them, or use prompts without messages"
    )
