"""Every message comes back as it was, in bytes that do not change unnoticed."""

from __future__ import annotations

import dataclasses
from random import Random

import msgpack
import pytest

from mpipipe._version import __version__
from mpipipe.control_plane.codec import decode, encode
from mpipipe.control_plane.mesh import find_mismatch
from mpipipe.control_plane.messages import (
    PROTOCOL_VERSION,
    TAGS,
    BarrierEntered,
    BarrierReleased,
    Broadcast,
    ClockAsked,
    ClocksCompared,
    ClockTold,
    DecodeScheduled,
    DispatchBegan,
    DispatchEnded,
    Echo,
    GatherPart,
    GenerationBegan,
    GenerationEnded,
    Heartbeat,
    Hello,
    LogprobsSampled,
    Message,
    NoMoreRequests,
    PagesRestored,
    PagesSaved,
    PhaseReport,
    PhaseVerdict,
    RankLost,
    ReplicaTold,
    RequestClosed,
    RequestOpened,
    RequestsGiven,
    ScheduledSequence,
    SessionEnded,
    StepSampled,
    StepScheduled,
    StepTimes,
    StopRequested,
    VerifiedSequence,
)
from mpipipe.errors import ProtocolMismatchError
from mpipipe.metrics.lines import RequestRecord
from mpipipe.planning.resources import RankResources
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.host import host_name
from mpipipe.types import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

HELLO = Hello(1, 2, 1, "0.1.0", "abc", RankResources(1, "node-b", 77, "srun", 4, 8 << 30))
GPU_HELLO = dataclasses.replace(
    HELLO,
    resources=dataclasses.replace(
        HELLO.resources,
        gpu=GpuFacts(
            index=0,
            name="T4",
            uuid="GPU-1",
            capability=75,
            memory_bytes=16 << 30,
            free_bytes=15 << 30,
            nccl_version="2.27",
            pci="0000:3b:00.0",
        ),
        gpu_cpus=(0, 1),
        cores=((0, 2), (1, 3)),
        num_allowed_cpus=8,
        attention_backends=("triton",),
    ),
)
SAMPLING = SamplingParams(
    max_new_tokens=16,
    temperature=0.5,
    top_k=5,
    top_p=0.75,
    min_p=0.25,
    repetition_penalty=1.5,
    frequency_penalty=0.5,
    presence_penalty=-1.25,
    seed=9,
    stop=("\n\n", "END"),
    stop_token_ids=(2, 50256),
    ignore_eos=True,
    num_logprobs=3,
)
STEP = StepScheduled(
    7,
    1,
    (
        ScheduledSequence(3, 20, 1, (), True),
        ScheduledSequence(4, 0, 300, (5, 6, 70000), False),
    ),
    True,
)
RECORD = RequestRecord(
    Completion(
        *("a", 2, "it is", (15, 0), FinishReason.STOP, 2, 0.5, 0.75, 1.0),
        logprobs=(TokenLogprobs(15, -0.5), TokenLogprobs(0, -1.0)),
    ),
    slot=1,
    arrived_s=2.0,
    admitted_s=None,
    finished_s=3.0,
    num_preemptions=0,
    token_s=(2.5, 3.0),
)

