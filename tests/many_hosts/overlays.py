"""What tests of overlay networks look at: frames on the underlay, and what a host's kernel has of a network."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from tests.cni.chained.traffic import Query, ask, no_answer, serving
from tests.hosts import PATIENCE_S, Host, HostError, Netns
from tests.many_hosts.fleet import Container
from tests.underlay import Underlay

# Sees every frame that enters the segment, and prints, once its input ends, how many there were in VXLAN: all, those
# to more than one inner MAC, and those of ARP or neighbour discovery.
_COUNTER = """
import json, select, socket, sys
SOLICITATION, ADVERTISEMENT, OUTGOING = 135, 136, 4
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
    raw.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)
    raw.setblocking(False)
    print("ready", flush=True)
    found = {"all": 0, "to_many": 0, "resolving": 0}
    while True:
        readable = select.select([raw, sys.stdin], [], [])[0]
        if raw not in readable:
            break
        frame, where = raw.recvfrom(2048)
        if where[2] == OUTGOING:
            continue
        ethertype, at = frame[12:14], 14
        if ethertype == b"\\x08\\x00" and frame[23] == 17:
            at += (frame[14] & 15) * 4
        elif ethertype == b"\\x86\\xdd" and frame[20] == 17:
            at += 40
        else:
            continue
        if frame[at + 2 : at + 4] != b"\\x12\\xb5":  # 4789
            continue
        inner = frame[at + 16 :]
        found["all"] += 1
        found["to_many"] += inner[0] & 1
        neighbours = inner[12:14] == b"\\x86\\xdd" and inner[20] == 58 and inner[54] in (SOLICITATION, ADVERTISEMENT)
        found["resolving"] += inner[12:14] == b"\\x08\\x06" or neighbours
    print(json.dumps(found))
"""

# Arguments: an interface, its address, how often, and addresses. Asks for the MAC of each, to everybody, as ARP or
# neighbour discovery does before anything is known; prints how many answers came. Stops waiting after a while.
_RESOLVER = """
import fcntl, ipaddress, select, socket, struct, sys, time
device, own, times, *targets = sys.argv[1:]
own, targets = ipaddress.ip_address(own), [ipaddress.ip_address(one) for one in targets]

def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

def request(target):
    if own.version == 4:
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + own.packed + bytes(6) + target.packed
        return b"\\xff" * 6 + mac + b"\\x08\\x06" + arp
    group = b"\\xff\\x02" + bytes(9) + b"\\x01\\xff" + target.packed[13:]
    icmp = struct.pack("!BBHI", 135, 0, 0, 0) + target.packed + b"\\x01\\x01" + mac
    ends = own.packed + group
    icmp = icmp[:2] + struct.pack("!H", checksum(ends + struct.pack("!II", len(icmp), 58) + icmp)) + icmp[4:]
    header = struct.pack("!IHBB", 6 << 28, len(icmp), 58, 255)
    return b"\\x33\\x33" + group[12:] + mac + b"\\x86\\xdd" + header + ends + icmp

def answers(frame):
    if own.version == 4:
        return frame[12:14] == b"\\x08\\x06" and frame[21] == 2 and frame[28:32] in known
    return frame[12:14] == b"\\x86\\xdd" and frame[20] == 58 and frame[54] == 136 and frame[62:78] in known

