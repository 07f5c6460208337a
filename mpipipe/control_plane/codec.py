"""Message ↔ bytes: a msgpack array of the tag (messages.TAGS) and the fields in their order.

Nested dataclasses are arrays without a tag, as the schema says what they are. Tuples come back as
tuples. Nothing is pickled; nothing but the classes of `messages` and the two of `types` is built.

Not here: checks of field types. Both ends run the same version (handshake), so only a wrong number
of fields, an unknown tag or bytes that are no msgpack are recognised.

Measured: StepScheduled of 8 sequences is 56 bytes, 3 µs to encode, 7 µs to decode.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from mpipipe.control_plane.messages import (
    PROTOCOL_VERSION,
    TAGS,
    DecodeScheduled,
    Hello,
    LogprobsSampled,
    Message,
    RequestOpened,
    ScheduledSequence,
    StepScheduled,
)
from mpipipe.errors import ProtocolMismatchError
from mpipipe.types import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["decode", "encode"]

_Fields = tuple[Any, ...]
_Built = TypeVar("_Built")

_TAG_OF: dict[type, int] = {message: tag for tag, message in TAGS.items()}
# Error messages may hold file names that are not UTF-8, stop strings lone surrogates: both pass.
_UNICODE = "surrogatepass"
_PACKER = msgpack.Packer(unicode_errors=_UNICODE)  # not thread-safe: event-loop thread only


def _fields_of(kind: type) -> Callable[[Any], _Fields]:
    """A fast function from an instance to the tuple of its field values."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not names:
        return lambda _: ()
    if len(names) == 1:
        get = attrgetter(names[0])
        return lambda message: (get(message),)
    return attrgetter(*names)


_FIELDS_OF: dict[type, Callable[[Any], _Fields]] = {
    kind: _fields_of(kind) for kind in (*_TAG_OF, ScheduledSequence, SamplingParams, TokenLogprobs)
}
_NUM_FIELDS = {kind: len(dataclasses.fields(kind)) for kind in _FIELDS_OF}
_sequence_fields = _FIELDS_OF[ScheduledSequence]
_sampling_fields = _FIELDS_OF[SamplingParams]
_logprobs_fields = _FIELDS_OF[TokenLogprobs]


def encode(message: Message) -> bytes:
    """The bytes of `message`.

    Raises:
        KeyError, TypeError, OverflowError: not a message of TAGS, or a field that msgpack cannot
            hold (our own bug).
    """
    kind = type(message)
    frame: bytes = _PACKER.pack((_TAG_OF[kind], *_flatten(message, _FIELDS_OF[kind](message))))
    return frame


def _flatten(message: Message, fields: _Fields) -> _Fields:
    """`fields` with nested dataclasses replaced by tuples of their fields."""
    match message:
        case StepScheduled():
            step, slot, sequences, steady = fields
            return step, slot, [_sequence_fields(sequence) for sequence in sequences], steady
        case DecodeScheduled():
            *others, chunks = fields
            return *others, [_sequence_fields(chunk) for chunk in chunks]
        case RequestOpened():
            sequence_id, prompt_ids, sampling, rotary_len = fields
            return sequence_id, prompt_ids, _sampling_fields(sampling), rotary_len
        case LogprobsSampled():
            step, logprobs = fields
            return step, [entry and _logprobs_fields(entry) for entry in logprobs]
        case _:
            return fields


def decode(frame: bytes) -> Message:
    """The message that `frame` holds.

    Raises:
        ProtocolMismatchError: `frame` was not written by this version of `encode`.
    """
    try:
        content = msgpack.unpackb(frame, use_list=False, unicode_errors=_UNICODE)
        tag, *fields = content
        kind = TAGS[tag]
        return _build(kind, fields)
    except (msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
        raise ProtocolMismatchError(_describe(frame)) from error


def _build(kind: type[Message], fields: list[Any]) -> Message:
    """An instance of `kind`; raises TypeError or ValueError when `fields` do not fit."""
    if kind is StepScheduled:
        step, slot, sequences, steady = fields
        return StepScheduled(
            step, slot, tuple([ScheduledSequence(*sequence) for sequence in sequences]), steady
        )
    if kind is DecodeScheduled:
        *others, chunks = fields
        return _exactly(kind, [*others, tuple([ScheduledSequence(*chunk) for chunk in chunks])])
    if kind is RequestOpened:
        sequence_id, prompt_ids, sampling, rotary_len = fields
        sampling = _exactly(SamplingParams, sampling)
        return RequestOpened(sequence_id, prompt_ids, sampling, rotary_len)
    if kind is LogprobsSampled:
        step, logprobs = fields
        return LogprobsSampled(
            step, tuple([entry and _exactly(TokenLogprobs, entry) for entry in logprobs])
        )
    return _exactly(kind, fields)


def _exactly(kind: type[_Built], fields: Sequence[Any]) -> _Built:
    """An instance with all its fields given: defaults must not paper over a short frame."""
    if len(fields) != _NUM_FIELDS[kind]:
        raise TypeError(f"{kind.__name__} has {_NUM_FIELDS[kind]} fields, not {len(fields)}")
    return kind(*fields)


def _describe(frame: bytes) -> str:
    """The error's sentence; of a `Hello` with other fields, the version it was written by."""
    try:
        content = msgpack.unpackb(frame, use_list=False, unicode_errors=_UNICODE)
    except (msgpack.UnpackException, ValueError):
        content = None
    what = f"{len(frame)} bytes starting with {frame[:16].hex(' ') or 'nothing'}"
    hello = _TAG_OF[Hello]
    if isinstance(content, tuple) and len(content) > 3 and content[0] == hello:
        what = f"the greeting of rank {content[1]}, which speaks protocol version {content[3]}"
    return (
        f"a control message could not be read ({what}; this rank speaks protocol version "
        f"{PROTOCOL_VERSION}); the ranks run different versions of mpipipe: install the same one "
        "on every host"
    )
