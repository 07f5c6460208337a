"""Ranks find the head's store: through the first of its addresses that answers."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from torch.distributed import Store  # noqa: TID251 - of the tested type

from mpipipe.data_plane.nccl_groups import Rendezvous, addresses_of_this_host, open_store
from mpipipe.errors import EnvironmentSetupError
from mpipipe.plain_values import from_json, to_json

LIMIT_S = 30


def test_addresses_travel_as_json() -> None:
    rendezvous = Rendezvous(("10.0.0.1", "node1"), 40123)
    assert from_json(Rendezvous, to_json(rendezvous)) == rendezvous


def test_other_hosts_are_never_told_a_loopback_address() -> None:
    addresses = addresses_of_this_host("node1")
    assert addresses[-1] == "node1"
    assert not [address for address in addresses if address.startswith("127.")]


async def _all_open(num_ranks: int, addresses: tuple[str, ...] | None = None) -> list[Store]:
    """The stores of ranks of one process; `addresses` replaces those that the head tells."""
    told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def broadcast(payload: bytes | None) -> bytes:
        if payload is not None:
            found = from_json(Rendezvous, payload)
            told.set_result(to_json(Rendezvous(addresses or found.addresses, found.port)).encode())
        return await told

    hosts = ["node1"] * num_ranks
    async with asyncio.timeout(LIMIT_S):
        return await asyncio.gather(
            *(
                open_store(broadcast, rank=rank, hosts=hosts, timeout_s=10)
                for rank in range(num_ranks)
            )
        )


def test_all_ranks_share_one_store_on_a_port_that_the_system_chose() -> None:
    stores = asyncio.run(_all_open(3))
    stores[2].set("word", "hello")
    assert stores[1].get("word") == b"hello"
    assert [store.add("number", 1) for store in stores] == [1, 2, 3]


def test_an_address_that_does_not_answer_is_passed_over() -> None:
    stores = asyncio.run(_all_open(2, ("no-such-host.invalid", "127.0.0.1")))
    stores[0].set("word", "hello")
    stores[1].wait(["word"], timedelta(seconds=5))


def test_a_head_out_of_reach_is_one_sentence_with_both_hosts_and_the_addresses() -> None:
    with pytest.raises(
        EnvironmentSetupError,
        match=r"rank 1 on node1 cannot reach rank 0 on node1 over TCP \(tried no-such-host.invalid",
    ):
        asyncio.run(_all_open(2, ("no-such-host.invalid",)))
