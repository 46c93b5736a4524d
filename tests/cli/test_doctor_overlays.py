"""What `netloom doctor` finds of overlays, on two hosts that are network namespaces with the reconciler of netd."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from unittest import mock

import pytest

from cli import doctor, doctor_overlays, netd
from cli.finding import Finding
from kernel import netlink
from kernel.leftovers import BRIDGE_MARK
from kernel.session import Session
from netd.overlay_status import overlay_messages
from netd.reconcile import Reconciler
from netd.underlay import Choice
from netd.values import Holder, Network, Node, Overlay, vtep_mac
from protos.node.v1 import node_pb2 as pb
from tests.hosts import IPV6
from tests.kernel import spaces

pytestmark = pytest.mark.kernel
DEFAULT = Network("default", (), "vxlan", 1, 4789, 0, True, False)
OV1 = Overlay("ov1", (ip_network("10.9.0.0/24"),), 256, "nl-ov1", 4789, 0, False, True, False)
NODES = {name: Node(name, (ip_address(f"10.0.0.{n}"),), (), vtep_mac(name)) for n, name in enumerate("ab", 1)}
EXTRA = ip_address("10.0.0.3")
HOLDERS = [
    Holder(ip_address("10.9.0.2"), "02:42:0a:09:00:02", "a"),
    Holder(ip_address("10.9.0.3"), "02:42:0a:09:00:03", "b"),
]


REMEDY = "load its module (modprobe vxlan), or use the backend host-gw; overlays need VXLAN"


class KindUnknown(netlink.Socket):
    """Asks for another kind of link where a VXLAN device is to be made."""

    def execute(self, messages: Sequence[netlink.Message]) -> None:
        super().execute([replace(one, body=one.body.replace(b"vxlan\0", b"vxlam\0")) for one in messages])


@dataclass
class HostOfOne:
    """A host with one container. Its reconciler works in its namespace."""

    space: spaces.Space
    reconciler: Reconciler

    def run(self, command: str) -> None:
        with spaces.inside(self.space):
            spaces.run("sh", "-ec", command)

    def found(self, command: str) -> str:
        """What a command says there."""
        with spaces.inside(self.space):
            return spaces.run(*command.split())

    def tell(self, holders: list[Holder]) -> None:
        with spaces.inside(self.space):
            self.reconciler.sync(self.reconciler.overlays.replace("ov1", holders))

    def full(self) -> None:
        with spaces.inside(self.space):
            self.reconciler.full()

    def examine(self) -> list[Finding]:
        """What doctor says here."""
        with spaces.inside(self.space):
            messages = overlay_messages(self.reconciler, lambda _: "up")
            return list(doctor_overlays.examine(netd.document(pb.StatusResponse(overlays=messages), "socket")))

    def problems(self) -> list[tuple[str, str]]:
        """Text and remedy of each problem."""
        return [(one.text, one.remedy) for one in self.examine() if one.level == "problem"]


@contextlib.contextmanager
def host(space: spaces.Space, node: Node, container: spaces.Space, holder: Holder) -> Iterator[HostOfOne]:
    """In this thread's namespace, which is `space` and has eth0, the link of the underlay."""
    spaces.run(*f"ip address add {node.addresses[0]}/24 dev eth0".split())
    for one in ("eth0", "lo"):
        spaces.run("ip", "link", "set", one, "up")
    spaces.run("ip", "link", "add", "nl-ov1", "address", "02:42:0a:09:00:01", "mtu", "1450", "up", "type", "bridge")
    spaces.run("ip", "link", "set", "nl-ov1", "alias", BRIDGE_MARK)
    spaces.run(*f"ip link add port9 mtu 1450 up master nl-ov1 type veth peer name eth0 netns {container.path}".split())
    with spaces.inside(container):
        spaces.run(*f"ip link set eth0 address {holder.mac} mtu 1450 up".split())
        spaces.run(*f"ip address add {holder.address}/24 dev eth0".split())
    with Session() as session:
        made = Reconciler(session, node, Choice("eth0"), (DEFAULT,))
        for peer in NODES.values():
            if peer != node:
                made.put_peer(peer)
        made.define_overlays([OV1])
        made.full()
        yield HostOfOne(space, made)


@pytest.fixture
def containers() -> Iterator[list[spaces.Space]]:
    """One of each host."""
    with spaces.fresh() as one, spaces.fresh() as other:
        yield [one, other]


@pytest.fixture
def hosts(containers: list[spaces.Space]) -> Iterator[tuple[HostOfOne, HostOfOne]]:
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(spaces.fresh()) for _ in range(2))
        with spaces.inside(a):
            spaces.run(*f"ip link add eth0 type veth peer name eth0 netns {b.path}".split())
        made = []
        for node, space, container, holder in zip(NODES.values(), (a, b), containers, HOLDERS, strict=True):
            with spaces.inside(space):
                made.append(stack.enter_context(host(space, node, container, holder)))
        yield made[0], made[1]


