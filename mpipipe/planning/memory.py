"""Whether weights and KV cache fit, and how many KV pages there can be.

`cost` and `step_limits` say how large things are. Ranks of one host share its memory, as do ranks
on one GPU, so needs are summed per pool of memory. The number of pages is the same on every rank,
so the tightest rank decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.config.schema import MemoryConfig
from mpipipe.errors import PlanError

__all__ = ["KvDemand", "RankMemory", "asked_kv_bytes", "choose_num_pages", "fits", "gib"]

# Share of the memory left after the weights that the KV cache may take by itself: the rest is for
# activations, logits, libraries and other programs of the host.
_AUTO_SHARE = 4


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank needs, and what is there: on its host, or on its GPU."""

    rank: int
    host: str
    available_bytes: int  # of the pool, shared by its ranks
    weight_bytes: int
    page_bytes: int  # of one KV page over the layers of this rank
    work_bytes: int = 0  # activations and libraries; on a CPU the rest of `_AUTO_SHARE`
    gpu: str = ""  # uuid; empty: the host's memory
    gpu_name: str = ""  # e.g. "GPU 0 (Tesla T4)"
    weight_limit_bytes: int | None = None  # memory.device_bytes of a CPU rank; None: no limit
    limited_by: str = ""  # the settings that `available_bytes` of a GPU follow from
    page_limit: int | None = None  # that its host memory holds, of layers whose cache is there

    @property
    def pool(self) -> tuple[str, str]:
        """What identifies the memory that this rank draws on."""
        return self.host, self.gpu

    @property
    def fixed_bytes(self) -> int:
        """Needed whatever the number of pages."""
        return self.weight_bytes + self.work_bytes

    @property
    def where(self) -> str:
        """The pool in words."""
        return f"{self.gpu_name} of {self.host}" if self.gpu else self.host


@dataclass(frozen=True, slots=True)
class KvDemand:
    """What the run can use. None: not known yet."""

    page_size_tokens: int
    max_context_tokens: int
    max_sequences: int  # over all slots
    longest_request_tokens: int | None = None  # prompt and completion
    num_requests: int | None = None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence that can occur."""
        if self.longest_request_tokens is None:
            return self.max_context_tokens
        return min(self.longest_request_tokens, self.max_context_tokens)

    @property
    def pages_per_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.longest_tokens // self.page_size_tokens)

    @property
    def num_sequences(self) -> int:
        """Sequences that can run at once."""
        if self.num_requests is None:
            return self.max_sequences
        return max(1, min(self.num_requests, self.max_sequences))

    @property
    def useful_pages(self) -> int:
        """The run never uses more pages than this.

        Every sequence at its longest, and the half page per sequence that the scheduler keeps
        back at admission (scheduler.policy.admission_headroom).
        """
        return self.num_sequences * self.pages_per_sequence + -(-self.num_sequences // 2)


def gib(num_bytes: float) -> str:
    """Bytes as text in GiB, or MiB below a tenth of one."""
    if num_bytes < 2**30 / 10:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def choose_num_pages(
    memory: MemoryConfig,
    ranks: Sequence[RankMemory],
    demand: KvDemand,
    remedies: Sequence[str] = (),
) -> tuple[int, str]:
    """The number of KV pages, and the reason for it.

    `remedies`: what to do, beside other things, where they do not fit.

    Raises:
        PlanError: the weights do not fit, the pages do not fit beside them, or there are too few
            pages for the longest request.
    """
    _check_fit(ranks, 0, remedies)
    if isinstance(memory.num_kv_pages, int):
        num_pages, reason = memory.num_kv_pages, "memory.num_kv_pages"
    elif isinstance(memory.kv_cache_bytes, int):
        num_pages, reason = _pages_in(memory.kv_cache_bytes, ranks)
    else:
        num_pages, reason = _auto_pages(ranks, demand)
    _check_demand(num_pages, reason, ranks, demand)
    _check_fit(ranks, num_pages, remedies)
    largest = max(rank.page_bytes for rank in ranks)
    return num_pages, f"{reason}; {gib(num_pages * largest)} on the fullest rank"


def asked_kv_bytes(memory: MemoryConfig, page_bytes: int) -> int | None:
    """What the settings ask for on a rank with pages of `page_bytes`, at most; None: auto."""
    if isinstance(memory.num_kv_pages, int):
        return memory.num_kv_pages * page_bytes
    return memory.kv_cache_bytes if isinstance(memory.kv_cache_bytes, int) else None


def _pages_in(kv_cache_bytes: int, ranks: Sequence[RankMemory]) -> tuple[int, str]:
    tightest = max(ranks, key=lambda rank: rank.page_bytes)
    reason = f"memory.kv_cache_bytes over the layers of rank {tightest.rank}, which has the most"
    return kv_cache_bytes // tightest.page_bytes, reason


def _auto_pages(ranks: Sequence[RankMemory], demand: KvDemand) -> tuple[int, str]:
    """What the tightest rank can spare, and no more than the run can use.

    A host can spare a quarter of what the weights leave, a GPU all that weights and work space
    leave. At most `useful_pages`; at least one longest request, where that is known.
    """
    num_pages, number = min(
        (_most_pages(rank, _spare_bytes(rank, ranks)), rank.rank) for rank in ranks
    )
    tightest = next(rank for rank in ranks if rank.rank == number)
    if num_pages >= demand.useful_pages:
        what = f"{demand.num_sequences} sequences of at most {demand.longest_tokens} tokens"
        return demand.useful_pages, f"all that {what} can use"
    if num_pages < demand.pages_per_sequence and demand.longest_request_tokens is not None:
        return demand.pages_per_sequence, "the least that holds the longest request"
    if num_pages == tightest.page_limit:
        where = f"the host memory of rank {number}, where some layers' cache is"
        return num_pages, f"what fits in {where}"
    if tightest.gpu:
        return num_pages, f"what weights and work space leave on {tightest.where} (rank {number})"
    return num_pages, f"a quarter of rank {number}'s share of its host's memory after weights"


def _most_pages(rank: RankMemory, spare_bytes: int) -> int:
    most = spare_bytes // rank.page_bytes
    return most if rank.page_limit is None else min(most, rank.page_limit)


def _spare_bytes(rank: RankMemory, ranks: Sequence[RankMemory]) -> int:
    """This rank's equal share of what its pool can give to pages."""
    neighbours = [other for other in ranks if other.pool == rank.pool]
    available = min(other.available_bytes for other in neighbours)
    left = max(0, available - sum(other.fixed_bytes for other in neighbours)) // len(neighbours)
    return left if rank.gpu else left // _AUTO_SHARE


