"""Judges the facts of all ranks: each by itself, each host once, and what concerns all. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mpipipe.doctor.checks.gpu import check_gpu, check_gpus_of_host, wants_gpu
from mpipipe.doctor.checks.launch import check_launch
from mpipipe.doctor.checks.node import check_node
from mpipipe.doctor.checks.software import check_software
from mpipipe.doctor.facts import RankFacts
from mpipipe.doctor.finding import Finding, Severity, fatal, split_advice

__all__ = ["check_ranks"]


def check_ranks(ranks: Sequence[RankFacts], *, share_gpus: bool = False) -> list[Finding]:
    """All findings that follow from the facts, in the order in which they are shown.

    Args:
        ranks: in rank order.
        share_gpus: pipeline.share_gpus.
    """
    findings = check_launch(ranks)
    hosts = dict.fromkeys(rank.host for rank in ranks)
    for rank in ranks:
        findings += _with(check_software(rank), rank.host, rank.rank)
    for host in hosts:
        inside = [rank for rank in ranks if rank.host == host]
        findings += _with(check_node(inside[0].node, num_ranks=len(inside)), host)
    for rank in ranks:
        findings += _with(check_gpu(rank), rank.host, rank.rank)
    for host in hosts:
        inside = [rank for rank in ranks if rank.host == host]
        findings += _with(check_gpus_of_host(inside, share=share_gpus), host)
    return [*findings, *_unequal_gpus(ranks), *_configurations(ranks)]


def _with(findings: Iterable[Finding], host: str, rank: int | None = None) -> list[Finding]:
    return [dataclasses.replace(finding, host=host, rank=rank) for finding in findings]


def _unequal_gpus(ranks: Sequence[RankFacts]) -> list[Finding]:
    """Some ranks with a GPU and some without: the run would fall back to CPUs, or refuse."""
    without = [rank for rank in ranks if rank.gpu.rank_gpu.index < 0]
    if not without or len(without) == len(ranks) or any(wants_gpu(r.gpu) for r in without):
        return []  # the last have a finding of their own
    first = without[0]
    return [
        dataclasses.replace(
            fatal(
                "gpu.ranks",
                f"{len(ranks) - len(without)} of {len(ranks)} ranks have a GPU, rank {first.rank} "
                f"on {first.host} has none",
                "the job got different kinds of nodes, or GPUs for some of its tasks only",
                "ask for GPUs on every node (--gpus-per-node=N), or set pipeline.device = "
                '"cpu" to run on CPUs on purpose',
            ),
            host=first.host,
            rank=first.rank,
        )
    ]


def _configurations(ranks: Sequence[RankFacts]) -> list[Finding]:
    """The configuration as each rank reads it."""
    failed = [rank for rank in ranks if rank.config_problem]
    if failed:
        elsewhere = len(failed) < len(ranks)
        return [_unreadable(rank, elsewhere) for rank in (failed if elsewhere else failed[:1])]
    if len({rank.config_hash for rank in ranks}) < 2:
        return []
    other = next(rank for rank in ranks if rank.config_hash != ranks[0].config_hash)
    finding = fatal(
        "job.config",
        f"rank {other.rank} on {other.host} reads another configuration than rank 0 on "
        f"{ranks[0].host}",
        "the file, or one that it extends, differs between the hosts",
        "put it on a file system that all hosts share",
    )
    return [dataclasses.replace(finding, host=other.host, rank=other.rank)]


def _unreadable(rank: RankFacts, elsewhere: bool) -> Finding:
    what, remedy = split_advice(rank.config_problem)
    cause = "the file or a setting is wrong"
    if elsewhere:
        cause = "the file is not on a file system that this host sees, though others do"
    return Finding(
        "job.config",
        Severity.FATAL,
        what,
        cause,
        remedy or "mend the file",
        rank=rank.rank,
        host=rank.host,
        exit_code=rank.config_exit_code,
    )