known = {one.packed for one in targets}
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind((device, 3))
    raw.setblocking(False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        mac = fcntl.ioctl(probe, 0x8927, struct.pack("256s", device.encode()))[18:24]
    asked = answered = 0
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and answered < int(times):
        if asked < int(times):
            raw.send(request(targets[asked % len(targets)]))
            asked += 1
            deadline = time.monotonic() + 1
        while select.select([raw], [], [], 0 if asked < int(times) else 0.2)[0]:
            answered += answers(raw.recv(2048))
            if answered >= int(times):
                break
    print(answered)
"""


class Frames:
    """What was seen on a segment, once the block of `counted` is over: frames in VXLAN, those of them to more than one
    MAC, and those that ask for a MAC, or answer."""

    all = to_many = resolving = 0


@contextlib.contextmanager
def counted(underlay: Underlay) -> Iterator[Frames]:
    """Counts while the block lasts."""
    argv = [sys.executable, "-I", "-S", "-c", _COUNTER]
    process = underlay.host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    found = Frames()
    try:
        if process.stdout.readline() != "ready\n":
            raise HostError("the frames on the underlay cannot be counted")
        yield found
        out, _ = process.communicate("\n", timeout=PATIENCE_S)
        found.__dict__.update(json.loads(out))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def resolve(where: Netns, own: str, targets: Sequence[str], times: int, device: str = "eth0") -> int:
    """Asks for the targets' MACs by broadcast, one after the other, so often in all; how many answers came."""
    argv = [sys.executable, "-I", "-S", "-c", _RESOLVER, device, own, str(times), *targets]
    return int(where.run(argv).stdout)


def addresses(*pods: Container) -> list[str]:
    """Of both families, as far as there are any."""
    return [address for pod in pods for address in (pod.ipv4, pod.ipv6) if address]


def at_port_80(*pods: Container) -> list[Query]:
    return [("tcp", address, 80) for address in addresses(*pods)]


@contextlib.contextmanager
def web(*pods: Container) -> Iterator[None]:
    """A server at port 80 of each, who says its container's id and whom it sees."""
    with contextlib.ExitStack() as servers:
        for one in pods:
            servers.enter_context(serving(one.netns, one.id, "tcp:80"))
        yield


def assert_reach(pods: Sequence[Container]) -> None:
    """Each of them reaches each other by all its addresses, with its own. All have servers."""
    for one in pods:
        others = [other for other in pods if other.id != one.id]
        wanted = [
            f"{other.id} {one.ipv6 if ':' in address else one.ipv4}" for other in others for address in addresses(other)
        ]
        assert ask(one.netns, *at_port_80(*others)) == wanted, one.id


def assert_apart(pods: Sequence[Container], others: Sequence[Container]) -> None:
    """None of the first reaches any of the others, nor the other way round. All have servers."""
    for here, there in ((pods, others), (others, pods)):
        for one in here:
            questions = at_port_80(*there)
            assert no_answer(one.netns, *questions) == [""] * len(questions), one.id


def state(host: Host, network: str, device: str) -> list[str]:
    """All that netd made for a network, one line each, as iproute2 shows it; empty where there is nothing."""
    links, bridge = host.links(), f"nl-{network}"
    if device not in links:
        return []
    shown, lines = links[device], []
    lines.append(f"link mtu {shown['mtu']} {shown['address']} {shown.get('master', '-')} {'UP' in shown['flags']}")
    port = shown["linkinfo"].get("info_slave_data", {})
    lines.append(f"port {[port.get(f'{key}flood') for key in ('', 'mcast_', 'bcast_')]} {port.get('learning')}"
                 f" {port.get('neigh_suppress')}")  # fmt: skip
    for family in ("-4", "-6"):
        neighbours = host.run(["ip", family, "neigh", "show", "dev", bridge, "nud", "permanent"], check=False).stdout
        lines += [f"neigh {line}" for line in neighbours.splitlines() if not line.startswith("ff")]
    lines += [f"fdb {line}" for line in host.run(["bridge", "fdb", "show", "dev", device]).stdout.splitlines()]
    return sorted(" ".join(line.split()) for line in lines)


def holds(host: Host, network: str, *pods: Container) -> bool:
    """Whether a host's kernel knows of all these, who are on other hosts, that they are on the network."""
    shown = host.run(["ip", "neigh", "show", "dev", f"nl-{network}", "nud", "permanent"], check=False).stdout
    known = {ip_address(line.split()[0]) for line in shown.splitlines()}
    return {ip_address(one) for one in addresses(*pods)} <= known
