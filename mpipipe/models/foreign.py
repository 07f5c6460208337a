"""Runs code that is not ours: whatever it raises becomes the error of the prompt at hand.

Tokenizers and chat templates come with the model, and a single text can make them fail in any way:
Python exceptions of every kind, and panics of the tokenizers library, which are no `Exception`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpipipe.errors import MpipipeError, PromptError

__all__ = ["DECODE_FAILED", "ENCODE_FAILED", "foreign_code", "in_short"]

# Arguments of `foreign_code`.
ENCODE_FAILED = (
    "tokenizer",
    "the model's tokenizer fails on the text",
    "look for characters in it that are no valid Unicode, or copy the tokenizer's files again",
)
DECODE_FAILED = (
    "detokenize",
    "the model's tokenizer finds no text for the tokens",
    "the tokenizer may be of another model: copy its files again",
)

_PANICS = "pyo3_runtime"  # the module of PanicException, which no package exports
_MAX_REASON = 300  # characters


@contextmanager
def foreign_code(kind: str, what: str, remedy: str) -> Iterator[None]:
    """Turn what is raised inside into `PromptError(kind, "<what> (<reason>): <remedy>")`.

    Errors of our own, interrupts and requests to exit pass unchanged.
    """
    try:
        yield
    except MpipipeError:
        raise
    except BaseException as error:  # a panic is no Exception
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise
        raise PromptError(kind, f"{what} ({in_short(error)}): {remedy}") from error


def in_short(error: BaseException) -> str:
    """The error's kind and text in one short line; for an error of any class."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - the text of a foreign error is foreign code, too
        text = ""
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return reason if len(reason) <= _MAX_REASON else reason[: _MAX_REASON - 1] + "…"
