"""Shapers and redirects as we make and read them, compared with what `tc` shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import link, qdisc
from kernel.errors import Exists, KernelError, NotFound
from kernel.link import Link, VethSpec
from kernel.qdisc import INGRESS, Tbf, bucket
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space

PACKET = 1514


def tc(*arguments: str) -> list[dict[str, Any]]:
    """`tc -j` in this thread's namespace."""
    found: list[dict[str, Any]] = json.loads(spaces.run("tc", "-j", *arguments) or "[]")
    return [entry for entry in found if entry]


@pytest.mark.parametrize(
    ("rate", "burst", "wanted"),
    [
        # What the reference (1.1.1) was seen to send: 100 ms in ticks of 64 ns; 25 ms and the burst waiting.
        (1_000_000, 100_000, Tbf(1_000_000, 125_000, 1_562_500)),
        (2_000_000, 200_000, Tbf(2_000_000, 250_000, 1_562_500)),
        # Whole microseconds: 121126.
        (12_500, PACKET + 100, Tbf(12_500, 1926, 2_017_500)),
        # containerd's burst of 2**32 - 1 bits; at 10 Mbit/s there is no room for it.
        (2_500_000, 536_870_911, Tbf(2_500_000, 536_933_411, 3_355_443_187)),
        (1_250_000, 536_870_911, Tbf(1_250_000, 536_902_161, 2**32 - 1)),
        # Less than a packet is a packet, in bytes; a packet takes 1.5 ms, and 100 s.
        (1_000_000, 1, Tbf(1_000_000, 26_514, 23_656, PACKET)),
        (15, 57, Tbf(15, 1514, 1_577_083_333, PACKET)),
        # The kernel would not let a packet pass that takes more than 4.29 s, however large the bucket is.
        (100, 10_000, Tbf(100, 10_002, 1_562_500_000, 10_000)),
        # 1.5 microseconds would be one, and too little.
        (1_000_000_000, PACKET, Tbf(1_000_000_000, 25_001_514, 23, PACKET)),
        # Nothing overflows.
        (2**61 - 1, 2**32 - 2, Tbf(2**61 - 1, 2**32 - 1, 0, 2**32 - 2)),
    ],
)
def test_a_bucket_is_the_references_but_holds_a_packet(rate: int, burst: int, wanted: Tbf) -> None:
    assert bucket(rate, burst, PACKET) == wanted


@given(st.integers(1, 2**61), st.integers(0, 2**32 - 2), st.integers(82, 65549))
def test_every_bucket_holds_a_packet_and_fits_its_fields(rate: int, burst: int, packet: int) -> None:
    got = bucket(rate, burst, packet)
    assert got.burst >= packet or min(got.buffer * qdisc.TICK_NS, 2**32 - 1) * rate // 10**9 >= packet
    assert 0 <= got.buffer < 2**32
    assert 0 < got.limit < 2**32
    assert got.like(got)


def test_what_counts_as_the_same_bucket() -> None:
    one = Tbf(1000, 2000, 1_000_000)
    assert one.like(Tbf(1000, 2000, 1_000_050))
    # The reference's upper bits were cut off.
    assert Tbf(1000, 2000, 2**32 - 1).like(Tbf(1000, 2000, 5))
    for other in (Tbf(1001, 2000, 1_000_000), Tbf(1000, 2001, 1_000_000), Tbf(1000, 2000, 1_001_000)):
        assert not one.like(other)


def test_the_kernels_tick() -> None:
    psched = Path("/proc/net/psched")
    if not psched.exists():
        pytest.skip("this kernel has no traffic control")
    us_to_ns, tick_ns, *_ = (int(word, 16) for word in psched.read_text(encoding="ascii").split())
    assert (us_to_ns, tick_ns) == (1000, qdisc.TICK_NS)


