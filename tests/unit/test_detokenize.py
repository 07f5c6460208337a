from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipipe.scheduler.detokenize import (
    IncrementalDetokenizer,
    SpecialTokens,
    StopStrings,
    StopWatch,
)


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: every id is a byte; 256 is a special token without text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class WordDecoder:
    """Like sentencepiece: words with a leading space, single bytes where no word fits.

    The first space of a text is dropped; a run of bytes that is not valid UTF-8 as a whole becomes
    one replacement character for each byte.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)

    def __call__(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run = b""
        for i in [*ids, 256]:
            if i < 256:
                run += bytes([i])
                continue
            try:
                parts.append(run.decode())
            except UnicodeDecodeError:
                parts.append("\ufffd" * len(run))
            run = b""
            if i > 256:
                parts.append(self.words[i - 257])
        return "".join(parts).removeprefix(" ")


def pieces(decode: object, ids: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(decode)  # type: ignore[arg-type]
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_ascii_comes_out_at_once() -> None:
    assert pieces(decode_bytes, b"hi!") == ["h", "i", "!", ""]


def test_an_emoji_spread_over_four_tokens_comes_out_with_the_last() -> None:
    assert pieces(decode_bytes, "a😀b".encode()) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_comes_out_at_the_end_as_replacement() -> None:
    assert pieces(decode_bytes, "é😀".encode()[:-1]) == ["", "é", "", "", "", "\ufffd"]


def test_a_complete_character_is_not_held_back_by_the_unfinished_one_behind_it() -> None:
    words = {0: "é".encode() + "😀".encode()[:2], 1: "😀".encode()[2:] + b"!"}

    def decode(ids: Sequence[int]) -> str:
        return b"".join(words[i] for i in ids).decode("utf-8", errors="replace")

    assert pieces(decode, [0, 1]) == ["é", "😀!", ""]


def test_a_run_of_bytes_that_is_undone_by_the_next_byte_is_not_given_out_twice() -> None:
    ids = [*"€😀".encode()]
    assert pieces(WordDecoder([]), ids) == ["", "", "€", "", "", "", "😀", ""]


def test_words_keep_their_leading_space_except_at_the_start() -> None:
    ids = [257, 258, 257, 258] * 10
    text = " ".join(["the", "cat"] * 20)
    assert "".join(pieces(WordDecoder([" the", " cat"]), ids)) == text


def test_special_tokens_without_text_do_not_cost_the_next_word_its_space() -> None:
    ids = [257] * 12 + [256] * 5 + [257]
    assert "".join(pieces(WordDecoder([" a"]), ids)) == " ".join(["a"] * 13)


def test_a_spaceless_word_after_a_lone_space_is_right_at_every_window_position() -> None:
    decode = WordDecoder([" ", " a", "b"])
    for num_before in range(1, 20):
        ids = [258] * num_before + [257, 259, 257, 258]
        assert "".join(pieces(decode, ids)) == decode(ids)


def test_the_window_stays_short_whatever_comes() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    text = "".join(pieces(decode, [255] * 500 + [256] * 500 + [104, 105]))
    assert text.endswith("hi")
    assert text.count("\ufffd") == 500
    assert longest <= 64


@pytest.mark.parametrize("num_textless", [1, 59, 63, 64, 65, 200, 5000])
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_is_whole_however_many_tokens_without_text_lie_in_it(
    character: str, num_textless: int
) -> None:
    first, *rest = character.encode()
    ids = [*b"so ", first, *[256] * num_textless, *rest, *b"!"]
    stream = IncrementalDetokenizer(decode_bytes)
    out = "".join(stream.push(i) for i in ids)
    assert out == f"so {character}!"  # as the tokens come, not only at the end


def test_different_tokens_without_text_are_as_harmless_as_one() -> None:
    ids = [*"€".encode()[:1], *range(256, 400), *range(256, 400), *"€".encode()[1:]]
    assert "".join(pieces(decode_bytes, ids)) == "€"


def test_letters_that_a_bad_byte_undoes_are_not_given_out_twice() -> None:
    """A run of bytes that is judged as a whole: what was out stays out, and is not repeated."""
    for num_letters in range(1, 30):
        for num_bad in range(1, 12):
            ids = [*b"abc" * num_letters, *[255] * num_bad, 258]
            decode = WordDecoder(["", " end"])
            out = "".join(pieces(decode, ids))
            assert out.startswith("abc" * num_letters)
            assert out.endswith(" end")
            assert len(out) == len(decode(ids))


def test_text_that_is_hidden_for_a_moment_is_not_given_out_twice() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "" if ids and ids[-1] == 256 else decode_bytes(ids)

    assert "".join(pieces(decode, [*b"abc", 256, *b"de"])) == "abcde"


def test_lone_spaces_at_the_start_are_not_taken_for_tokens_without_text() -> None:
    decode = WordDecoder([" ", " a", "b"])
    for num_spaces in range(1, 40):
        ids = [257] * num_spaces + [259]
        stream = IncrementalDetokenizer(decode)
        assert "".join(stream.push(i) for i in ids) == decode(ids)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 260), st.sampled_from([1, 1, 1, 2, 30, 90])), max_size=40))
def test_any_bytes_and_any_runs_come_out_as_they_are_decoded(runs: list[tuple[int, int]]) -> None:
    ids = [token for token, count in runs for _ in range(count)]
    whole, out = decode_bytes(ids), ""
    stream = IncrementalDetokenizer(decode_bytes)
    for token in ids:
        out += stream.push(token)
        assert whole.startswith(out)
    assert out + stream.finish() == whole


@pytest.mark.parametrize("run", [[255], [256], [0x97, 0xE6, 0xBC, 0xA2], [*"😀".encode()]])
def test_a_token_costs_the_same_however_many_came_before(run: list[int]) -> None:
    num_decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode_bytes(ids)

    ids = [0xE6, *(run * 20_000)[:20_000]]
    assert "".join(pieces(decode, ids)) == decode_bytes(ids)
    assert num_decoded < 50 * len(ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 5), min_size=40, max_size=160))
def test_any_text_in_any_tokens_comes_out_whole(text: str, cuts: list[int]) -> None:
    raw = text.encode()
    tokens: list[bytes] = []
    for cut in cuts:
        tokens.append(raw[:cut])
        raw = raw[cut:]
    tokens.append(raw)

    def decode(ids: Sequence[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")

    out = pieces(decode, range(len(tokens)))
    assert "".join(out) == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([" the", " a", "b", " ", "€", "😀", "ü"]), max_size=60))
def test_words_and_byte_runs_come_out_as_the_decoder_says(parts: list[str]) -> None:
    words = [" the", " a", "b", " "]
    ids: list[int] = []
    for part in parts:
        ids += [257 + words.index(part)] if part in words else [*part.encode()]
    decode = WordDecoder(words)
    assert "".join(pieces(decode, ids)) == decode(ids)


# ---- stop strings --------------------------------------------------------------------------------


def cut(stops: Sequence[str], tokens: Sequence[str]) -> tuple[str, bool]:
    stream = StopStrings(stops)
    out = ""
    for token in tokens:
        text, stopped = stream.push(token)
        out += text
        if stopped:
            break
    return out + stream.finish(), stream.stopped


def test_without_stops_everything_passes_at_once() -> None:
    stream = StopStrings(())
    assert stream.push("abc") == ("abc", False)
    assert stream.finish() == ""


def test_a_stop_string_inside_one_token_ends_the_text_before_it() -> None:
    assert StopStrings(["STOP"]).push("one STOP two") == ("one ", True)


def test_a_stop_string_across_three_tokens_is_held_back_and_never_given_out() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("ok\n") == ("ok", False)
    assert stream.push("\nUs") == ("", False)
    assert stream.push("er: hi") == ("", True)
    assert stream.push("more") == ("", True)
    assert stream.finish() == ""


def test_a_false_alarm_is_given_out_as_soon_as_it_is_known() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("ok\n\nUs") == ("ok", False)
    assert stream.push("ual") == ("\n\nUsual", False)


def test_a_partial_match_at_the_end_of_the_text_is_text() -> None:
    assert cut(["END"], ["the E", "N"]) == ("the EN", False)


def test_a_shorter_restart_within_a_failed_match_is_still_found() -> None:
    assert cut(["aab"], list("xaaab")) == ("xa", True)


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["b", "a"], "xxabyy", "xx"),  # the earliest in the text, not the first in the list
        (["abcd", "bc"], "xabcd", "xa"),  # complete first
        (["bc", "abc"], "xabc", "x"),  # complete together: the longest
        (["aa"], "xaaa", "x"),
        (["", "b"], "abc", "a"),  # an empty stop string is none
    ],
)
def test_overlapping_stops(stops: list[str], text: str, expected: str) -> None:
    assert cut(stops, [text]) == (expected, True)
    assert cut(stops, list(text)) == (expected, True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 6), max_size=30),
)
def test_the_outcome_does_not_depend_on_token_borders(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    tokens, rest = [], text
    for length in cuts:
        tokens.append(rest[:length])
        rest = rest[length:]
    out = cut(stops, [*tokens, rest])
    assert out == cut(stops, list(text))
    assert text.startswith(out[0])
    assert out[1] == any(stop in text for stop in stops)
    assert not any(stop in out[0] for stop in stops)


# ---- stop strings with special tokens ------------------------------------------------------------

END, OTHER = 300, 301
SPECIAL = SpecialTokens({"<|end|>": END, "<|other|>": OTHER, "<|end|>x": 302})


def watched(stops: Sequence[str], ids: Sequence[int]) -> tuple[str, bool, int]:
    """The text, whether a stop string was found, and how many ids it took."""
    watch = StopWatch(decode_bytes, stops, SPECIAL)
    num_taken = next((n for n, i in enumerate(ids, start=1) if watch.push(i)), len(ids))
    return watch.finish(), watch.stopped, num_taken


def test_a_stop_string_that_names_a_special_token_is_met_by_the_token() -> None:
    ids = [*b"well done", END, *b"\nmore"]
    assert watched(["done<|end|>\n"], ids) == ("well ", True, 11)
    assert watched(["<|end|>\n"], ids) == ("well done", True, 11)
    assert watched(["done<|end|>"], ids) == ("well ", True, 10)


def test_the_letters_of_a_special_token_are_not_the_token() -> None:
    ids = [*b"done<|end|>\n"]
    assert watched(["done<|end|>\n"], ids) == ("done<|end|>\n", False, 12)


def test_another_special_token_between_is_no_match() -> None:
    ids = [*b"a", OTHER, END, *b"b"]
    assert watched(["a<|end|>"], ids) == ("ab", False, 4)
    assert watched(["a<|other|><|end|>b"], ids) == ("", True, 4)


def test_a_stop_string_without_special_tokens_is_met_across_them() -> None:
    ids = [*b"say Us", OTHER, *b"er: no"]
    assert watched(["User:", "x<|end|>"], ids) == ("say ", True, 10)


def test_the_longest_special_token_counts() -> None:
    assert watched(["<|end|>x"], [END, *b"x"])[1] is False
    assert watched(["<|end|>x"], [302]) == ("", True, 1)


def test_special_tokens_are_never_in_the_text() -> None:
    ids = [*b"a", OTHER, *b"b", END, *b"c"]
    assert watched(["zz<|end|>"], ids) == ("abc", False, 5)
    assert watched(["b<|end|>c"], ids) == ("a", True, 5)


def test_the_token_that_ends_a_completion_may_complete_its_stop_string() -> None:
    watch = StopWatch(decode_bytes, ["done<|end|>"], SPECIAL)
    for token_id in b"well done":
        assert not watch.push(token_id)
    watch.push_stop_token(END)
    assert (watch.finish(), watch.stopped) == ("well ", True)


def test_a_surrogate_in_a_stop_string_meets_no_special_token() -> None:
    assert watched(["\ud801<|end|>", "\ud800<|end|>"], [*b"a", END, OTHER, END]) == ("a", False, 4)
