"""Links as we make and read them, compared with what `ip` shows."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import link
from kernel.errors import Exists, KernelError, NotFound
from kernel.link import VethSpec
from kernel.netns import opened
from kernel.session import Session
from tests.hosts import wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

MAC = "02:00:00:00:00:aa"


@given(st.binary(min_size=6, max_size=6))
def test_a_mac_comes_back(packed: bytes) -> None:
    assert link.packed_mac(link.mac_text(packed)) == packed
    assert link.packed_mac(link.mac_text(packed).upper()) == packed


NO_MACS = (
    *(
        "",
        "02:00",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "02:00:00:00:00:gg",
        "02:00:00:00:00:",
        "::::::",
        "x" * 17,
    ),
    *("02:00:00:00:00:+1", "02:00:00:00:00:-1", "02:00:00:00:00: 1", "02:00:00:00:00:\u0660\u0661"),
)


@pytest.mark.parametrize("text", NO_MACS)
def test_what_is_no_mac(text: str) -> None:
    with pytest.raises(ValueError, match="no MAC address"):
        link.packed_mac(text)


@pytest.mark.kernel
def test_a_bridge_is_born_up_with_its_mac_pinned(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", MAC, mtu=1400, alias="made by a test")
    with pytest.raises(Exists, match="add bridge br0"):
        link.add_bridge(session, "br0", MAC)
    found = link.get(session, "br0")
    assert (found.kind, found.mac, found.mtu, found.up, found.alias) == ("bridge", MAC, 1400, True, "made by a test")
    assert (found.master, found.peer, found.port_state, found.hairpin) == (0, 0, -1, False)
    shown = spaces.ip("-d", "link", "show", "br0")[0]
    assert (shown["ifindex"], shown["address"], shown["ifalias"]) == (found.index, MAC, "made by a test")
    for name in ("a0", "a1", "a2"):
        link.add_veth(session, VethSpec(name, name, container.fd), found.index)
    assert link.get(session, "br0").mac == MAC
    for name in ("a0", "a1", "a2"):
        assert link.delete(session, name)
    assert link.get(session, "br0").mac == MAC


@pytest.mark.kernel
def test_a_veth_pair_is_born_in_both_namespaces(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", MAC)
    bridge = link.get(session, "br0")
    with opened(container.path) as where, session.visit(where) as inside:
        link.add_veth(session, VethSpec("veth1", "eth0", where.fd, 1300, "02:00:00:00:00:01"), bridge.index)
        eth = link.get(inside, "eth0")
        assert (eth.kind, eth.mac, eth.mtu, eth.up) == ("veth", "02:00:00:00:00:01", 1300, False)
        port = link.get(session, "veth1")
        assert (port.kind, port.mtu, port.up, port.master) == ("veth", 1300, True, bridge.index)
        assert (eth.peer, port.peer) == (port.index, eth.index)
        assert link.find(session, "eth0") is None
        assert link.by_index(inside, eth.index) == link.get(inside, "eth0")
        link.set_up(inside, eth.index)
        wait_until(lambda: link.get(session, "veth1").port_state == link.BR_FORWARDING, "a forwarding port")
        assert link.get(session, "veth1").operstate == link.OPER_UP
        link.set_down(inside, eth.index)
        assert not link.get(inside, "eth0").up
        link.set_mac(inside, eth.index, "02:00:00:00:00:02")
        assert link.get(inside, "eth0").mac == "02:00:00:00:00:02"
        assert link.delete(session, "veth1")
        assert not link.delete(session, "veth1")
        assert link.find(inside, "eth0") is None


@pytest.mark.kernel
def test_a_pair_is_made_whole_or_not_at_all(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", MAC)
    link.add_veth(session, VethSpec("veth1", "eth0", container.fd))
    for spec in (
        VethSpec("veth1", "eth1", container.fd),
        VethSpec("veth2", "eth0", container.fd),
        VethSpec("veth2", "lo", container.fd),
        VethSpec("veth2", "eth2", 9999),
        VethSpec("veth2", "eth2", os.open("/dev/null", os.O_RDONLY)),
        VethSpec("veth2", "eth2", container.fd, mtu=2**31),
        VethSpec("veth2", "eth2", container.fd, mac="01:00:00:00:00:01"),
        VethSpec("veth2", "e" * 16, container.fd),
        VethSpec("v" * 16, "eth2", container.fd),
        VethSpec("veth2", "a/b", container.fd),
    ):
        with pytest.raises(KernelError):
            link.add_veth(session, spec)
        if spec.netns_fd not in (container.fd, 9999):
            os.close(spec.netns_fd)
    with pytest.raises(KernelError):
        link.add_veth(session, VethSpec("veth2", "eth2", container.fd), master=link.get(session, "lo").index)
    assert {one.name for one in link.all_links(session)} == {"lo", "br0", "veth1"}
    with spaces.inside(container):
        assert {entry["ifname"] for entry in spaces.ip("link")} == {"lo", "eth0"}


@pytest.mark.kernel
def test_port_flags_are_what_the_kernel_shows(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", MAC)
    link.add_veth(session, VethSpec("veth1", "eth0", container.fd), link.get(session, "br0").index)
    index = link.get(session, "veth1").index
    for hairpin in (True, False):
        for isolated in (True, False):
            link.set_port(session, index, hairpin=hairpin, isolated=isolated)
            port = link.get(session, "veth1")
            assert (port.hairpin, port.isolated) == (hairpin, isolated)
            data = spaces.ip("-d", "link", "show", "veth1")[0]["linkinfo"]["info_slave_data"]
            assert (data["hairpin"], data["isolated"]) == (hairpin, isolated)


@pytest.mark.kernel
def test_promiscuous_mode(session: Session) -> None:
    link.add_bridge(session, "br0", MAC)
    index = link.get(session, "br0").index
    link.set_promiscuous(session, index, True)
    assert link.get(session, "br0").promiscuous
    assert "PROMISC" in spaces.ip("link", "show", "br0")[0]["flags"]
    link.set_promiscuous(session, index, False)
    assert not link.get(session, "br0").promiscuous


@pytest.mark.kernel
def test_a_packet_socket_is_promiscuity_without_the_flag(session: Session) -> None:
    # What tcpdump does: the interface's flags do not show it, only its count.
    import socket  # noqa: PLC0415
    import struct  # noqa: PLC0415

    link.add_bridge(session, "br0", MAC)
    index = link.get(session, "br0").index
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sniffer:
        sniffer.setsockopt(263, 1, struct.pack("iHH8s", index, 1, 0, b""))  # SOL_PACKET, PACKET_ADD_MEMBERSHIP
        assert "PROMISC" not in spaces.ip("link", "show", "br0")[0]["flags"]
        assert link.get(session, "br0").promiscuous


@pytest.mark.kernel
def test_ports_of_one_bridge_only(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", MAC)
    link.add_bridge(session, "br1", "02:00:00:00:00:bb")
    first, second = link.get(session, "br0").index, link.get(session, "br1").index
    link.add_veth(session, VethSpec("a0", "x0", container.fd), first)
    link.add_veth(session, VethSpec("b0", "x1", container.fd), second)
    link.add_veth(session, VethSpec("b1", "x2", container.fd), second)
    assert {port.name for port in link.all_links(session, first)} == {"a0"}
    assert {port.name for port in link.all_links(session, second)} == {"b0", "b1"}
    assert {one.name for one in link.all_links(session)} == {"lo", "br0", "br1", "a0", "b0", "b1"}


@pytest.mark.kernel
def test_what_is_not_there(session: Session) -> None:
    with pytest.raises(NotFound, match="look up link nothing"):
        link.get(session, "nothing")
    with pytest.raises(NotFound, match="look up link 4711"):
        link.by_index(session, 4711)
    assert link.find(session, "nothing") is None
    assert link.delete(session, "nothing") is False
    with pytest.raises(NotFound):
        link.set_up(session, 4711)


@pytest.mark.kernel
def test_what_may_not_be_deleted_is_an_error(session: Session) -> None:
    with pytest.raises(KernelError) as caught:
        link.delete(session, "lo")
    assert caught.value.errno == errno.EOPNOTSUPP
