"""netd's API where it asks more than the kernel: the holder of an address of an overlay that this host is not on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from netd.agent import Agent
from netd.service import Service, Source, UnknownHolderError
from netd.underlay import Choice
from netd.values import AnyAddress, Holder
from protos.node.v1 import node_pb2 as pb
from tests.kernel import spaces
from tests.netd.test_overlays import DEFAULT, OV1, OWN, PEERS, holder

pytestmark = pytest.mark.kernel


class Etcd(Source):
    """Knows one address."""

    name = "etcd"

    def __init__(self) -> None:
        self.asked: list[tuple[str, AnyAddress]] = []
        self.away = ""

    async def holder(self, network: str, address: AnyAddress) -> Holder | None:
        self.asked.append((network, address))
        if self.away:
            raise UnknownHolderError(self.away)
        return holder("10.9.0.2", "b") if address == ip_address("10.9.0.2") else None


@pytest.fixture
def agent() -> Iterator[Agent]:
    """Of host a, which is on no overlay."""
    with spaces.fresh() as space, spaces.inside(space):
        for words in ("link set lo up", "link add eth0 type bridge", "address add 10.0.0.1/24 dev eth0"):
            spaces.run("ip", *words.split())
        spaces.run("ip", "link", "set", "eth0", "up")
        made = Agent(OWN, Choice("eth0"), (DEFAULT,), tuple(PEERS), 0)  # nothing is ever due without an event
        made.start()
        try:
            made.call(lambda reconciler: reconciler.define_overlays([OV1])).result()
            yield made
        finally:
            made.stop()


def explain(agent: Agent, source: Source, address: str) -> pb.ExplainResponse:
    service = Service(agent, source, "1")
    return asyncio.run(service.Explain(pb.ExplainRequest(address=address), None))  # type: ignore[arg-type]  # unused


def test_the_holder_is_asked_for_once(agent: Agent) -> None:
    etcd = Etcd()
    found = explain(agent, etcd, "10.9.0.2")
    assert (found.kind, found.node, found.outer, found.bridge) == ("overlay", "b", "10.0.0.2", "nl-ov1")
    assert (found.mac, found.way, found.link, list(found.entries)) == ("02:42:0a:09:00:02", "", "", [])
    assert found.note.startswith("no container of this host is on ov1")
    assert explain(agent, etcd, "10.9.0.3").kind == "nobody"
    assert [str(address) for _, address in etcd.asked] == ["10.9.0.2", "10.9.0.3"]
    assert {network for network, _ in etcd.asked} == {"ov1"}
    for address in ("10.9.0.1", "10.0.0.2", "192.0.2.1"):
        explain(agent, etcd, address)
    assert len(etcd.asked) == 2


def test_etcd_is_away(agent: Agent) -> None:
    etcd = Etcd()
    etcd.away = "etcd has not said who has it"
    found = explain(agent, etcd, "10.9.0.2")
    assert (found.kind, found.network, list(found.problems)) == ("unknown", "ov1", [etcd.away])
    without = explain(agent, Source(), "10.9.0.2")
    assert (without.kind, len(without.problems)) == ("unknown", 1)
    assert "set endpoints under [etcd]" in without.problems[0]