MESSAGES: tuple[Message, ...] = (
    HELLO,
    GPU_HELLO,
    PhaseReport("load", 1),
    PhaseReport("load", 1, "CheckpointError", "model\udcff.bin is gone", 3),
    PhaseVerdict("load", 1, "CheckpointError", "gone", 3),
    BarrierEntered("warm-up"),
    BarrierReleased("warm-up"),
    Broadcast("plan", b"\x00\xff"),
    GatherPart("metrics", b""),
    RequestOpened(3, (1, 2, 49151), SAMPLING, 3, 1),
    STEP,
    DecodeScheduled(300, 1, 3, (0, 2), (7,), (1, 2), (5, 70000), False),
    DecodeScheduled(301, 1, 3, (), (), (), (), True),
    DecodeScheduled(
        *(301, 1, 3, (), (), (), (), False), (ScheduledSequence(4, 0, 200, (6,), True),)
    ),
    DecodeScheduled(
        *(302, 1, 3, (0,), (), (), (), False),
        verified=(VerifiedSequence(4, 199, (7, 8, 9), (12,)),),
    ),
    RequestClosed((3, 4)),
    StepSampled(7, (15, 0)),
    LogprobsSampled(7, (None, TokenLogprobs(15, -0.5, ((15, -0.5), (16, -2.0))))),
    GenerationBegan(),
    GenerationEnded(),
    SessionEnded(),
    Echo(1, b"ping", False),
    StopRequested("SIGTERM"),
    Heartbeat("n2", 2, 417, "load", False, 1.5),
    RankLost(2, "rank 2 is silent"),
    StepTimes(64, (0.5, 1.25)),
    ClockAsked(3),
    ClockTold(3, 1.5),
    ClocksCompared((0.0, -0.25)),
    DispatchBegan(),
    ReplicaTold((RECORD,), 3, 1.5, 40, 4, 1, 2, 1, 5, 0.25, True),
    RequestsGiven((Request("a", 2, (1, 300), SAMPLING),), 0.5),
    NoMoreRequests(True),
    DispatchEnded(),
    PagesSaved((5, 70000), (0, 1)),
    PagesRestored(3, 17, (0, 1), (6, 2)),
)
NUM_DAMAGED = 20_000

# The bytes of MESSAGES. When a line has to change, PROTOCOL_VERSION has to change with it.
GOLDEN = (
    (
        "9701010201a5302e312e30a36162639d01a66e6f64652d624da47372756e04cf00000002000000009cffa0"
        "a0000000a0a0a00000009090009000a0"
    ),
    (
        "9701010201a5302e312e30a36162639d01a66e6f64652d624da47372756e04cf00000002000000009c00a2"
        "5434a54750552d314bcf0000000400000000cf00000003c0000000a4322e3237a0ac303030303a33623a30"
        "302e30000000920001929200029201030891a6747269746f6e00a0"
    ),
    "9602a46c6f616401c0a000",
    "9602a46c6f616401af436865636b706f696e744572726f72b46d6f64656cedb3bf2e62696e20697320676f6e6503",
    "9603a46c6f616401af436865636b706f696e744572726f72a4676f6e6503",
    "9204a77761726d2d7570",
    "9205a77761726d2d7570",
    "9306a4706c616ec40200ff",
    "9307a76d657472696373c400",
    (
        "960803930102cdbfff9d10cb3fe000000000000005cb3fe8000000000000cb3fd0000000000000cb3ff8"
        "000000000000cb3fe0000000000000cbbff40000000000000992a20a0aa3454e449202cdc450c3030301"
    ),
    "95090701929503140190c3950400cd012c930506ce00011170c2c3",
    "9b10cd012c010392000291079201029205ce00011170c29090",
    "9b10cd012d010390909090c39090",
    "9b10cd012d010390909090c291950400ccc89106c390",
    "9b10cd012e01039100909090c290919404ccc793070809910c",
    "920a920304",
    "930b07920f00",
    "930c0792c0930fcbbfe000000000000092920fcbbfe00000000000009210cbc000000000000000",
    "9114",
    "910d",
    "910e",
    "940f01c40470696e67c2",
    "9211a75349475445524d",
    "9712a26e3202cd01a1a46c6f6164c2cb3ff8000000000000",
    "931302b072616e6b20322069732073696c656e74",
    "93154092cb3fe0000000000000cb3ff4000000000000",
    "921603",
    "931703cb3ff8000000000000",
    "921892cb0000000000000000cbbfd0000000000000",
    "9119",
    (
        "9d1a91979ca16102a56974206973920f00a473746f7002cb3fe0000000000000cb3fe8000000000000cb3f"
        "f000000000000092930fcbbfe0000000000000909300cbbff000000000000090c0c001cb40000000000000"
        "00c0cb40080000000000000092cb4004000000000000cb400800000000000003cb3ff80000000000002804"
        "01020105cb3fd0000000000000c393000000"
    ),
    (
        "931b9194a161029201cd012c9d10cb3fe000000000000005cb3fe8000000000000cb3fd0000000000000cb"
        "3ff8000000000000cb3fe0000000000000cbbff40000000000000992a20a0aa3454e449202cdc450c303cb"
        "3fe0000000000000"
    ),
    "921cc3",
    "911d",
    "931e9205ce00011170920001",
    "951f0311920001920602",
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_equal_with_tuples_as_tuples(message: Message) -> None:
    decoded = decode(encode(message))
    assert decoded == message
    assert type(decoded) is type(message)
    assert hash(decoded) == hash(message)  # fails when a list has taken the place of a tuple


@pytest.mark.parametrize(
    ("message", "golden"),
    list(zip(MESSAGES, GOLDEN, strict=True)),
    ids=lambda value: type(value).__name__,
)
def test_the_encoding_is_pinned(message: Message, golden: str) -> None:
    assert encode(message).hex() == golden


def test_every_message_type_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(TAGS.values())


def test_tags_are_unique_by_type() -> None:
    assert len(set(TAGS.values())) == len(TAGS)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"\x07",
        b"\x90",
        encode(STEP)[:-1],
        encode(STEP) + b"\x00",
        b"not msgpack at all",
        msgpack.packb({"tag": 1}),
        msgpack.packb([99, 1, 2]),
        msgpack.packb([[1], 2]),
        msgpack.packb([11, 7]),  # StepSampled without its ids
        msgpack.packb([2, "load", 1]),  # PhaseReport without the fields that have defaults
        msgpack.packb([9, 7, 1, [[3, 20]], True]),  # a sequence with two fields
        msgpack.packb([9, 7, 1, 5, True]),
        msgpack.packb([16, 7, 1, 5, True]),  # DecodeScheduled without its changes
        msgpack.packb([8, 3, [1], [16]]),  # SamplingParams with one field
        msgpack.packb([8, 3, [1], [0, *dataclasses.astuple(SAMPLING)[1:]]]),  # max_new_tokens = 0
    ],
    ids=repr,
)
def test_what_is_no_message_is_a_protocol_mismatch(garbage: bytes) -> None:
    with pytest.raises(ProtocolMismatchError, match="control message could not be read"):
        decode(garbage)


