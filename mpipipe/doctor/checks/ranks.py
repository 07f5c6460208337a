"""Checks the facts of all ranks: each by itself, each host once, and what concerns all. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpipipe.doctor.checks.gpu import check_gpu, check_gpus_of_host, wants_gpu
from mpipipe.doctor.checks.launch import check_launch
from mpipipe.doctor.checks.node import check_node
from mpipipe.doctor.checks.software import check_software
from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.finding import Finding, fatal, split_advice

__all__ = ["check_ranks"]


def check_ranks(ranks: Sequence[RankFacts], *, share_gpus: bool = False) -> list[Finding]:
    """All findings that follow from the facts, in the order in which they are shown.

    Args:
        ranks: in rank order.
        share_gpus: pipeline.share_gpus.
    """
    return list(_findings(ranks, share_gpus))


def _findings(ranks: Sequence[RankFacts], share_gpus: bool) -> Iterator[Finding]:
    hosts = {
        host: [r for r in ranks if r.host == host]
        for host in dict.fromkeys(rank.host for rank in ranks)
    }
    yield from check_launch(ranks)
    for rank in ranks:
        yield from (finding.at(rank.host, rank.rank) for finding in check_software(rank))
    for host, inside in hosts.items():
        yield from (f.at(host) for f in check_node(inside[0].node, num_ranks=len(inside)))
    for rank in ranks:
        yield from (finding.at(rank.host, rank.rank) for finding in check_gpu(rank))
    for host, inside in hosts.items():
        yield from (f.at(host) for f in check_gpus_of_host(inside, share=share_gpus))
    yield from _unequal_gpus(ranks)
    yield from _configurations(ranks)


def _unequal_gpus(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Some ranks with a GPU and some without: the run would fall back to CPUs, or refuse."""
    without = [rank for rank in ranks if rank.gpu.rank_gpu.index < 0]
    if not without or len(without) == len(ranks) or any(wants_gpu(r.gpu) for r in without):
        return  # the last have a finding of their own
    first = without[0]
    yield fatal(
        "gpu.ranks",
        f"{len(ranks) - len(without)} of {len(ranks)} ranks have a GPU, rank {first.rank} "
        f"on {first.host} has none",
        "the job got different kinds of nodes, or GPUs for some of its tasks only",
        "ask for GPUs on every node (--gpus-per-node=N), or set pipeline.device = "
        '"cpu" to run on CPUs on purpose',
    ).at(first.host, first.rank)


def _configurations(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """The configuration as each rank reads it."""
    failed = [rank for rank in ranks if rank.config_problem]
    elsewhere = len(failed) < len(ranks)
    for rank in failed if elsewhere else failed[:1]:
        what, remedy = split_advice(rank.config_problem)
        cause = "the file or a setting is wrong"
        if elsewhere:
            cause = "the file is not on a file system that this host sees, though others do"
        yield fatal("job.config", what, cause, remedy or "mend the file", rank.config_exit_code).at(
            rank.host, rank.rank
        )
    if failed or len({rank.config_hash for rank in ranks}) < 2:
        return
    other = next(rank for rank in ranks if rank.config_hash != ranks[0].config_hash)
    yield fatal(
        "job.config",
        f"rank {other.rank} on {other.host} reads another configuration than rank 0 on "
        f"{ranks[0].host}",
        "the file, or one that it extends, differs between the hosts",
        "put it on a file system that all hosts share",
    ).at(other.host, other.rank)