@pytest.fixture
def port(session: Session, container: Space) -> Link:
    """A veth's end in the test's namespace; the other is eth0 in the container's."""
    link.add_veth(session, VethSpec("veth1", "eth0", container.fd))
    with spaces.inside(container):
        spaces.run("ip", "link", "set", "eth0", "up")
    return link.get(session, "veth1")


@pytest.fixture
def ifb(session: Session) -> Link:
    link.add_ifb(session, "ifb7", 1400)
    return link.get(session, "ifb7")


@pytest.mark.kernel
def test_an_ifb_device(session: Session, ifb: Link) -> None:
    assert (ifb.kind, ifb.mtu, ifb.up) == ("ifb", 1400, False)
    (shown,) = spaces.ip("-d", "link", "show", "ifb7")
    assert (shown["linkinfo"]["info_kind"], shown["mtu"], shown.get("txqlen")) == ("ifb", 1400, None)
    with pytest.raises(Exists, match="add ifb ifb7"):
        link.add_ifb(session, "ifb7", 1400)
    assert link.delete(session, "ifb7")


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rate", "burst", "shown"),
    [
        (1_000_000, 100_000, {"rate": 1_000_000, "burst": 100_000, "lat": 25_000}),
        (125_000, 1, {"rate": 125_000, "burst": 1_513, "lat": 25_000}),
        (15, 57, {"rate": 15, "burst": 1_513, "lat": 0}),
        (2_500_000, 536_870_911, {"rate": 2_500_000, "burst": 536_870_909, "lat": 25_000}),
        (100, 10_000, {"rate": 100, "burst": 10_000, "lat": 20_000}),
        (10**10, 10**8, {"rate": 10**10, "burst": 10**8, "lat": 25_000}),
    ],
)
def test_a_shaper_is_what_tc_shows(session: Session, port: Link, rate: int, burst: int, shown: dict[str, int]) -> None:
    wanted = bucket(rate, burst, PACKET)
    session.rtnl.execute([qdisc.tbf_message(port, wanted)])
    found = qdisc.get(session, port.index)
    assert found is not None
    assert (found.kind, found.handle, found.parent, found.index) == ("tbf", 0x10000, qdisc.ROOT, port.index)
    assert found.tbf is not None
    assert wanted.like(found.tbf)
    (entry,) = tc("qdisc", "show", "dev", port.name)
    assert (entry["kind"], entry["handle"], entry["root"]) == ("tbf", "1:", True)
    options = entry["options"]
    assert options["rate"] == shown["rate"]
    assert abs(options["burst"] - shown["burst"]) <= 3
    assert abs(options["lat"] - shown["lat"]) <= 1
    with pytest.raises(Exists, match="limit the rate of link veth1"):
        session.rtnl.execute([qdisc.tbf_message(port, wanted)])


@pytest.mark.kernel
def test_what_enters_leaves_through_the_ifb(session: Session, port: Link, ifb: Link, container: Space) -> None:
    assert (qdisc.get(session, port.index, INGRESS), qdisc.redirects(session, port.index)) == (None, set())
    session.rtnl.execute([link.up_message(ifb.index), qdisc.ingress_message(port), qdisc.redirect_message(port, ifb)])
    found = qdisc.get(session, port.index, INGRESS)
    assert found is not None
    assert (found.kind, found.handle, found.tbf) == ("ingress", 0xFFFF0000, None)
    assert qdisc.redirects(session, port.index) == {ifb.index}
    assert qdisc.redirects(session, ifb.index) == set()
    *_, shown = tc("filter", "show", "dev", port.name, "parent", "ffff:")
    assert (shown["protocol"], shown["pref"], shown["kind"]) == ("all", 1, "u32")
    (action,) = shown["options"]["actions"]
    assert (action["kind"], action["mirred_action"], action["direction"]) == ("mirred", "redirect", "egress")
    assert (action["to_dev"], action["control_action"]) == (ifb.name, {"type": "stolen"})
    with pytest.raises(Exists):
        session.rtnl.execute([qdisc.ingress_message(port)])
    # A neighbour's question is answered: what went through the ifb device came back.
    spaces.run("ip", "address", "add", "10.9.0.1/24", "dev", port.name)
    with spaces.inside(container):
        spaces.run("ip", "address", "add", "10.9.0.2/24", "dev", "eth0")
        spaces.run(sys.executable, "-I", "-S", str(Path(__file__).parent.parent / "ping.py"), "10.9.0.1", "60")
    (shown,) = json.loads(spaces.run("ip", "-j", "-s", "link", "show", ifb.name))
    assert shown["stats64"]["tx"]["packets"] > 0
    assert qdisc.delete(session, port.index, INGRESS)
    assert qdisc.redirects(session, port.index) == set()