@pytest.fixture
def joined(hosts: tuple[HostOfOne, HostOfOne]) -> HostOfOne:
    """Host a, when both know who is where."""
    for one in hosts:
        one.tell(HOLDERS)
    return hosts[0]


def test_all_is_well(joined: HostOfOne) -> None:
    assert joined.examine() == [
        Finding("overlays", "ok", "ov1: 2 containers on 2 hosts, all 7 entries are in the kernel"),
        Finding("overlays", "ok", "ov1: containers of 1 hosts answer through nl-vx256"),
    ]


@pytest.mark.parametrize(
    ("spoil", "said", "remedy"),
    [
        ("ip link set nl-ov1 down", "bridge nl-ov1 is down", "ip link set nl-ov1 up"),
        ("ip link set nl-vx256 down", "nl-vx256 is down, though it is known", "ip link set nl-vx256 up"),
        ("ip link set nl-vx256 nomaster", "nl-vx256 is not in bridge nl-ov1", "ip link set nl-vx256 master nl-ov1"),
        ("ip link delete nl-vx256", "nl-vx256, its way to other hosts, is not", "see its log"),
        ("ip link set nl-vx256 alias theirs", "nl-vx256 is there that is not netd's", "ip link delete nl-vx256"),
        (
            "ip link delete nl-vx256; ip link add swarm0 type vxlan id 256 dstport 4789 dev eth0",
            "swarm0 is there that is not netd's, with VNI 256",
            "ip link delete swarm0; else make the network anew with another --vni",
        ),
        ("bridge link set dev nl-vx256 neigh_suppress off", "does not answer for containers", "4.15"),
        ("ip link set nl-ov1 mtu 1500", "bridge nl-ov1 sends packets of 1500 bytes", "ip link set nl-ov1 mtu 1450"),
        ("ip link set port9 mtu 1500", "containers behind port9 send packets of 1500 bytes", "DEL and ADD"),
    ],
)
def test_what_others_changed_in_the_kernel(joined: HostOfOne, spoil: str, said: str, remedy: str) -> None:
    joined.run(spoil)
    found = joined.examine()
    assert any(one.level == "problem" and said in one.text and remedy in one.remedy for one in found), found
    assert not any("all 7 entries" in one.text for one in found)


def test_what_the_kernel_refused(hosts: tuple[HostOfOne, HostOfOne]) -> None:
    one = hosts[0]
    one.run("ip link delete nl-vx256; ip link add swarm0 type vxlan id 256 dstport 4789 dev eth0")
    one.full()
    one.tell(HOLDERS)
    (first, second) = one.problems()
    assert "swarm0 is there that is not netd's" in first[0]
    assert second[0] == "ov1: 4 of 7 entries are missing"  # the bridge itself takes a neighbour and the rest


def test_a_kernel_without_vxlan(hosts: tuple[HostOfOne, HostOfOne]) -> None:
    """The kernel is asked for a kind of link that it has not; its answer is the same. Once it has it, all comes."""
    one = hosts[0]
    one.run("ip link delete nl-vx256")
    session = one.reconciler.session
    with spaces.inside(one.space), KindUnknown(netlink.ROUTE) as lacking, mock.patch.object(session, "_rtnl", lacking):
        one.reconciler.full()
        one.reconciler.sync(one.reconciler.overlays.replace("ov1", HOLDERS))
        (first, second) = one.problems()
        assert first == ("ov1: this kernel has no VXLAN", REMEDY)
        assert second[0] == "ov1: 4 of 7 entries are missing"
        # The other networks' tunnels: the same.
        one.reconciler.configure(replace(NODES["a"], subnets=(ip_network("10.2.1.0/24"),)), Choice("eth0"), (DEFAULT,))
        one.run("ip link delete nl-vx1")
        one.reconciler.full()
        told = pb.StatusResponse(problems=one.reconciler.problems())
        assert ("this kernel has no VXLAN", REMEDY) in [
            (finding.text, finding.remedy) for finding in doctor._daemon(netd.document(told, "socket"))
        ]
    with spaces.inside(one.space):
        one.reconciler.sync(one.reconciler.refused())
    assert not any("VXLAN" in problem for problem in one.reconciler.problems())
    assert "nl-vx256" in one.found("ip -br link")


def test_entries_that_are_missing(joined: HostOfOne) -> None:
    overlays = joined.reconciler.overlays
    joined.reconciler.found.drop(next(iter(overlays.keys_of("ov1", HOLDERS[1].address))))
    assert joined.problems() == [
        ("ov1: 1 of 7 entries are missing", "netloom route ADDRESS says which, and netd's log why")
    ]


def test_a_vni_of_netds_own(joined: HostOfOne) -> None:
    with spaces.inside(joined.space):
        messages = overlay_messages(joined.reconciler, lambda _: "up")
        network = pb.Network(name="default", device="nl-vx256", vni=256)
        status = netd.document(pb.StatusResponse(overlays=messages, networks=[network]), "socket")
        (first, *_) = doctor_overlays.examine(status)
    assert first.text == "ov1: VNI 256 is that of the tunnels of network default, too"


