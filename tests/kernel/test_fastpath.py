"""The programs of the fast path on real links: what passes by the bridge, and what goes on to it.

A bridge with two containers and a link that stands for the tunnel, behind which is a third. The bridge drops every IP
packet that it would forward: what arrives took the fast path.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest

from kernel import bpf, fastpath, link
from kernel.errors import NotFound
from kernel.fastpath import TUNNEL, Places
from kernel.session import Session
from tests.hosts import PATIENCE_S
from tests.kernel import spaces
from tests.kernel.spaces import Space, ip, run

pytestmark = pytest.mark.kernel

MTU = 1400
MACS = {name: f"02:42:0a:00:00:0{number}" for number, name in enumerate(("one", "two", "far"), 1)}
CLOSED = "table bridge test { chain f { type filter hook forward priority 0; ether type { ip, ip6 } drop; }; }"


class Stage:
    """In the host's namespace."""

    def __init__(self, session: Session, there: dict[str, Space]) -> None:
        self.session = session
        self.there = there
        self.index = {one.name: one.index for one in link.all_links(session)}
        self.places = Places(16)

    def inward(self) -> bool:
        return self._attach("far", fastpath.load_inward(self.places))

    def outward(self, name: str, mac: str = "") -> bool:
        return self._attach(name, fastpath.load_outward(self.places, self.index["far"], mac or MACS[name]))

    def _attach(self, name: str, program: int) -> bool:
        try:
            return fastpath.attach(self.session, self.index[name], program)
        finally:
            os.close(program)

    def all_on_it(self) -> None:
        assert self.inward()
        for name in ("one", "two"):
            assert self.outward(name)
            self.places.put(MACS[name], self.index[name])
        self.places.put(MACS["far"], TUNNEL)

    def reaches(self, source: str, target: str, size: int = 100) -> bool:
        """Whether a datagram of an IP packet of that size, which may not be cut, arrives, and so does its answer."""
        with self.socket(source) as one, self.socket(target) as two:
            try:
                one.sendto(bytes(size - 28), two.getsockname())
                answered, _ = two.recvfrom(65536)
                two.sendto(answered, one.getsockname())
                return len(one.recv(65536)) == size - 28
            except TimeoutError:
                return False

    def socket(self, name: str) -> socket.socket:
        with spaces.inside(self.there[name]):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: IP_PMTUDISC_DO
        made.settimeout(0.2)
        made.bind((f"10.0.0.{list(MACS).index(name) + 1}", 0))
        return made


