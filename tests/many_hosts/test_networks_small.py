"""Networks that are defined once: on one host without etcd, and over an underlay of IPv6 alone."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2
from tests.cni.chained.traffic import Query, no_answer, serving, until
from tests.hosts import IPV6, PATIENCE_S, wait_until
from tests.many_hosts.fleet import Fleet
from tests.many_hosts.pods import Pods, conf_of
from tests.many_hosts.test_networks import PODS6, all_reach_all_with_their_own_addresses

pytestmark = pytest.mark.kernel


def test_without_etcd_netd_asks_its_own_ipamd() -> None:
    """What was connected by who may not touch the kernel takes effect, too; and the MTU is the network's own."""
    with Fleet("vxlan", segments=(0,)) as fleet:
        host = fleet.host(1)
        host.start_ipamd()
        fleet.start()
        with Client(str(host.path("/run/netloom/ipamd.sock")), PATIENCE_S) as ipamd, ExitStack() as stack:
            for network, subnet, backend in (("pods", "10.2.0.0/16", "host-gw"), ("web", "10.3.0.0/16", "")):
                wanted = ipam_pb2.Network(name=network, subnets=[subnet], backend=backend)
                ipamd.create_network(ipam_pb2.CreateNetworkRequest(network=wanted))
            file = host.path("/run/netloom/fabric.json")
            wait_until(lambda: {"pods", "web"} <= json.loads(file.read_text())["networks"].keys(), "netd's knowledge")
            found = {}
            for network, mtu in (("pods", 1500), ("web", 1450)):
                netns = found[network] = host.netns(network)
                host.cni("ADD", "netloom", conf_of(network), container_id=network, netns=netns).ok()
                assert netns.links()["eth0"]["mtu"] == mtu
                stack.enter_context(serving(netns, network, "tcp:80"))
            web: Query = ("tcp", "10.3.0.2", 80)
            assert no_answer(found["pods"], web) == [""]
            ipamd.connect_networks("pods", "web")
            until(found["pods"], web, "web 10.2.0.2")
            ipamd.connect_networks("pods", "web", undo=True)
            until(found["pods"], web, "")
            for network in found:
                host.cni("DEL", "netloom", conf_of(network), container_id=network).ok()


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
@pytest.mark.parametrize(("name", "segments", "mtu"), [("vxlan", (0, 0, 0), 1430), ("direct", (0, 0, 1), 1430)])
def test_over_an_ipv6_underlay(name: str, segments: tuple[int, ...], mtu: int) -> None:
    """IPv6 takes 20 bytes more; `direct` has tunnels to the second segment only."""
    with Pods((6,), segments) as fleet:
        fleet.start()
        fleet.netloom(1, "network", "create", "pods", "--subnet", "10.2.0.0/16", *PODS6, "--backend", name)
        fleet.until_known("pods")
        made = [fleet.pod(number, "pods") for number in (1, 2, 3)]
        fleet.until_ways(*made)
        all_reach_all_with_their_own_addresses(made)
        assert {one.netns.links()["eth0"]["mtu"] for one in made} == {mtu}
        fleet.release_all()
        fleet.netloom(1, "network", "delete", "pods")