@pytest.mark.kernel
def test_filters_of_others_are_understood(session: Session, port: Link, ifb: Link) -> None:
    spaces.run("tc", "qdisc", "add", "dev", port.name, "clsact")
    action = ["action", "mirred", "egress", "redirect", "dev", ifb.name]
    spaces.run(
        *("tc", "filter", "add", "dev", port.name, "ingress", "protocol", "all", "prio", "3", "bpf"),
        *("bytecode", "1,6 0 0 4294967295", *action),
    )
    found = qdisc.get(session, port.index, INGRESS)
    assert found is not None
    assert found.kind == "clsact"
    assert qdisc.redirects(session, port.index) == {ifb.index}


@pytest.mark.kernel
def test_what_is_not_there(session: Session, port: Link, ifb: Link) -> None:
    for parent in (qdisc.ROOT, INGRESS):
        assert qdisc.get(session, 4711, parent) is None
        assert not qdisc.delete(session, 4711, parent)
        assert not qdisc.delete(session, port.index, parent)
    # A veth has none that somebody asked for, a link that was never up has none at all.
    default = qdisc.get(session, port.index)
    assert default is not None
    assert default.handle == 0
    assert qdisc.get(session, ifb.index) is None
    assert qdisc.redirects(session, 4711) == set()
    link.delete(session, ifb.name)
    session.rtnl.execute([qdisc.ingress_message(port)])
    with pytest.raises(KernelError, match="redirect what enters link veth1 to ifb7"):
        session.rtnl.execute([qdisc.redirect_message(port, ifb)])
    with pytest.raises(NotFound):
        session.rtnl.execute([qdisc.tbf_message(ifb, bucket(1000, 0, PACKET))])


@pytest.mark.kernel
def test_all_qdiscs_of_the_namespace(session: Session, port: Link, ifb: Link) -> None:
    session.rtnl.execute([qdisc.tbf_message(ifb, bucket(1000, 2000, PACKET)), qdisc.ingress_message(port)])
    found = {(one.index, one.kind) for one in qdisc.all_qdiscs(session) if one.handle}
    assert found == {(ifb.index, "tbf"), (port.index, "ingress")}
    assert qdisc.delete(session, ifb.index)
    assert {one.kind for one in qdisc.all_qdiscs(session) if one.handle} == {"ingress"}


@pytest.mark.kernel
def test_fair_queues_below_a_shaper(session: Session, port: Link) -> None:
    rate = 100_000  # a packet takes 15 ms
    session.rtnl.execute([qdisc.tbf_message(port, bucket(rate, 2000, PACKET))])
    try:
        session.rtnl.execute([qdisc.fq_codel_message(port, rate, PACKET)])
    except NotFound:
        assert len(tc("qdisc", "show", "dev", port.name)) == 1
        pytest.skip("this kernel has no fq_codel")
    shaper, below = tc("qdisc", "show", "dev", port.name)
    assert (shaper["kind"], below["kind"], below["parent"]) == ("tbf", "fq_codel", "1:1")
    assert abs(below["options"]["target"] - 22_710) <= 2
    assert abs(below["options"]["interval"] - 122_710) <= 2
