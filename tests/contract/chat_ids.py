"""The ids of a conversation, as a run computes them."""

from __future__ import annotations

from collections.abc import Sequence

from mpipipe.models.chat import Message
from mpipipe.models.tokenizer_base import Tokenizer


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """The template writes the special tokens out, so none is added."""
    return tokenizer.encode(tokenizer.render(messages), add_special_tokens=False)