@pytest.fixture
def stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        host = stack.enter_context(spaces.fresh())
        there = {name: stack.enter_context(spaces.fresh()) for name in MACS}
        stack.enter_context(spaces.inside(host))
        session = stack.enter_context(Session())
        run("ip", "link", "add", "br0", "mtu", str(MTU), "up", "type", "bridge")
        for number, (name, space) in enumerate(there.items(), 1):
            link.add_veth(session, link.VethSpec(name, "eth0", space.fd, MTU, MACS[name]))
            run("ip", "link", "set", name, "up", "master", "br0")
            with spaces.inside(space):
                run("ip", "link", "set", "eth0", "up")
                run("ip", "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
                for other, mac in enumerate(MACS.values(), 1):
                    run("ip", "neigh", "replace", f"10.0.0.{other}", "lladdr", mac, "dev", "eth0")
        made = Stage(session, there)
        stack.callback(made.places.close)
        yield made


@contextmanager
def closed() -> Iterator[None]:
    """The long way is closed to IP."""
    run("nft", CLOSED)
    yield
    run("nft", "delete table bridge test")


def test_the_long_way_is_there_without_it_and_beside_it(stage: Stage) -> None:
    assert stage.reaches("one", "two")
    with closed():
        assert not stage.reaches("one", "two")
        assert not stage.reaches("one", "far")
    assert stage.inward()
    assert stage.outward("one")
    assert stage.outward("two")
    assert stage.reaches("one", "two")  # nothing is known: all goes on
    assert stage.reaches("one", "far")


def test_all_that_is_known_passes_by_the_bridge(stage: Stage) -> None:
    stage.all_on_it()
    with closed():
        for source in MACS:
            for target in MACS.keys() - {source}:
                assert stage.reaches(source, target), (source, target)
    stage.places.drop(MACS["far"])
    with closed():
        assert not stage.reaches("one", "far")
    assert stage.reaches("one", "far")


def test_who_sends_with_another_mac_goes_the_long_way(stage: Stage) -> None:
    stage.all_on_it()
    assert stage.outward("one", "02:42:0a:00:00:09")
    with closed():
        assert not stage.reaches("one", "two")
        assert stage.reaches("far", "two")
    assert stage.reaches("one", "two")


def test_a_port_that_is_gone_is_nobodys(stage: Stage) -> None:
    """Its number stands there still, and who has the MAC by now is found by the bridge."""
    stage.all_on_it()
    with spaces.inside(stage.there["two"]):
        run("ip", "link", "delete", "eth0")
    link.add_veth(stage.session, link.VethSpec("new", "eth0", stage.there["two"].fd, MTU, MACS["two"]))
    run("ip", "link", "set", "new", "up", "master", "br0")
    with spaces.inside(stage.there["two"]):
        run("ip", "link", "set", "eth0", "up")
        run("ip", "address", "add", "10.0.0.2/24", "dev", "eth0")
        for name, other in (("one", 1), ("far", 3)):
            run("ip", "neigh", "replace", f"10.0.0.{other}", "lladdr", MACS[name], "dev", "eth0")
    assert stage.places.all()[MACS["two"]] != link.get(stage.session, "new").index
    assert stage.reaches("one", "two")
    assert stage.reaches("far", "two")


def test_a_tunnel_that_is_gone_is_no_trap(stage: Stage) -> None:
    """Made anew it has another index, of which a program knows nothing: the bridge does."""
    stage.index["far"] = 4711
    assert stage.outward("one")
    stage.places.put(MACS["far"], TUNNEL)
    with closed():
        assert not stage.reaches("one", "far")
    assert stage.reaches("one", "far")


def test_what_is_handed_to_a_container_is_for_it(stage: Stage) -> None:
    """The kernel of the tests says so itself; older ones keep that a frame was for another MAC than the host's end has,
    and the container would drop it. So what is looked at is the program."""
    for program in (fastpath._inward(stage.places.fd), fastpath._outward(stage.places.fd, 1, bytes(6))):
        code = program.code()
        instructions = [struct.unpack_from("=BBhi", code, at) for at in range(0, len(code), 8)]
        calls = [helper for operation, _, _, helper in instructions if operation == 0x85]
        assert calls[:4] == [bpf.MAP_LOOKUP, bpf.CHECK_MTU, bpf.CHANGE_TYPE, bpf.REDIRECT_PEER]


def test_what_is_cleared_goes_the_long_way(stage: Stage) -> None:
    stage.all_on_it()
    stage.places.clear()
    assert stage.places.all() == {}
    with closed():
        assert not stage.reaches("one", "two")
    assert stage.reaches("one", "far")


def test_what_is_too_large_for_a_container_is_not_forced_on_it(stage: Stage) -> None:
    stage.all_on_it()
    with spaces.inside(stage.there["one"]):
        run("ip", "link", "set", "eth0", "mtu", "1500")
    with closed():
        assert stage.reaches("one", "two", MTU)
        assert not stage.reaches("one", "two", MTU + 1)


def test_what_asks_who_has_an_address_goes_the_long_way(stage: Stage) -> None:
    stage.all_on_it()
    with spaces.inside(stage.there["one"]):
        run("ip", "neigh", "flush", "all", "nud", "permanent")
    with closed():
        assert stage.reaches("one", "two")
        with spaces.inside(stage.there["one"]):
            assert [one["lladdr"] for one in ip("neigh", "show", "10.0.0.2")] == [MACS["two"]]


def test_a_frame_with_a_tag_goes_the_long_way(stage: Stage) -> None:
    """What has a tag of 802.1Q may not be for the container's own interface. This kernel makes no such links, so one is
    sent by hand."""
    stage.all_on_it()
    script = "import socket, sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0)); "
    script += "s.send(bytes.fromhex(sys.argv[1]))"
    frame = (MACS["two"] + MACS["one"]).replace(":", "") + "8100" + "0005" + "0800" + "45" + "00" * 60
    run(
        "nft",
        "table bridge test { chain f { type filter hook forward priority 0; ether daddr "
        + MACS["two"]
        + " counter; }; }",
    )
    with spaces.inside(stage.there["one"]):
        run("python3", "-c", script, frame)
    assert "packets 1 " in run("nft", "list", "table", "bridge", "test")


def test_coming_and_going_loses_nothing(stage: Stage) -> None:
    """Nor does an exchange. Only the place for a program does, once (`prepare`)."""
    stage.all_on_it()
    last, ended = threading.Event(), threading.Event()
    with stage.socket("one") as one, stage.socket("far") as far, ThreadPoolExecutor(2) as threads:
        one.settimeout(PATIENCE_S)

        def answer() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    far.sendto(*far.recvfrom(100))

        def ask() -> int:
            sent = 0
            while not last.is_set():
                sent += 1
                one.sendto(sent.to_bytes(4, "big"), far.getsockname())
                assert one.recv(100) == sent.to_bytes(4, "big")
            return sent

        threads.submit(answer)
        asking = threads.submit(ask)
        try:
            for _ in range(30):
                for name in ("far", "one"):
                    assert fastpath.detach(stage.session, stage.index[name])
                time.sleep(0.0005)
                for _ in range(2):
                    assert stage.inward()
                    assert stage.outward("one")
            last.set()
            assert asking.result() > 30
        finally:
            last.set()
            ended.set()


def test_filters_of_somebody_else_are_left_alone(stage: Stage) -> None:
    run("tc", "qdisc", "add", "dev", "one", "ingress")
    run("tc", "filter", "add", "dev", "one", "parent", "ffff:", "protocol", "all", "u32", "match", "u32", "0", "0")
    run("tc", "qdisc", "add", "dev", "two", "clsact")
    before = run("tc", "filter", "show", "dev", "one", "ingress")
    for name in ("one", "two"):
        assert fastpath.state(stage.session, stage.index[name]) == "foreign"
        assert not stage.outward(name)
        assert not fastpath.detach(stage.session, stage.index[name])
    assert run("tc", "filter", "show", "dev", "one", "ingress") == before
    assert fastpath.detach_all(stage.session, places=True) == 0


def test_what_is_beside_ours_stays_when_ours_goes(stage: Stage) -> None:
    assert stage.outward("one")
    theirs = ("u32", "match", "u32", "0", "0")
    run("tc", "filter", "add", "dev", "one", "parent", "ffff:", "protocol", "all", "pref", "9", *theirs)
    assert fastpath.state(stage.session, stage.index["one"]) == "foreign"
    assert fastpath.detach_all(stage.session, places=True) == 1
    left = run("tc", "filter", "show", "dev", "one", "ingress")
    assert "u32" in left
    assert fastpath.NAME not in left
    assert not fastpath.detach(stage.session, stage.index["one"])


def test_ours_is_exchanged_and_taken_away(stage: Stage) -> None:
    where = stage.index["one"]
    assert fastpath.state(stage.session, where) == "none"
    for _ in range(2):
        fastpath.prepare(stage.session, where)
        assert fastpath.state(stage.session, where) == "empty"
    for _ in range(3):
        assert stage.outward("one")
        assert fastpath.state(stage.session, where) == "ours"
    assert run("tc", "filter", "show", "dev", "one", "ingress").count("handle") == 1
    assert fastpath.detach(stage.session, where)
    assert fastpath.state(stage.session, where) == "empty"
    assert not fastpath.detach(stage.session, where)
    assert stage.outward("one")
    assert stage.inward()
    assert fastpath.detach_all(stage.session) == 2
    assert stage.outward("one")
    assert stage.inward()
    assert fastpath.detach_all(stage.session, places=True) == 2
    assert fastpath.state(stage.session, where) == "none"
    assert run("tc", "qdisc", "show").count("ingress") == 0


def test_a_link_that_is_not_there(stage: Stage) -> None:
    stage.index["gone"] = 4711
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotFound, match="link 4711"):
        stage.outward("gone", MACS["one"])
    assert len(os.listdir("/proc/self/fd")) == before
    assert fastpath.state(stage.session, 4711) == "none"
    assert not fastpath.detach(stage.session, 4711)


def test_a_hash_without_room_leaves_the_others_on_the_long_way(stage: Stage) -> None:
    small = Places(1)
    assert small.put(MACS["one"], 5)
    assert not small.put(MACS["two"], 6)
    assert small.put(MACS["one"], 7)
    assert small.all() == {MACS["one"]: 7}
    small.close()


def test_the_other_end_of_a_pair(stage: Stage) -> None:
    for name, mac in MACS.items():
        found = link.other_end(stage.session, link.get(stage.session, name))
        assert (found.name, found.mac) == ("eth0", mac)
