from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mpipipe.errors import ConfigError
from mpipipe.planning.gpu_table import known_gpus
from mpipipe.planning.link_table import LINKS, link_named
from mpipipe.planning.machine import DescribedMachine, described_ranks, parse_gpus, rank_like
from tests.unit.planned_rank import GIB, make_rank


def keys(text: str) -> list[str]:
    return [gpu.key for gpu in parse_gpus(text, known_gpus())]


def machine(text: str, **fields: Any) -> DescribedMachine:
    return replace(DescribedMachine(parse_gpus(text, known_gpus())), **fields)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("t4", ["t4"]),
        ("2 x t4", ["t4", "t4"]),
        ("2xT4", ["t4", "t4"]),
        ("t4 × 2", ["t4", "t4"]),
        ("h100, 3 x t4", ["h100", "t4", "t4", "t4"]),
        ("A100 80", ["a100-80"]),
        ("2 * rtx 4090", ["rtx4090", "rtx4090"]),
    ],
)
def test_gpus_are_read_as_people_write_them(text: str, found: list[str]) -> None:
    assert keys(text) == found


@pytest.mark.parametrize(
    "text", ["", "2 x", "0 x t4", "t4,,t4", "x", "5000 x t4", "4000 x t4, 97 x t4"]
)
def test_what_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ConfigError):
        keys(text)
    with pytest.raises(ConfigError, match=r"not of the form .*'0 x t4' is the part"):
        keys("t4, 0 x t4")


def test_ranks_are_spread_over_the_nodes_in_blocks() -> None:
    ranks = described_ranks(machine("5 x t4", num_nodes=2, host_memory_bytes=32 * GIB))
    assert [rank.host for rank in ranks] == ["node0"] * 3 + ["node1"] * 2
    assert [rank.gpu.index for rank in ranks] == [0, 1, 2, 0, 1]
    assert {rank.memory_available_bytes for rank in ranks} == {32 * GIB}
    assert len({rank.gpu.uuid for rank in ranks}) == 5
    with pytest.raises(ConfigError, match="--nodes 3, but --gpus has 2"):
        described_ranks(machine("2 x t4", num_nodes=3))


def test_attention_follows_the_capability() -> None:
    found = described_ranks(machine("v100-16, t4, l4"))
    assert [rank.attention_backends for rank in found] == [
        (),
        ("triton",),
        ("triton", "varlen", "flashinfer"),
    ]


def test_a_machine_in_words() -> None:
    assert machine("h100, 3 x t4", num_nodes=2).words == "h100, 3 x t4 on 2 nodes over 10GbE"
    assert machine("t4, t4").words == "2 x t4 on 1 node"


def test_one_rank_more_is_where_it_would_be() -> None:
    together = described_ranks(machine("2 x t4"))
    assert (rank_like(together).host, rank_like(together).gpu.index) == ("node0", 2)
    apart = described_ranks(machine("2 x t4", num_nodes=2))
    assert rank_like(apart).host not in {"node0", "node1"}
    assert rank_like(apart).gpu.index == 0
    assert rank_like([make_rank(0)]).host != make_rank(0).host
    assert [rank_like(found).rank for found in (together, apart)] == [2, 2]


def test_links_are_found_by_name() -> None:
    assert link_named(" 10gbe ") is LINKS["10gbe"]
    assert link_named("NDR").bytes_per_s > link_named("HDR").bytes_per_s
    with pytest.raises(ConfigError, match=r"no link 'token ring': --link takes one of 1GbE, "):
        link_named("token ring")
