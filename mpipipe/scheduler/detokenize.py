"""From token ids to text while tokens arrive: whole characters only, up to a stop string.

This file knows no tokenizer; the caller brings a function from ids to text. It must be called with
special tokens skipped and without "clean up" of spaces, which would change text already given out.
Invariants: what was given out is never taken back; for ids that decode to valid UTF-8, any number
of them, all of it joined is the text of all ids together (up to the stop string), wherever the
token borders lie and however many tokens without text lie between them. So it is for bytes that are
no valid UTF-8, unless the decoder judges a whole run of bytes at once (`ByteFallback` of the
tokenizers library): a bad byte then undoes characters that were out. So a text that no stop string
ended is decoded once more from all its ids (`runner`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "NO_SPECIAL_TOKENS",
    "IncrementalDetokenizer",
    "SpecialTokens",
    "StopStrings",
    "StopWatch",
]

# What decoders put for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"
# Replacements that may still become a character: one for each of three bytes at most. A decoder
# that judges runs of bytes shows one more, for a leading space that it drops once the run is whole.
_MAX_UNFINISHED = 4

# The window is cut to about so many ids when it has twice as many: about two `decode` of some ten
# ids per token, and a few more per cut.
_WINDOW_TOKENS = 8


class IncrementalDetokenizer:
    """Text of a growing list of ids, decoded in a short window instead of from the start.

    The window begins with ids whose text is out already. Without them a sentencepiece decoder would
    drop the space that leads a word, as it does at the start of a text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._text = ""  # of the window
        self._given = ""  # how much of it is out
        self._silent: set[int] = set()  # ids that change nothing at this place, one or many
        self._num_undone = 0  # pushes since what was given began to look different
        self._cut_at = 2 * _WINDOW_TOKENS

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        if token_id in self._silent:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text == self._text and self._is_silent(token_id):
            self._silent.add(token_id)
            return ""
        self._silent.clear()
        self._text = text
        # Bytes of a character that is still to come decode to replacement characters at the end.
        # They are held back, and so is text of which they changed what came before (decoders that
        # judge whole runs of bytes, until the run is complete).
        stable = text[: len(text) - _num_unfinished(text)]
        is_undone = not stable.startswith(self._given)
        self._num_undone = self._num_undone + 1 if is_undone else 0
        may_return = len(stable) < len(text) and self._num_undone <= _MAX_UNFINISHED
        if len(stable) < len(self._given) or (is_undone and may_return):
            return ""
        new = stable[len(self._given) :]
        self._given = stable
        is_all_out = len(stable) == len(text)
        if len(self._ids) >= (2 * _WINDOW_TOKENS if is_all_out else self._cut_at):
            self._cut_window()
        return new

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as replacement characters."""
        new = self._text[len(self._given) :]
        self._given = self._text
        return new

    def _is_silent(self, token_id: int) -> bool:
        """Whether any number of this token, which has just changed nothing, changes nothing.

        Special tokens do so. A lone leading space of sentencepiece does not: the second shows.
        """
        return not self._decode([token_id]) and self._decode([*self._ids, token_id]) == self._text

    def _cut_window(self) -> None:
        """Drop ids at the front while what is left decodes to the end of the window's text.

        The ids that are kept must show a character before the unfinished ones, so that those are
        kept as a whole. A cut inside an older character shows as replacements at the front.
        """
        num_pending = len(self._text) - len(self._given)
        for num_kept in _cuts(len(self._ids)):
            kept = self._ids[-num_kept:]
            text = self._decode(kept)
            whole = text.lstrip(_REPLACEMENT) or text
            is_sure = whole[0:1] != _REPLACEMENT or len(text) > _MAX_UNFINISHED
            if text and is_sure and self._text.endswith(whole) and len(text) >= num_pending:
                self._ids, self._text = kept, text
                self._given = text[: len(text) - num_pending]
                self._cut_at = 2 * _WINDOW_TOKENS
                return
        self._cut_at = 2 * len(self._ids)


def _num_unfinished(text: str) -> int:
    """Replacement characters at the end of `text` that may still become a character."""
    end = text[-_MAX_UNFINISHED:]
    return len(end) - len(end.rstrip(_REPLACEMENT))


def _cuts(num_ids: int) -> Iterable[int]:
    """Numbers of ids to keep, shortest first.

    Four neighbours each: one of them lies between characters even where every id is a byte.
    """
    start = _WINDOW_TOKENS
    while start + 4 <= num_ids:
        yield from range(start, start + 4)
        start *= 2


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first.

    Of several that end at the same character the longest counts. The outcome depends on the text
    only, not on how it is cut into tokens.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""  # the longest end of the text so far that may become a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to give out now, and whether a stop string was found.

        After a stop nothing more is given out.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        self._held = ""
        start = self._find(text)
        if start is not None:
            self._stopped = True
            return text[:start], True
        num_held = self._num_to_hold(text)
        safe = text[: len(text) - num_held]
        self._held = text[len(safe) :]
        return safe, False

    def finish(self) -> str:
        """The text has ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the stop string that ends first starts."""
        found = [(text.find(stop), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class SpecialTokens:
    """The special tokens of a tokenizer, and where a text names them."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = ids
        self.numbers = frozenset(ids.values())
        longest_first = sorted(ids, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def split(self, text: str) -> list[str]:
        """Text and special tokens in turn: text, which may be empty, at the even places."""
        return self._splitter.split(text) if self.ids else [text]


NO_SPECIAL_TOKENS = SpecialTokens({})

# A special token in the text that stop strings with special tokens are looked for in: one that
# none of them names. Surrogates: no decoder makes them, so they are no other text.
_OTHER_TOKEN = "\ud800"
_FIRST_TOKEN = 0xD801
_SURROGATES = re.compile("[\ud800-\udfff]")


class StopWatch:
    """The text of one completion, watched for stop strings as its tokens arrive.

    Stop strings are looked for in the text without special tokens. Those that name special tokens
    ("done<|im_end|>") are looked for in the text with them, where a special token is met by the
    token only, not by its letters. In both cases the completion's text, which never shows special
    tokens, ends where the stop string begins.

    Args:
        decode: ids to text, special tokens skipped.
        stops: the stop strings.
        special: the special tokens that they may name.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Iterable[str],
        special: SpecialTokens = NO_SPECIAL_TOKENS,
    ) -> None:
        parts = [special.split(stop) for stop in stops]
        self._detokenizer = IncrementalDetokenizer(decode)
        self._plain = StopStrings(part[0] for part in parts if len(part) == 1)
        self._text: list[str] = []
        naming = [part for part in parts if len(part) > 1]
        self._special = special.numbers if naming else frozenset()
        self._marks = _marks(naming, special)
        self._marked = StopStrings(_with_marks(naming, special, self._marks))
        self._marked_text: list[str] = []

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._plain.stopped or self._marked.stopped

    def push(self, token_id: int) -> bool:
        """Take one token; returns whether a stop string is complete."""
        return self._take(self._detokenizer.push(token_id), token_id)

    def push_stop_token(self, token_id: int) -> None:
        """Take the token that ended the completion: no text, but a stop string may name it."""
        self._take("", token_id)

    def finish(self) -> str:
        """All text, up to the stop string; no token may follow."""
        self._take(self._detokenizer.finish(), None)
        texts = ["".join((*self._text, self._plain.finish()))]
        if self._marked.stopped:
            texts.append(_SURROGATES.sub("", "".join(self._marked_text)))
        return min(texts, key=len)

    def _take(self, text: str, token_id: int | None) -> bool:
        safe, stopped = self._plain.push(text)
        self._text.append(safe)
        if not self._special:
            return stopped
        if token_id in self._special:
            text += self._marks.get(token_id, _OTHER_TOKEN)
        safe, also = self._marked.push(text)
        self._marked_text.append(safe)
        return stopped or also


def _marks(stops: Iterable[Sequence[str]], special: SpecialTokens) -> dict[int, str]:
    """A character for each special token that the stop strings, split, name."""
    named = sorted({special.ids[token] for stop in stops for token in stop[1::2]})
    return {number: chr(_FIRST_TOKEN + place) for place, number in enumerate(named)}


def _with_marks(
    stops: Iterable[Sequence[str]], special: SpecialTokens, marks: Mapping[int, str]
) -> Iterable[str]:
    """The stop strings with characters for special tokens; left out what no text can contain."""
    for stop in stops:
        if not any(_SURROGATES.search(text) for text in stop[::2]):
            yield "".join(
                marks[special.ids[part]] if place % 2 else part for place, part in enumerate(stop)
            )