def test_damaged_frames_are_messages_or_mismatches_and_hellos_can_be_compared() -> None:
    random, head = Random(9), MESSAGES[0]
    assert isinstance(head, Hello)
    for _ in range(NUM_DAMAGED):
        frame = bytearray(encode(random.choice(MESSAGES)))
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(frame) + 1)
            frame[place : place + random.randint(0, 2)] = random.randbytes(random.randint(0, 2))
        try:
            message = decode(bytes(frame))
        except ProtocolMismatchError:
            continue
        if isinstance(message, Hello):
            find_mismatch([head, message])


@pytest.mark.parametrize(
    ("fields", "who"),
    [
        # As version 5 wrote it, without a GPU.
        ([3, 8, 5, "0.9.0", "abc", "node-b", 77, 4, 1 << 30, "srun"], "rank 3 on node-b"),
        # A later version with a field more here and there.
        ([3, 8, 42, "9.9.9", "abc", [3, "node-b", 77, "new"], "and more"], "rank 3 on node-b"),
        ([3, 8, 42, "9.9.9", 7], "rank 3"),
    ],
)
def test_a_hello_of_another_version_names_both_hosts_and_versions(
    fields: list[object], who: str
) -> None:
    with pytest.raises(ProtocolMismatchError) as raised:
        decode(msgpack.packb([1, *fields]))
    theirs = f"the hello of {who}, which runs mpipipe {fields[3]} and speaks protocol version"
    assert f"{theirs} {fields[2]};" in str(raised.value)
    ours = f"this rank, on {host_name()}, runs mpipipe {__version__} and speaks protocol version"
    assert f"{ours} {PROTOCOL_VERSION})" in str(raised.value)


def test_a_step_of_eight_decoding_sequences_stays_small() -> None:
    sequences = tuple(ScheduledSequence(index, 100 + index, 1, (), True) for index in range(8))
    assert len(encode(StepScheduled(1000, 1, sequences, True))) <= 64


def test_a_decode_step_without_changes_is_as_small_for_any_number_of_rows() -> None:
    assert len(encode(DecodeScheduled(100_000, 1, 256, (), (), (), (), True))) <= 18


def test_why_a_completion_ended_is_a_reason_again_and_not_its_text() -> None:
    decoded = decode(encode(ReplicaTold((RECORD,), 0, 0.0)))
    assert isinstance(decoded, ReplicaTold)
    assert decoded.records[0].completion.finish_reason is FinishReason.STOP
