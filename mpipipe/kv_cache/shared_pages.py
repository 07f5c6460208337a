"""KV pages that several sequences may own, and what is in those that hold whole pages of prompts.

A page whose content is told (`tell`) is a node of a trie: below its parent, the page before it in
the sequence, it stands under the ids of its tokens. So one that is found from the root holds keys
and values of exactly these tokens, at these positions, behind exactly these others. The scheme is
that of vLLM's automatic prefix caching and SGLang's radix tree, with the ids themselves as keys.

A page that loses its last owner stays in the trie until its memory is needed: those without content
go first, then those that have had no owner for longest, the deepest of a sequence before its first.

Invariants: who owns a page owns its parents. So a page in the trie has at least as many owners as
each of its children, and children are forgotten before their parents. A page in the trie is full:
its owners only read it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpipipe.kv_cache.pages import PageAllocator

__all__ = ["KnownPage", "SharedPages"]


@dataclass(slots=True, eq=False)
class KnownPage:
    """A page with the ids of its tokens. The root of the trie stands for no page."""

    page: int  # -1: the root, or forgotten
    depth: int  # pages from the root to here: it holds the tokens of the last of them
    token_ids: tuple[int, ...]
    parent: KnownPage | None  # None: the root
    children: dict[tuple[int, ...], KnownPage] = field(default_factory=dict)


class SharedPages(PageAllocator):
    """As `PageAllocator`, for pages with any number of owners.

    Attributes:
        root: of the trie.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        self.root = KnownPage(-1, 0, (), None)
        self._num_owners = [0] * num_pages
        self._known: dict[int, KnownPage] = {}  # by page: those in the trie
        # Pages in the trie without an owner, in the order in which they lost the last one.
        self._kept: OrderedDict[int, KnownPage] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that no sequence owns, those in the trie included."""
        return len(self._free) + len(self._kept)

    def num_owners(self, page: int) -> int:
        """Sequences that own it."""
        return self._num_owners[page]

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """As `PageAllocator.allocate`; pages in the trie are forgotten where no other is free."""
        missing = num_pages - len(self._free)
        if 0 < missing <= len(self._kept):
            super().free([self._forget_oldest() for _ in range(missing)])
        pages = super().allocate(num_pages)
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """One owner, whose pages these are in their order, gives them up."""
        unknown: list[int] = []
        for page in reversed(pages):
            assert 0 <= page < self.num_pages, f"page {page} is not of this pool"
            assert self._num_owners[page], f"page {page} is freed twice"
            self._num_owners[page] -= 1
            if not self._num_owners[page]:
                known = self._known.get(page)
                if known is None:
                    unknown.append(page)
                else:
                    self._kept[page] = known
        super().free(unknown)

    def share(self, known: KnownPage) -> None:
        """One more sequence owns `known`; it owns its parent already."""
        assert self._known.get(known.page) is known, f"page {known.page} is not in the trie"
        self._num_owners[known.page] += 1
        self._kept.pop(known.page, None)

    def tell(self, page: int, parent: KnownPage, token_ids: tuple[int, ...]) -> KnownPage:
        """Steps sent so far fill `page` with these tokens, behind those of `parent`."""
        assert self._num_owners[page] == 1, f"page {page} is told by its one owner"
        assert page not in self._known, f"page {page} is in the trie already"
        assert token_ids not in parent.children, "another page holds the same"
        assert parent is self.root or self._num_owners[parent.page] > 0, "who owns a page owns all"
        known = KnownPage(page, parent.depth + 1, token_ids, parent)
        parent.children[token_ids] = self._known[page] = known
        return known

    def _forget_oldest(self) -> int:
        page, known = self._kept.popitem(last=False)
        assert not known.children, "children are forgotten before their parents"
        assert known.parent is not None, "the root is no page"
        del known.parent.children[known.token_ids]
        del self._known[page]
        known.page = -1
        return page
