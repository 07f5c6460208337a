"""One line of a journal: a completion as JSON, with a checksum over the line itself.

The last field of a line is `"crc32"`: eight hexadecimal digits, the CRC-32 of all bytes before the
comma that precedes it. A plain JSON reader may ignore it; README.md shows how to check it. It finds
every flipped bit, and a line that was torn or ran into another one.

Lines without it, of versions that wrote none, are taken when they are otherwise in order. Pure.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mpipipe.types import Completion

__all__ = ["RecordLine", "completion_record", "decode_line", "encode_line", "is_intact"]

_MARK = b', "crc32": "'  # a quote inside a JSON text is escaped: this is in no text

_NUMBER = (int, float)
# What versions without checksums wrote: another name, in a line without one, is a damaged name.
_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "error": dict,
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "num_prompt_tokens": int,
    "num_output_tokens": int,
    "queue_s": _NUMBER,
    "ttft_s": _NUMBER,
    "latency_s": _NUMBER,
    "tokens_per_s": _NUMBER,
    "logprobs": list,
}


class RecordLine(NamedTuple):
    """What the run needs to know of one sound line."""

    prompt_id: str
    has_failed: bool  # an error record
    has_checksum: bool
    checksum: int  # CRC-32 of the whole line: equal lines have equal ones


def completion_record(completion: Completion) -> dict[str, Any]:
    """The JSON form of a completion, documented in the README. Times in seconds."""
    record: dict[str, Any] = {"id": completion.request_id}
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


def encode_line(record: dict[str, Any]) -> bytes:
    """`record` with its checksum as one line, without its newline."""
    text = json.dumps(record, ensure_ascii=False)[:-1]  # without its brace
    body = text.encode(errors="backslashreplace")  # half of a surrogate pair: as JSON escapes it
    return body + _MARK + b'%08x"}' % zlib.crc32(body)


def decode_line(line: bytes) -> RecordLine | None:
    """What is in `line`, without its newline; None: it is damaged, or no record."""
    body, mark, tail = line.rpartition(_MARK)
    body_checksum = zlib.crc32(body)
    if mark and tail != b'%08x"}' % body_checksum:
        return None
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # not UTF-8, a number of a thousand digits, too deep
        return None
    if not isinstance(record, dict) or "id" not in record or not _has_types(record):
        return None
    if not mark and not (record.keys() <= _FIELD_TYPES.keys() and _holds_tokens(record)):
        return None
    checksum = zlib.crc32(tail, zlib.crc32(mark, body_checksum)) if mark else zlib.crc32(line)
    return RecordLine(record["id"], "error" in record, bool(mark), checksum)


def is_intact(line: bytes) -> bool:
    """Whether `decode_line` finds a record; a checksum alone is believed: a microsecond."""
    body, mark, tail = line.rpartition(_MARK)
    return tail == b'%08x"}' % zlib.crc32(body) if mark else decode_line(line) is not None


def _has_types(record: dict[str, Any]) -> bool:
    return all(isinstance(value, _FIELD_TYPES.get(name, object)) for name, value in record.items())


def _holds_tokens(record: dict[str, Any]) -> bool:
    return all(type(token_id) is int for token_id in record.get("token_ids", ()))
