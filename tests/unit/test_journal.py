"""The journal: no completion vanishes unnoticed, whatever becomes of its file."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mpipipe.errors import OutputError
from mpipipe.run_folder import journal as journal_module
from mpipipe.run_folder.journal import CompletionWriter, KeptRecords, merge, read_journals
from mpipipe.run_folder.record_line import completion_json, decode_line, encode_line
from mpipipe.types import Completion, FinishReason, TokenLogprobs

NAMES = [f"p{i}" for i in range(6)]
INDEX_OF = {name: index for index, name in enumerate(NAMES)}


def completion(name: str, text: str = "Größe\n{}", **more: object) -> Completion:
    values = {
        "request_id": name, "index": INDEX_OF.get(name, 0), "text": text, "token_ids": (3, 4),
        "finish_reason": FinishReason.LENGTH, "num_prompt_tokens": 1, "queue_s": 0.25,
        "ttft_s": 0.5, "latency_s": 1.0,
    }  # fmt: skip
    return Completion(**(values | more))  # type: ignore[arg-type]


def line_of(ended: Completion) -> bytes:
    return encode_line(completion_json(ended)) + b"\n"


def line(name: str, text: str = "…") -> bytes:
    return line_of(completion(name, text))


def old_line(name: str, **differs: object) -> bytes:
    """As versions without checksums wrote it."""
    record = json.loads(completion_json(completion(name)))
    return json.dumps(record | differs, ensure_ascii=False).encode()


# ---- a line --------------------------------------------------------------------------------------


def checks(text: bytes) -> bool:
    """As README.md says that a reader may check a line."""
    body, _, rest = text.rpartition(b', "crc32": "')
    return b'%08x"}' % zlib.crc32(body) == rest.rstrip()


def as_documented(completion: Completion) -> dict[str, object]:
    """The record that README.md documents, field by field."""
    record: dict[str, object] = {"id": completion.request_id}
    if completion.error_kind is not None:
        record["error"] = {"kind": completion.error_kind, "message": completion.error_message}
    record |= {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason.value,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": completion.num_output_tokens,
        "queue_s": round(completion.queue_s, 6),
        "ttft_s": round(completion.ttft_s, 6),
        "latency_s": round(completion.latency_s, 6),
        "tokens_per_s": round(completion.tokens_per_s, 3),
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token_id": i, "logprob": p} for i, p in entry.top],
            }
            for entry in completion.logprobs
        ]
    return record


LOGPROBS = (TokenLogprobs(3, -0.5, ((3, -0.5), (4, -1.0))), TokenLogprobs(4, -0.1))
COMPLETIONS = (
    completion("a"),
    completion("", "", token_ids=(), latency_s=0.0),
    completion("ü", "", logprobs=LOGPROBS),
    completion("no", "none was taken", logprobs=()),
    completion("b", error_kind="too_long", error_message='"x", "crc32": "0"'),
    completion('q"u\\o\nte', '", "num_output_tokens": 9, "crc32": "0"}', queue_s=1e-6, ttft_s=2e10),
    completion("\ud800 half a pair", 'says "crc32": "12345678"} \udfff \x00\x1f\x7f\u2028'),
)


@pytest.mark.parametrize("each", COMPLETIONS)
def test_a_line_is_the_record_with_a_checksum_that_a_plain_reader_ignores(each: Completion) -> None:
    assert completion_json(each) == json.dumps(as_documented(each), ensure_ascii=False)
    text = encode_line(completion_json(each))
    read = json.loads(text)
    assert re.fullmatch("[0-9a-f]{8}", read.pop("crc32"))
    assert read == json.loads(json.dumps(as_documented(each)))
    assert b"\n" not in text
    assert checks(text)
    decoded = decode_line(text)
    assert decoded is not None
    assert (decoded.prompt_id, decoded.has_failed) == (each.request_id, bool(each.error_kind))
    assert decoded.num_output_tokens == each.num_output_tokens
    assert decoded.checksum == zlib.crc32(text)


def test_a_line_with_a_checksum_may_have_its_fields_in_any_order() -> None:
    for each in COMPLETIONS:
        turned = dict(reversed(as_documented(each).items()))
        decoded = decode_line(encode_line(json.dumps(turned, ensure_ascii=False)))
        ours = decode_line(encode_line(completion_json(each)))
        assert decoded is not None
        assert ours is not None
        assert decoded._replace(checksum=0) == ours._replace(checksum=0)


def test_completions_that_are_written_together_are_lines_of_their_own(tmp_path: Path) -> None:
    together = [completion(name) for name in NAMES]
    with CompletionWriter(tmp_path, 0) as writer:
        writer.write(*together[:4])
        writer.write(*together[4:])
    assert writer.path.read_bytes() == b"".join(map(line_of, together))
    assert merge(tmp_path, INDEX_OF, writer.written).read_bytes() == writer.path.read_bytes()


def test_every_flipped_bit_is_found() -> None:
    text = line("p1", "Es war einmal …")[:-1]
    for bit in range(len(text) * 8):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        assert decode_line(bytes(flipped)) is None, flipped


def test_every_torn_line_is_found_and_those_that_ran_into_each_other() -> None:
    first, second = line("p1")[:-1], line("p2")[:-1]
    for end in range(len(first)):
        assert decode_line(first[:end]) is None
        assert decode_line(first[:end] + second) is None or end == 0
    assert decode_line(first + second) is None
    assert decode_line(first[1:]) is None


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"id":' * 100_000, b"\0" * 10_000_000])
def test_what_no_parser_should_see_is_no_record(deep: bytes) -> None:
    assert decode_line(deep) is None
    assert decode_line(b'{"id": "a", "logprobs": ' + deep) is None


@pytest.mark.parametrize(
    "differs",
    [
        {"id": 1}, {"id": None}, {"id": ["a"]}, {"text": None}, {"text": 3}, {"token_ids": "3"},
        {"token_ids": ["3"]}, {"token_ids": [3, None]}, {"token_ids": {}}, {"error": "x"},
        {"finish_reason": 1}, {"latency_s": "1"}, {"num_output_tokens": 1.5}, {"logprobs": 0},
        {"crc32": 7}, {"tezt": "of another bit"},
    ],
    ids=str,
)  # fmt: skip
def test_a_line_without_a_checksum_is_taken_when_it_is_otherwise_in_order(
    differs: dict[str, object],
) -> None:
    found = decode_line(old_line("a"))
    assert found is not None
    assert found[:4] == ("a", False, False, zlib.crc32(old_line("a")))
    assert found.num_output_tokens == len(completion("a").token_ids) > 0
    assert decode_line(old_line("a", **differs)) is None


# ---- reading -------------------------------------------------------------------------------------


def test_what_is_damaged_is_set_aside_byte_for_byte_and_the_rest_stays(tmp_path: Path) -> None:
    flipped = line("p1").replace(b"\xe2", b"\xe3")
    damaged = [
        flipped,
        line("of another run"),
        b"\0" * 4096 + b"\n",
        b"\xff\n",
        b"[" * 5000 + b"\n",
        line("p0", "again, and otherwise"),
        b"\n",
        old_line("p5", token_ids=["x"]) + b"\n",
    ]
    path = tmp_path / "completions_rank_0.jsonl"
    sound = [line("p0"), old_line("p2") + b"\n", line("p3")]
    path.write_bytes(sound[0] + b"".join(damaged) + sound[1] + sound[0] + sound[2] + b'{"id": "p4"')
    kept = read_journals(tmp_path, NAMES)
    assert list(kept.checksums) == ["p0", "p2", "p3"]
    num_tokens = 3 * len(completion("p0").token_ids)
    assert (kept.num_damaged, kept.num_failed, kept.num_output_tokens) == (9, 0, num_tokens)
    assert path.read_bytes() == sound[0] + sound[1] + sound[0] + sound[2]
    aside = tmp_path / "damaged_rank_0.jsonl"
    assert aside.read_bytes() == b"".join(damaged) + b'{"id": "p4"\n'
    assert read_journals(tmp_path, NAMES) == KeptRecords(
        kept.checksums, num_output_tokens=num_tokens
    )
    path.write_bytes(b"x\n")
    read_journals(tmp_path, NAMES)
    assert aside.read_bytes().endswith(b'{"id": "p4"\nx\n'), "it is appended to"


def test_line_ends_of_an_editor_and_a_missing_last_one_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "completions_rank_0.jsonl"
    path.write_bytes(line("p0")[:-1] + b"\r\n" + line("p1")[:-1])
    kept = read_journals(tmp_path, NAMES)
    assert (list(kept.checksums), kept.num_damaged) == (["p0", "p1"], 0)
    assert merge(tmp_path, INDEX_OF, kept.checksums).read_bytes() == line("p0") + line("p1")
    with CompletionWriter(tmp_path, 0) as writer:
        writer.write(completion("p2"))
    assert len(read_journals(tmp_path, NAMES).checksums) == 3


def test_no_journal_of_any_bytes_raises_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept of it is kept a second time, without another damage."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    chance = random.Random(7)
    path = tmp_path / "completions_rank_0.jsonl"
    lines = [line(name) for name in NAMES] + [old_line(name) + b"\n" for name in NAMES]
    pieces = [b"\0", b"\n", b"\r", b"{", b"[" * 2000, b'"', b"\xff", b', "crc32": "', b"9" * 5000]
    for _ in range(300):
        content = bytearray(b"".join(chance.choices(lines, k=chance.randrange(8))))
        for _ in range(chance.randrange(6)):
            where = chance.randrange(len(content) + 1)
            content[where : where + chance.randrange(20)] = chance.choice(pieces)
        path.write_bytes(content)
        kept = read_journals(tmp_path, NAMES)
        merged = merge(tmp_path, INDEX_OF, kept.checksums).read_bytes().splitlines()
        assert [json.loads(each)["id"] for each in merged] == sorted(kept.checksums)
        assert read_journals(tmp_path, NAMES).num_damaged == 0
        assert read_journals(tmp_path, NAMES).checksums == kept.checksums


# ---- a file that is lost while the run writes to it ----------------------------------------------


def replace(path: Path) -> None:
    """What `sed -i` does."""
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes().replace("Größe".encode(), b"Groesse"))
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, 0)


def cut_in_a_line(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


LOSSES = [replace, Path.unlink, cut, cut_in_a_line, move_folder, remove_folder]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_journal_that_is_lost_is_written_again(
    lose: Callable[[Path], None], at_the_end: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_SYNC_INTERVAL_S", 0.0)
    told: list[str] = []
    with CompletionWriter(folder, 0, told.append) as writer:
        for name in NAMES[:3]:
            writer.write(completion(name))
        lose(writer.path)
        if not at_the_end:
            wait_until_noticed(writer)
        for name in NAMES[3:]:
            writer.write(completion(name))
    assert writer.path.name == "completions_rank_0.2.jsonl"
    merged = merge(folder, INDEX_OF, writer.written).read_bytes().splitlines()
    texts = [(each["id"], each["text"]) for each in map(json.loads, merged)]
    assert texts == [(name, "Größe\n{}") for name in NAMES]
    (message,) = told
    assert "was replaced, cut or removed" in message
    assert "nothing is lost" in message
    kept = read_journals(folder, NAMES)
    assert kept.checksums == writer.written


def wait_until_noticed(writer: CompletionWriter) -> None:
    """Until the thread has looked at the file once more, which it does when it is woken."""
    syncer = writer._syncer
    assert syncer is not None
    looked = threading.Event()
    is_in_place = syncer._is_in_place

    def look() -> bool:
        in_place = is_in_place()
        if not in_place:
            looked.set()
        return in_place

    syncer._is_in_place = look
    syncer.wake()
    assert looked.wait(20)


def test_it_is_written_again_as_often_as_it_is_lost(folder: Path) -> None:
    told: list[str] = []
    with CompletionWriter(folder, 0, told.append) as writer:
        for name in NAMES:
            writer.write(completion(name))
            writer.path.unlink()
            wait_until_noticed(writer)
    assert len(told) == len(NAMES)
    assert len(merge(folder, INDEX_OF, writer.written).read_bytes().splitlines()) == len(NAMES)


def test_another_attempt_that_has_replaced_the_file_keeps_its_own(folder: Path) -> None:
    """A node that Slurm has lost, and the file system has not, writes beside it."""
    with CompletionWriter(folder, 0) as lost:
        lost.write(completion("p0"))
        (folder / "new").write_bytes(line("p1", "of the next attempt"))
        (folder / "new").replace(lost.path)
        wait_until_noticed(lost)
        lost.write(completion("p2"))
    assert (folder / "completions_rank_0.jsonl").read_bytes() == line("p1", "of the next attempt")
    assert read_journals(folder, NAMES).checksums.keys() == {"p0", "p1", "p2"}


def test_earlier_records_that_are_cut_away_are_missed(folder: Path) -> None:
    (folder / "completions_rank_0.jsonl").write_bytes(line("p0") + line("p1"))
    kept = read_journals(folder, NAMES).checksums
    with CompletionWriter(folder, 0) as writer:
        os.truncate(writer.path, 0)
        writer.write(completion("p2"))
    with pytest.raises(OutputError, match=r"lacks 2 of 3 completions, first that of 'p0'"):
        merge(folder, INDEX_OF, {**kept, **writer.written})
    merged = (folder / "completions.jsonl").read_bytes().splitlines()
    assert [json.loads(each)["id"] for each in merged] == ["p2"]


def test_memory_holds_so_much_and_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_HELD_BYTES", 2 * len(line("p0", "Größe\n{}")))
    told: list[str] = []
    with CompletionWriter(folder, 0, told.append) as writer:
        for name in NAMES:
            writer.write(completion(name))
        os.truncate(writer.path, 0)
    assert "2 records were written again" in told[0]
    assert "4 could not be read any more" in told[0]
    with pytest.raises(OutputError, match="lacks 4 of 6"):
        merge(folder, INDEX_OF, writer.written)


def test_a_folder_that_cannot_be_made_again_is_told(folder: Path) -> None:
    def write() -> None:
        with CompletionWriter(folder, 0) as writer:
            writer.write(completion("p0"))
            shutil.rmtree(folder)
            folder.touch()

    with pytest.raises(OutputError, match="could not be written"):
        write()


# ---- merging -------------------------------------------------------------------------------------


def test_an_edited_record_is_noticed_when_it_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "completions_rank_0.jsonl"
    path.write_bytes(line("p0") + line("p1") + old_line("p2") + b"\n")
    kept = read_journals(tmp_path, NAMES).checksums
    content = path.read_bytes()
    for edited in (
        content.replace(b'"id": "p1"', b'"id": "p3"'),
        content.replace(b"0.5", b"0.6"),  # of a line without a checksum, too
        line("p0") + line("p1", "computed anew") + old_line("p2") + b"\n",
        b"",
    ):
        path.write_bytes(edited)
        with pytest.raises(OutputError, match=r"output\.resume=true to complete these once more"):
            merge(tmp_path, INDEX_OF, kept)
    path.write_bytes(b"\0" * 30 + b"\n" + line("of another run") + content)
    assert merge(tmp_path, INDEX_OF, kept).read_bytes() == content


def test_of_two_lines_of_a_prompt_the_one_that_was_completed_is_merged(tmp_path: Path) -> None:
    (tmp_path / "completions_rank_0.2.jsonl").write_bytes(line("p0", "of a lost node"))
    with CompletionWriter(tmp_path, 0) as writer:
        writer.write(completion("p0", "ours"))
    merged = merge(tmp_path, INDEX_OF, writer.written)
    assert json.loads(merged.read_bytes())["text"] == "ours"


def test_a_full_disk_while_it_merges_leaves_the_journal_and_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CompletionWriter(tmp_path, 0) as writer:
        writer.write(completion("p0"))
    before = (tmp_path / "completions_rank_0.jsonl").read_bytes()

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"No space left on device.*output\.resume=true"):
            merge(tmp_path, INDEX_OF, writer.written)
    assert [path.name for path in tmp_path.iterdir()] == ["completions_rank_0.jsonl"]
    assert (tmp_path / "completions_rank_0.jsonl").read_bytes() == before
    (tmp_path / "completions.jsonl").touch(mode=0o444)
    assert merge(tmp_path, INDEX_OF, writer.written).read_bytes() == before
