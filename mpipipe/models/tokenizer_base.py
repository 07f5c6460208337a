"""What the runtime needs of a tokenizer, whichever library reads its files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpipipe.config.chat_fields import PLAIN_CHAT, ChatOptions
from mpipipe.errors import PromptError
from mpipipe.models.foreign import DECODE_FAILED, ENCODE_FAILED, foreign_code

if TYPE_CHECKING:
    from mpipipe.models.chat import ChatRenderer, Message

__all__ = ["NoTokenizer", "Tokenizer"]


class Tokenizer(ABC):
    """Text to ids and back, and conversations to text.

    What the tokenizer's own code raises on a text or on ids becomes a `PromptError`, of kind
    `tokenizer` in `encode` and `token_text`, of kind `detokenize` in `decode`.
    """

    vocab_size: int  # one more than the largest id that `encode` can return
    bos_token_id: int | None  # beginning of sequence
    # End of sequence, as the tokenizer's files say; the model's own list has precedence.
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]  # that `decode` skips: their texts and ids
    # Whether `decode_all` lets other threads run, and may run beside `decode`.
    decodes_beside: bool = False

    def __init__(self, renderer: ChatRenderer) -> None:
        self._renderer = renderer

    def token_text(self, token_id: int) -> str:
        """The token of an id, as the vocabulary writes it: for messages."""
        with foreign_code("tokenizer", f"token {token_id} has no text", "copy the tokenizer again"):
            return self._token_text(token_id)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of `text`; special tokens written out in it are recognised.

        With `add_special_tokens`, those that the model expects round a text are added (BOS).
        """
        with foreign_code(*ENCODE_FAILED):
            return tuple(self._encode(text, add_special_tokens))

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool
    ) -> list[tuple[int, ...] | PromptError]:
        """`encode` of every text, its error where it has one."""
        found: list[tuple[int, ...] | PromptError] = []
        for text in texts:
            try:
                found.append(self.encode(text, add_special_tokens))
            except PromptError as error:
                found.append(error)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`: special tokens and ids beyond the vocabulary are skipped."""
        with foreign_code(*DECODE_FAILED):
            return self._decode(ids)

    def decode_all(self, all_ids: Sequence[Sequence[int]]) -> list[str | PromptError]:
        """`decode` of each of them, its error where it has one."""
        found: list[str | PromptError] = []
        for ids in all_ids:
            try:
                found.append(self.decode(ids))
            except PromptError as error:
                found.append(error)
        return found

    def render(self, messages: Sequence[Message], options: ChatOptions = PLAIN_CHAT) -> str:
        """A conversation through the model's chat template: special tokens written out.

        Raises:
            PromptError: the model has no chat template, or its template does not take the messages.
        """
        return self._renderer.render(messages, options)

    @abstractmethod
    def _token_text(self, token_id: int) -> str: ...

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> Iterable[int]: ...

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...


class NoTokenizer(Tokenizer):
    """For a model folder without a tokenizer: prompts are ids, completions have no text."""

    vocab_size = 0
    bos_token_id = None
    eos_token_ids = ()
    special_tokens: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        """Has no chat template either."""

    def _token_text(self, token_id: int) -> str:
        return str(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> Iterable[int]:
        raise AssertionError(f"{text!r} needs a tokenizer, special tokens: {add_special_tokens}")

    def _decode(self, ids: Sequence[int]) -> str:  # noqa: ARG002 - no id has a text
        return ""
