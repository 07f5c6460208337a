"""A conversation as a prompt: which template of a model renders it, and why it can be refused.

Templates are found as transformers finds them: `chat_template.jinja` (called `default`) with
`additional_chat_templates/<name>.jinja`, else `chat_template` in `tokenizer_config.json` (a text, a
list of `{"name", "template"}`, or an object of names and texts), else in `chat_template.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpipipe.checkpoint.jsonfile import read_json_object, require_content
from mpipipe.errors import CheckpointError, PromptError

__all__ = ["ChatTemplates", "Message", "chat_templates_of", "read_chat_templates"]

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
