"""A conversation as a prompt: the message type, and why a conversation can be refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpipipe.errors import PromptError

__all__ = ["Message", "no_chat_template", "refused_by_template"]

Message = Mapping[str, Any]  # keys "role" and "content", and what the template knows more


def no_chat_template() -> PromptError:
    """The model completes text and knows no turns of a conversation."""
    return PromptError(
        "no_chat_template",
        'the prompt has "messages", but the model has no chat template: use a "prompt", or an '
        "instruction-tuned model",
    )


def refused_by_template(error: Exception) -> PromptError:
    """The model's chat template does not take these messages, and says why."""
    return PromptError(
        "chat_template",
        f"the model's chat template does not accept the messages ({error}): check their roles and "
        "their order",
    )
