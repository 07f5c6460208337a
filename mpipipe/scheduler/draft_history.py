"""`DraftHistory`: where the ids of one sequence have occurred before, and whether that foretold.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; vLLM
calls it n-gram speculative decoding): where the last few ids of a sequence have occurred before,
what followed them there is likely to follow again. How often it does is known without a single
draft: every token that the model chose is compared with what would have been drafted for it.
"""

from __future__ import annotations

__all__ = ["DraftHistory"]

_NGRAMS = (4, 3, 2)  # ids that must recur, the longest first: one id alone recurs by chance
# Of the tokens that could be foreseen the latest count most: each 0.9 times as much as the one
# behind it. Before any, one in twenty is expected to be foreseen, with the weight of two tokens.
_MEMORY = 0.9
_EXPECTED, _WEIGHT = 0.05, 2.0


class DraftHistory:
    """A sequence's text by n-grams, and how often it was foreseen lately.

    Args:
        tokens: prompt and completion: the list that grows.
        num_prompt_tokens: these were not chosen by the model.
    """

    def __init__(self, tokens: list[int], num_prompt_tokens: int) -> None:
        self._tokens = tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram → the place behind its latest one
        self._num_read = 0
        self._foreseen = _EXPECTED * _WEIGHT
        self._judged = _WEIGHT

    @property
    def chance(self) -> float:
        """That a drafted token is the right one, if those before it are."""
        return self._foreseen / self._judged

    def read(self) -> None:
        """Take up the tokens that came since: judge what was foreseen of them, then know them."""
        tokens, follows = self._tokens, self._follows
        for place in range(self._num_read, len(tokens)):
            if place >= self._num_prompt_tokens:
                found = self._find(place)
                if found is not None:
                    self._judge(tokens[found] == tokens[place])
            for size in _NGRAMS:
                if place >= size:
                    follows[tuple(tokens[place - size : place])] = place
        self._num_read = len(tokens)

    def draft(self, num_tokens: int) -> tuple[int, ...]:
        """What is likely to come behind all that was read; empty where nothing recurs.

        What recurs up to the end of the text is taken to go on recurring.
        """
        found = self._find(self._num_read) if num_tokens > 0 else None
        if found is None:
            return ()
        known = self._tokens[found : min(found + num_tokens, self._num_read)]
        times = -(-num_tokens // len(known))
        return tuple((known * times)[:num_tokens])

    def _find(self, end: int) -> int | None:
        """Where the longest n-gram that ends the first `end` tokens went on, in those before."""
        for size in _NGRAMS:
            if end >= size:
                found = self._follows.get(tuple(self._tokens[end - size : end]))
                if found is not None:
                    return found
        return None

    def _judge(self, is_foreseen: bool) -> None:
        self._foreseen = self._foreseen * _MEMORY + is_foreseen
        self._judged = self._judged * _MEMORY + 1
