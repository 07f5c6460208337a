"""Texts of completions: watched while tokens arrive, or made of all of them, beside the event loop.

A slot of 64 sequences of 1,000 tokens that end together takes 10 ms to detokenise, in which no step
would leave and no message be read. Libraries that make texts let other threads run meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mpipipe.errors import PromptError
from mpipipe.scheduler.detokenize import NO_SPECIAL_TOKENS, SpecialTokens, StopWatch

__all__ = ["TextMaker", "Texts"]

Texts = list[str | PromptError]  # of each completion its text, or why there is none

# Handing over costs the loop as much as making a text of a hundred tokens.
_MIN_TOKENS = 512


class TextMaker:
    """Makes texts of token ids; its thread starts with the first long ones.

    Args:
        decode: ids to text, special tokens skipped.
        special: the tokenizer's special tokens, which stop strings may name.
        decode_all: `decode` of many, in the thread; None: `decode` does it, in the event loop.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        special: SpecialTokens = NO_SPECIAL_TOKENS,
        decode_all: Callable[[Sequence[Sequence[int]]], Texts] | None = None,
    ) -> None:
        self._decode = decode
        self._special = special
        self._decode_all = decode_all
        self._executor = ThreadPoolExecutor(1, "texts")
        self._num_under_way = 0

    def watch(self, stops: Sequence[str]) -> StopWatch | None:
        """What looks for stop strings in one completion; None: there are none."""
        if not any(stops):
            return None
        return StopWatch(self._decode, [stop for stop in stops if stop], self._special)

    def make(
        self, all_ids: Sequence[Sequence[int]], made: Callable[[asyncio.Future[Texts]], object]
    ) -> Texts | None:
        """The texts, if they are made at once; else None, and `made` is called in the event loop.

        Few tokens are made at once, unless others are under way. A text may overtake one before it.
        """
        decode_all = self._decode_all
        if decode_all is None:
            return [self._text_of(ids) for ids in all_ids]
        if not self._num_under_way and sum(map(len, all_ids)) < _MIN_TOKENS:
            return decode_all(all_ids)
        self._num_under_way += 1
        making = asyncio.wrap_future(self._executor.submit(decode_all, all_ids))
        making.add_done_callback(self._ended)
        making.add_done_callback(made)
        return None

    def _text_of(self, ids: Sequence[int]) -> str | PromptError:
        try:
            return self._decode(ids)
        except PromptError as error:
            return error

    def _ended(self, _: object) -> None:
        self._num_under_way -= 1
