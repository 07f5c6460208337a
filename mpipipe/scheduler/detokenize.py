"""From token ids to text while tokens arrive: whole characters only, up to a stop string.

Not here: tokenizers; the caller brings a function from ids to text. It must be called with
special tokens skipped and without "clean up" of spaces, which would change text already given out.
Invariants: what was given out is never taken back; for ids that decode to valid UTF-8, all of it
joined is the text of all ids together (up to the stop string), wherever the token borders lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

__all__ = ["IncrementalDetokenizer", "StopStrings", "StopWatch"]

# What decoders put for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"

# Ids decoded together before the window moves on: one `decode` per token and one more per move.
_WINDOW_TOKENS = 8
# A window that found no place to move to is garbage (or tokens without text): bounds its cost.
_MAX_WINDOW_TOKENS = 64
_CONTEXT_TOKENS = 4


class IncrementalDetokenizer:
    """Text of a growing list of ids, decoded in a short window instead of from the start.

    The window begins with ids whose text is out already. Without them a sentencepiece decoder would
    drop the space that leads a word, as it does at the start of a text. It moves on only to a place
    between two characters, so a character spread over several byte tokens is decoded as a whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that are out
        self._clean = 0  # ids whose text is complete and out; the latest that added text

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # Bytes of a character that is still to come decode to replacement characters at the end.
        # They are held back, and so is text of which they changed what came before (byte-fallback
        # decoders replace a whole run of bytes until it is complete): it is shorter or equal then.
        complete = text.rstrip(_REPLACEMENT)
        new = complete[self._given :]
        self._given += len(new)
        if new and len(complete) == len(text):
            self._move_window()
        elif len(self._ids) >= _MAX_WINDOW_TOKENS:
            new += self.finish()
            self._cut_window(len(self._ids) - _CONTEXT_TOKENS)
        return new

    def finish(self) -> str:
        """What was held back: bytes that never became a character, as replacement characters."""
        new = self._decode(self._ids)[self._given :] if self._ids else ""
        self._given += len(new)
        return new

    def _move_window(self) -> None:
        """All text is out. Drop the ids before the previous such place when the window is long."""
        if self._clean and len(self._ids) > _WINDOW_TOKENS:
            self._cut_window(self._clean)
        self._clean = len(self._ids)

    def _cut_window(self, num_ids: int) -> None:
        del self._ids[:num_ids]
        self._given = len(self._decode(self._ids))
        self._clean = 0


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


class StopWatch:
    """The text of one completion, watched for stop strings as its tokens arrive."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Iterable[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._stops = StopStrings(stops)
        self._text: list[str] = []

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stops.stopped

    def push(self, token_id: int) -> bool:
        """Take one token; returns whether a stop string is complete."""
        text, stopped = self._stops.push(self._detokenizer.push(token_id))
        self._text.append(text)
        return stopped

    def finish(self) -> str:
        """All text, up to the stop string; no token may follow."""
        text, _ = self._stops.push(self._detokenizer.finish())
        self._text.extend((text, self._stops.finish()))
        return "".join(self._text)
