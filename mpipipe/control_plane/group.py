"""The ranks of one pipeline among all ranks: what its head and its stages say to each other.

A part of the mesh, with the same mailboxes: a rank is in one pipeline, so messages of two never
meet. The numbers of ranks stay those of the world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpipipe.control_plane.mailbox import Mailbox
    from mpipipe.control_plane.messages import Message
    from mpipipe.control_plane.messenger import Messenger

__all__ = ["RankGroup"]


class RankGroup:
    """Messages among some ranks, this one included.

    Args:
        messenger: carries them.
        ranks: of the group.
    """

    def __init__(self, messenger: Messenger, ranks: Sequence[int]) -> None:
        self._messenger = messenger
        self._ranks = tuple(ranks)

    @property
    def rank(self) -> int:
        """The own number in the world."""
        return self._messenger.rank

    def send(self, to: int, message: Message) -> None:
        """As `Messenger.send`."""
        self._messenger.send(to, message)

    def broadcast_message(self, message: Message) -> None:
        """Start sending `message` to every rank of the group, this one included; encoded once."""
        self._messenger.send_to(self._ranks, message)

    def mailbox(self, *types: type[Message]) -> Mailbox[tuple[int, Message]]:
        """As `Messenger.mailbox`."""
        return self._messenger.mailbox(*types)
