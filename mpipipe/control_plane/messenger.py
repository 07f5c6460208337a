"""Typed messages between ranks: encode, send, and deliver what arrives to mailboxes by type.

`mesh` makes the collectives out of these messages.

Invariants: messages of one source are delivered in the order they were sent, so the n-th that one
rank sends to another is the n-th that the other gets; a message without a mailbox waits until its
type gets one; messages to the own rank are never encoded.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, NoReturn

from mpipipe.control_plane import codec
from mpipipe.control_plane.mailbox import Mailbox
from mpipipe.control_plane.messages import Heartbeat
from mpipipe.control_plane.pending_collectives import Collective, PendingCollectives
from mpipipe.metrics.lines import MessageRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mpipipe.clock import Clock
    from mpipipe.control_plane.channel import Channel
    from mpipipe.control_plane.messages import Message
    from mpipipe.progress import ProgressEngine

__all__ = ["Messenger"]

# Messages delivered in one round of polling: 100 take 0.5 ms, then tasks get their turn.
_MAX_PER_ROUND = 100


class Messenger:
    """Typed messages over a channel of bytes.

    Args:
        channel: carries the bytes.
        engine: polls; its `run` must be under way while anything here is awaited.
        clock: that deadlines are measured on.

    Attributes:
        on_message: told of each message to and from other ranks; None, the default: no one is.
    """

    def __init__(self, channel: Channel, engine: ProgressEngine, clock: Clock) -> None:
        self.on_message: Callable[[MessageRecord], object] | None = None
        self._channel = channel
        self._engine = engine
        self._clock = clock
        self._pending = PendingCollectives(clock)
        self._mailboxes: dict[type, Mailbox[tuple[int, Message]]] = {}
        self._backlog: deque[tuple[int, Message]] = deque()
        self._unregister: Callable[[], None] | None = None
        self._num_sent = Counter[int]()  # by rank
        self._num_received = Counter[int]()

    @property
    def rank(self) -> int:
        """The own number, from 0."""
        return self._channel.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._channel.world_size

    def start(self) -> None:
        """Begin to deliver messages; `aclose` ends it."""
        if self._unregister is None:
            self._unregister = self._engine.register(self._poll)

    async def aclose(self) -> None:
        """Send what is under way, close the channel and every mailbox. Idempotent.

        Raises:
            DeadlineError: another rank did not close its channel.
        """
        if self._unregister is not None:
            self._unregister()
        for mailbox in self._mailboxes.values():
            mailbox.close()
        await self._channel.aclose()

    def abort(self, exit_code: int) -> NoReturn:
        """End all ranks now, this one with `exit_code`."""
        self._channel.abort(exit_code)

    def send(self, to: int, message: Message) -> None:
        """Start sending `message` to rank `to`, which may be this one; returns at once.

        Raises:
            ChannelClosedError: after `aclose`.
        """
        if to == self.rank:
            self._deliver(to, message)
        else:
            self._send_frame(to, message, codec.encode(message))

    def send_quietly(self, ranks: Iterable[int], heartbeat: Heartbeat) -> None:
        """Start sending to other ranks, without waking their polling or ours; encoded once."""
        frame = codec.encode(heartbeat)
        for to in ranks:
            self._send_frame(to, heartbeat, frame, quiet=True)

    def broadcast_message(self, message: Message) -> None:
        """Start sending `message` to every rank, this one included; encoded once."""
        self.send_to(range(self.world_size), message)

    def send_to(self, ranks: Sequence[int], message: Message) -> None:
        """Start sending `message` to `ranks`, which may include this one; encoded once."""
        own = self.rank
        others = [to for to in ranks if to != own]
        if others:
            frame = codec.encode(message)
            for to in others:
                self._send_frame(to, message, frame)
        if len(others) < len(ranks):
            self._deliver(own, message)

    def _send_to_others(self, message: Message) -> None:
        self.send_to([to for to in range(self.world_size) if to != self.rank], message)

    def _send_frame(self, to: int, message: Message, frame: bytes, *, quiet: bool = False) -> None:
        if self.on_message is not None:
            kind, number = type(message).__name__, self._num_sent[to]
            now_s = self._clock.now_s()
            self.on_message(MessageRecord(now_s, "sent", kind, to, number, len(frame)))
        self._num_sent[to] += 1
        self._channel.send_nowait(to, frame, quiet=quiet)

    def mailbox(self, *types: type[Message]) -> Mailbox[tuple[int, Message]]:
        """A mailbox that gets every (source, message) of `types`, those that wait already first.

        A type belongs to one mailbox: a later one takes it over.
        """
        names = ", ".join(kind.__name__ for kind in types)
        mailbox: Mailbox[tuple[int, Message]] = Mailbox(f"the mailbox of {names}")
        self._mailboxes.update(dict.fromkeys(types, mailbox))
        waiting, self._backlog = self._backlog, deque()
        for source, message in waiting:
            self._deliver(source, message)
        return mailbox

    def _poll(self) -> bool:
        """Deliver what has arrived; called by the engine."""
        active = self._pending.expire()
        for _ in range(_MAX_PER_ROUND):
            received = self._channel.receive_nowait()
            if received is None:
                return active
            source, frame = received
            message = codec.decode(frame)
            if self.on_message is not None:
                kind, number = type(message).__name__, self._num_received[source]
                now_s = self._clock.now_s()
                self.on_message(MessageRecord(now_s, "received", kind, source, number, len(frame)))
            self._num_received[source] += 1
            self._deliver(source, message)
            active = active or not isinstance(message, Heartbeat)
        return True

    def _deliver(self, source: int, message: Message) -> None:
        mailbox = self._mailboxes.get(type(message))
        if mailbox is not None:
            mailbox.put((source, message))
        elif isinstance(message, Collective):
            self._pending.add(source, message)
        else:
            self._backlog.append((source, message))