def _check_demand(
    num_pages: int, reason: str, ranks: Sequence[RankMemory], demand: KvDemand
) -> None:
    known = demand.longest_request_tokens is not None
    needed = demand.pages_per_sequence if known else 1
    if num_pages >= needed:
        return
    what = f"the longest request of {demand.longest_tokens} tokens" if known else "any request"
    largest = max(rank.page_bytes for rank in ranks)
    raise PlanError(
        f"the KV cache has {num_pages} pages of {demand.page_size_tokens} tokens ({reason}), but "
        f"{what} needs {needed}: set memory.num_kv_pages to at least {needed} or "
        f"memory.kv_cache_bytes to at least {needed * largest}, use more ranks, or shorten the "
        "prompts or generation.max_new_tokens"
    )


def fits(ranks: Sequence[RankMemory], num_pages: int) -> bool:
    """Whether weights, work space and so many pages fit everywhere."""
    return _first_misfit(ranks, num_pages) is None


def _check_fit(ranks: Sequence[RankMemory], num_pages: int, remedies: Sequence[str]) -> None:
    misfit = _first_misfit(ranks, num_pages)
    if misfit is not None:
        raise PlanError(_misfit(misfit, num_pages, remedies))


def _first_misfit(ranks: Sequence[RankMemory], num_pages: int) -> list[RankMemory] | None:
    """The ranks of the first pool that does not hold them; None: all do."""
    for rank in ranks:
        if rank.weight_limit_bytes is not None and rank.weight_bytes > rank.weight_limit_bytes:
            return [rank]
    for pool in dict.fromkeys(rank.pool for rank in ranks):
        inside = [rank for rank in ranks if rank.pool == pool]
        pages = sum(rank.page_bytes for rank in inside) * num_pages
        fixed = sum(rank.fixed_bytes for rank in inside)
        if fixed + pages > min(rank.available_bytes for rank in inside):
            return inside
    return None


def _misfit(inside: Sequence[RankMemory], num_pages: int, more_remedies: Sequence[str]) -> str:
    """The sentence for ranks of one pool that need more than it has."""
    numbers = ", ".join(str(rank.rank) for rank in inside)
    who = f"rank {numbers}" if len(inside) == 1 else f"ranks {numbers} together"
    weight_bytes, limit = sum(rank.weight_bytes for rank in inside), inside[0].weight_limit_bytes
    held, allowed = _held(inside, num_pages), _allowed(inside, num_pages)
    remedies = ["lower memory.kv_cache_bytes or memory.num_kv_pages"] if num_pages else []
    remedies += more_remedies
    if inside[0].gpu:
        remedies += [
            "lower pipeline.max_tokens_per_step",
            "end other processes on that GPU",
            "use more ranks, each with a GPU of its own",
        ]
    elif len(inside) == 1 and limit is not None and weight_bytes > limit:
        held = f"{gib(weight_bytes)} of weights"
        allowed = f"only {gib(limit)} is allowed (memory.device_bytes), {gib(weight_bytes - limit)}"
        allowed += " too little"
        remedies += ["use more ranks"]
    else:
        remedies += ["use more hosts"]
    remedy = ", or ".join(filter(None, (", ".join(remedies[:-1]), remedies[-1])))
    return f"{who} on {inside[0].where} would hold {held}, but {allowed}: {remedy}"


def _held(inside: Sequence[RankMemory], num_pages: int) -> str:
    holds = [f"{gib(sum(rank.weight_bytes for rank in inside))} of weights"]
    if work := sum(rank.work_bytes for rank in inside):
        holds.append(f"{gib(work)} of work space")
    if num_pages:
        holds.append(f"{gib(sum(rank.page_bytes for rank in inside) * num_pages)} of KV cache")
    return holds[0] if len(holds) == 1 else f"{', '.join(holds[:-1])} and {holds[-1]}"


def _allowed(inside: Sequence[RankMemory], num_pages: int) -> str:
    available = min(rank.available_bytes for rank in inside)
    needed = sum(rank.fixed_bytes + rank.page_bytes * num_pages for rank in inside)
    lacking = f"{gib(needed - available)} too little"
    if not inside[0].gpu:
        return f"only {gib(available)} of memory is available there, {lacking}"
    return f"only {gib(available)} of its memory may be used ({inside[0].limited_by}), {lacking}"