def test_one_mac_on_two_hosts(joined: HostOfOne) -> None:
    joined.tell([*HOLDERS, Holder(ip_address("10.9.0.4"), HOLDERS[1].mac, "e")])
    assert not any("one MAC" in text for text, _ in joined.problems())  # nothing leads to e
    with spaces.inside(joined.space):
        joined.reconciler.sync(joined.reconciler.put_peer(replace(NODES["b"], name="e", addresses=(EXTRA,))))
    texts = [text for text, _ in joined.problems()]
    assert any(text.startswith("ov1: 10.9.0.3 on b and 10.9.0.4 on e have one MAC") for text in texts), texts


def test_before_the_holders_are_known(hosts: tuple[HostOfOne, HostOfOne]) -> None:
    (problem,) = hosts[0].problems()
    assert problem[0] == "ov1: it is not known yet who is where, so nothing passes nl-vx256"


def test_hosts_that_nothing_can_lead_to(joined: HostOfOne) -> None:
    lost = Holder(ip_address("10.9.0.4"), "02:42:0a:09:00:04", "e")
    joined.tell([*HOLDERS, lost])
    assert joined.problems() == [
        (
            "ov1: 1 container on e cannot be reached, as nobody told its underlay address",
            "systemctl enable --now netloom-netd there",
        )
    ]
    joined.tell(HOLDERS)
    with spaces.inside(joined.space):
        joined.reconciler.sync(joined.reconciler.put_peer(replace(NODES["b"], addresses=(ip_address("fd00::2"),))))
    ((text, remedy),) = joined.problems()
    assert "1 container on b cannot be reached, as its underlay addresses are of another family" in text
    assert "public_ip" in remedy


def test_a_host_that_claims_anothers_underlay_address(joined: HostOfOne) -> None:
    joined.tell([*HOLDERS, Holder(ip_address("10.9.0.4"), "02:42:0a:09:00:04", "e")])
    with spaces.inside(joined.space):
        joined.reconciler.sync(joined.reconciler.put_peer(replace(NODES["b"], name="e")))
    text = "ov1: 1 container on e cannot be reached, as it claims the underlay address of b: 10.0.0.2"
    assert joined.problems() == [
        (text, "give one of them another, or remove the one that is gone: netloom node remove")
    ]


def test_what_is_lost_on_the_way(hosts: tuple[HostOfOne, HostOfOne], joined: HostOfOne) -> None:
    other = hosts[1]
    chain = "chain in { type filter hook input priority 0; udp dport 4789 drop; }"
    other.run(f"nft 'add table inet spoil {{ {chain}; }}'")
    ((text, remedy),) = joined.problems()
    assert text == "ov1: b answer, but no container there does through nl-vx256"
    assert "drop UDP port 4789" in remedy
    # A host that does not answer at all is the underlay's finding.
    other.run("nft add rule inet spoil in ip protocol icmp drop")
    assert joined.problems() == []


@pytest.mark.skipif(not IPV6, reason="no IPv6 on this machine")
def test_containers_of_ipv6_alone(hosts: tuple[HostOfOne, HostOfOne], containers: list[spaces.Space]) -> None:
    six = [replace(one, address=ip_address(f"fd09::{n}")) for n, one in enumerate(HOLDERS, 2)]
    for container, holder in zip(containers, six, strict=True):
        with spaces.inside(container):
            spaces.run("ip", "address", "flush", "dev", "eth0")
            spaces.run(*f"ip address add {holder.address}/64 dev eth0 nodad".split())
    overlay = replace(OV1, subnets=(ip_network("fd09::/64"),))
    for one in hosts:
        with spaces.inside(one.space):
            one.reconciler.define_overlays([overlay])
        one.full()
        one.tell(six)
    assert Finding("overlays", "ok", "ov1: containers of 1 hosts answer through nl-vx256") in hosts[0].examine()
    hosts[1].run("ip link set nl-vx256 down")
    ((text, _),) = hosts[0].problems()
    assert text == "ov1: b answer, but no container there does through nl-vx256"


def test_entries_that_the_other_host_lacks(hosts: tuple[HostOfOne, HostOfOne]) -> None:
    hosts[0].tell(HOLDERS)
    assert any("no container there does through" in text for text, _ in hosts[0].problems())
    hosts[1].tell(HOLDERS)
    assert hosts[0].problems() == []


def test_a_host_that_is_on_none(hosts: tuple[HostOfOne, HostOfOne]) -> None:
    one = hosts[0]
    one.run("ip link delete nl-ov1")
    one.full()
    assert one.examine() == [Finding("overlays", "ok", "no container of this host is on any of 1 overlays")]
    with spaces.inside(one.space):
        one.reconciler.define_overlays([])
        one.reconciler.full()
    assert one.examine() == []
