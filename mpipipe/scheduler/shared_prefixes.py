"""Which pages of its prompt a sequence need not compute, because another one does.

Pages become known when the step that fills them is made: stages run steps in order, and each layer
writes the keys and values of all tokens of a step before attention reads any. So a sequence may
read them in that step and in all later ones, whoever else is preempted or ends meanwhile.

Only whole pages of prompts are shared, never the last known token: its logits are needed. Where
keys depend on how long a sequence is (`checkpoint.families.RotaryFacts`), only sequences share that
see the same (`max_sharing_tokens`).

`slot_allocator` asks; pages are owned and forgotten in `kv_cache.shared_pages`.
"""

from __future__ import annotations

from mpipipe.kv_cache.shared_pages import KnownPage, SharedPages
from mpipipe.scheduler.sequence import Sequence

__all__ = ["SharedPrefixes"]

_Key = tuple[KnownPage, tuple[int, ...]]  # a page and the tokens behind it


class SharedPrefixes:
    """What sequences share, and which of them compute what others wait for.

    Args:
        pages: of all sequences.
        max_sharing_tokens: of a sequence that shares, when it begins; 0: none shares.
    """

    def __init__(self, pages: SharedPages, max_sharing_tokens: int) -> None:
        self.num_shared_tokens = 0  # of prompts, found when they first began: not computed
        self._pages = pages
        self._max_sharing_tokens = max_sharing_tokens
        self._computing: dict[_Key, Sequence] = {}  # who fills the page that comes next there

    def count(self, sequence: Sequence, counted: set[KnownPage]) -> int:
        """Pages that a waiting sequence finds, and that others own or that are in `counted`.

        Adds to `counted` those that it would be the first to own.
        """
        known = self._find(sequence)
        while known.depth and not self._pages.num_owners(known.page) and known not in counted:
            counted.add(known)
            assert known.parent is not None, "the root has no depth"
            known = known.parent
        return known.depth

    def take(self, sequence: Sequence) -> int:
        """Make it an owner of the pages that it finds behind its own; returns how many."""
        known, found = self._find(sequence), []
        while known.depth > len(sequence.pages):
            found.append(known)
            assert known.parent is not None, "the root has no depth"
            known = known.parent
        for page in reversed(found):
            self._pages.share(page)
            sequence.pages.append(page.page)
        return len(found)

    def is_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute the page behind those that it has."""
        if not self._computing or sequence.known is None:
            return False
        is_whole = sequence.known.depth < self._num_shareable(sequence)
        return is_whole and self._key(sequence) in self._computing

    def tell(self, sequence: Sequence) -> None:
        """Its pages up to `num_computed` tokens are filled by the steps sent so far.

        Where another sequence filled the same page before, no further page of this one is told.
        """
        self.withdraw(sequence)
        if not self._shares(sequence) or sequence.known is None:
            return
        num_prompt_tokens, size = len(sequence.request.prompt_ids), self._pages.page_size
        num_computed = min(num_prompt_tokens, sequence.num_computed)
        while sequence.known.depth < num_computed // size:
            known, token_ids = self._key(sequence)
            if token_ids in known.children:
                sequence.known = None
                return
            sequence.known = self._pages.tell(sequence.pages[known.depth], known, token_ids)
        if not sequence.is_prefilled and sequence.known.depth < num_prompt_tokens // size:
            key = sequence.computing = self._key(sequence)
            self._computing.setdefault(key, sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """It computes nothing that others should wait for."""
        key, sequence.computing = sequence.computing, None
        if key is not None and self._computing.get(key) is sequence:
            del self._computing[key]

    def _find(self, sequence: Sequence) -> KnownPage:
        """The last known page of its prompt; the root, where it shares none."""
        if not self._shares(sequence):
            sequence.known = None
            return self._pages.root
        known, num_shareable = sequence.known or self._pages.root, self._num_shareable(sequence)
        while known.parent is not None and (known.page < 0 or known.depth > num_shareable):
            known = known.parent  # it was forgotten since, or found when more was to be read
        sequence.known = known
        while known.depth < num_shareable:
            child = known.children.get(self._key(sequence)[1])
            if child is None:
                break
            sequence.known = known = child
        return known

    def _num_shareable(self, sequence: Sequence) -> int:
        """Pages that it may share when it gets its place, or begins there."""
        num_known = sequence.num_computed if sequence.host_pages else len(sequence.tokens) - 1
        return min(len(sequence.request.prompt_ids), num_known) // self._pages.page_size

    def _shares(self, sequence: Sequence) -> bool:
        most = self._max_sharing_tokens  # `rotary_len` is never more than its tokens
        return len(sequence.tokens) <= most or sequence.rotary_len <= most

    def _key(self, sequence: Sequence) -> _Key:
        known, size = sequence.known or self._pages.root, self._pages.page_size
        first = known.depth * size
        return known, sequence.request.prompt_ids[first : first + size]
