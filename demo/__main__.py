"""One host from end to end: `make demo`.

Makes a private host (its own network and mount namespace), starts ipamd in it on a fresh SQLite store, and then is a
container runtime: it makes namespaces and executes the plugins, one execve for each verb, as the CNI specification
1.1.0 has it. What it claims it has looked up in the kernel. Exit 0 when all of it held, 1 when something did not (with
what was wanted and found), 128 and the signal's number when interrupted; in each case nothing stays behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from demo import picture
from kernel import nft
from tests.hosts import IPV6, CniCall, Host, HostError, Ipamd, Netns, remove_scratch, sweep

SUBNETS = ("10.88.0.0/24", "fd00:88::/64") if IPV6 else ("10.88.0.0/24",)
GATEWAYS = ("10.88.0.1", "fd00:88::1") if IPV6 else ("10.88.0.1",)
BRIDGE = "netloom0"
SPEC = "1.1.0"
LOOPBACK: Mapping[str, Any] = {"cniVersion": SPEC, "name": "lo", "type": "loopback"}
NETWORK: Mapping[str, Any] = {
    "cniVersion": SPEC,
    "name": "demo",
    "type": "bridge",
    "bridge": BRIDGE,
    "isDefaultGateway": True,
    "ipMasq": True,
    "ipam": {"type": "ipamd", "ranges": [[{"subnet": subnet}] for subnet in SUBNETS]},
}


class Terminal:
    """Progress, line by line; colour and redrawing only where a person watches."""

    def __init__(self) -> None:
        self.marks = picture.alphabet(os.environ)
        self._alive = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._colour = self._alive and not os.environ.get("NO_COLOR")

    def say(self, text: str = "") -> None:
        self._write(f"{text}\n")

    def title(self, text: str) -> None:
        self.say()
        self.say(f"\x1b[1m{text}\x1b[0m" if self._colour else text)

    @contextmanager
    def step(self, text: str) -> Iterator[list[str]]:
        """Says what is done, and then how long it took and what was appended to the list."""
        if self._alive:
            self._write(f"     {text} ...\r")
        found: list[str] = []
        began = time.monotonic()
        yield found
        took = f"{(time.monotonic() - began) * 1000:7.1f} ms"
        if self._alive:
            self._write("\x1b[2K")
        mark = f"\x1b[32m{self.marks.held}\x1b[0m" if self._colour else self.marks.held
        self.say(f"  {mark} {text.ljust(44)} {took}   {'  '.join(found)}".rstrip())

    def _write(self, text: str) -> None:
        sys.stdout.write(text.encode("ascii", "replace").decode() if self.marks is picture.ASCII else text)
        sys.stdout.flush()


@dataclass
class Runtime:
    """What containerd or podman does with plugins: executes them and keeps the results for the later verbs."""

    host: Host
    results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    times_ms: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, netns: Netns, ifname: str) -> dict[str, Any]:
        result = self._call("ADD", netns.name, netns.path, ifname).result()
        self.results[netns.name, ifname] = result
        return result

    def check(self, netns: Netns, ifname: str) -> None:
        self._call("CHECK", netns.name, netns.path, ifname).ok()

    def delete(self, netns: Netns, ifname: str) -> None:
        self._call("DEL", netns.name, netns.path, ifname).ok()
        del self.results[netns.name, ifname]

    def status(self) -> None:
        self._call("STATUS", "", "", "eth0").ok()

    def gc(self) -> None:
        """Tells the plugins which attachments are in use; what else they know of this network may go."""
        valid = [{"containerID": container, "ifname": ifname} for container, ifname in self.results]
        self._call("GC", "", "", "eth0", {"cni.dev/valid-attachments": valid}).ok()

    def lose(self, netns: Netns) -> None:
        """The container dies and its runtime with it: no DEL, no memory of it."""
        netns.delete()
        self.results = {key: result for key, result in self.results.items() if key[0] != netns.name}

    def _call(
        self, verb: str, container: str, netns: str, ifname: str, extra: Mapping[str, Any] | None = None
    ) -> CniCall:
        conf: dict[str, Any] = {**(LOOPBACK if ifname == "lo" else NETWORK), **(extra or {})}
        if verb in ("CHECK", "DEL"):
            conf["prevResult"] = self.results[container, ifname]
        call = self.host.cni(verb, conf["type"], conf, container_id=container, netns=netns, ifname=ifname)
        self.times_ms.setdefault((conf["type"], verb), []).append(call.took_s * 1000)
        return call


def main() -> int:
    terminal = Terminal()
    # A shell without job control starts what it puts in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupted)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _interrupted)
    try:
        for what in sweep():
            terminal.say(f"left by a dead run: {what}")
        with Host("demo") as host:
            _show(terminal, host)
    except BrokenPipeError:
        # Whoever read this has gone; what Python flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (HostError, OSError) as error:
        terminal.say()
        sys.stderr.write(f"demo: this did not hold: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo: interrupted; everything was removed\n")
        return 130
    finally:
        remove_scratch()
    return 0


def _show(terminal: Terminal, host: Host) -> None:
    terminal.title("A host with its own network, /run, /etc/netloom and /opt/cni/bin; the machine's stay as they are")
    with terminal.step("ipamd starts on an empty SQLite store"):
        ipamd = host.start_ipamd()
    try:
        _play(terminal, host, ipamd)
    except HostError as error:
        raise HostError(f"{error}\nthe end of ipamd's log:\n{ipamd.log()[-2000:]}") from None


def _play(terminal: Terminal, host: Host, ipamd: Ipamd) -> None:
    runtime = Runtime(host)
    before = host.snapshot()
    with terminal.step("STATUS: bridge and ipamd are ready"):
        runtime.status()

    terminal.title("Two containers")
    containers = [_attach(terminal, runtime, name) for name in ("blue", "green")]
    with terminal.step("CHECK: every interface is as it was left"):
        for container in containers:
            for ifname in ("lo", "eth0"):
                runtime.check(container, ifname)
    round_trips = _ping(terminal, runtime, containers)
    seen = [_seen(host, container) for container in containers]
    bridge = _bridge(host)

    terminal.title("And away again")
    lost = _attach(terminal, runtime, "lost")
    for container in containers:
        with terminal.step(f"DEL eth0 and lo of {container.name}"):
            runtime.delete(container, "eth0")
            runtime.delete(container, "lo")
        container.delete()
    runtime.lose(lost)
    held = host.allocations()
    if not held or not all("lost" in line for line in held):
        raise HostError(f"wanted only the addresses of lost to be taken still, found {held}")
    with terminal.step("GC: lost died without DEL, its leftovers go"):
        runtime.gc()
    with terminal.step("nothing is left") as found:
        found.append(_prove_clean(host, before))
    with terminal.step("ipamd stops on SIGTERM"):
        status = ipamd.stop()
    if status != 0:
        raise HostError(f"wanted ipamd to exit 0, found {status}")

    terminal.title("What it looked like")
    for line in picture.topology(seen, bridge, terminal.marks):
        terminal.say(f"  {line}")
    terminal.say()
    for line in picture.table(("ping", "round trip"), [(name, f"{ms:.3f} ms") for name, ms in round_trips]):
        terminal.say(f"  {line}")
    terminal.say()
    for line in _verbs(runtime):
        terminal.say(f"  {line}")
    terminal.say()
    terminal.say("All of it held.")


def _attach(terminal: Terminal, runtime: Runtime, name: str) -> Netns:
    netns = runtime.host.netns(name)
    with terminal.step(f"ADD lo and eth0 to {name}") as found:
        runtime.add(netns, "lo")
        result = runtime.add(netns, "eth0")
        found += [ip["address"] for ip in result["ips"]]
    there = netns.addresses()
    printed = sorted(ip["address"] for ip in result["ips"])
    if sorted(there.get("eth0", [])) != printed or len(printed) != len(SUBNETS):
        raise HostError(f"{name}: the result names {printed}, the kernel has {there}")
    if "UP" not in netns.links()["lo"]["flags"]:
        raise HostError(f"{name}: ADD of lo left it down")
    return netns


def _ping(terminal: Terminal, runtime: Runtime, containers: list[Netns]) -> list[tuple[str, float]]:
    """Every container to its gateways, then every one to every other, in each family."""
    addresses = {
        container.name: [ip["address"].split("/")[0] for ip in runtime.results[container.name, "eth0"]["ips"]]
        for container in containers
    }
    arrow = terminal.marks.arrow
    pairs = [(container, "gateway", gateway) for container in containers for gateway in GATEWAYS]
    pairs += [(a, b.name, to) for a in containers for b in containers if a is not b for to in addresses[b.name]]
    round_trips = []
    with terminal.step(f"{len(pairs)} pings, all answered"):
        for source, name, target in pairs:
            round_trips.append((f"{source.name} {arrow} {name} {target}", source.ping(target)))
    return round_trips


def _seen(host: Host, netns: Netns) -> picture.Container:
    eth0 = netns.links()["eth0"]
    peers = {link["ifindex"]: name for name, link in host.links().items()}
    return picture.Container(
        name=netns.name,
        netns=netns.path,
        interface="eth0",
        mac=eth0["address"],
        addresses=tuple(netns.addresses()["eth0"]),
        host_interface=peers[eth0["link_index"]],
    )


def _bridge(host: Host) -> picture.Bridge:
    return picture.Bridge(BRIDGE, host.links()[BRIDGE]["address"], tuple(host.addresses()[BRIDGE]))


def _prove_clean(host: Host, before: Any) -> str:
    """Only the empty nftables tables stay, for they are shared by all containers; all else must be gone."""
    left = host.allocations()
    if left:
        raise HostError(f"wanted no allocation to be left, found {left}")
    sets = [one for entry in host.nft() for kind, one in entry.items() if kind in ("set", "map") and "elem" in one]
    # The tables' own version is an element of theirs.
    full = [one for one in sets if one["name"] != nft.SCHEMA]
    if full:
        raise HostError(f"wanted no element to be left in any set or map, found {full}")
    host.assert_clean(before, ruleset=False)
    return "links, addresses, routes, nftables elements, files, allocations"


def _verbs(runtime: Runtime) -> list[str]:
    verbs = ("STATUS", "ADD", "CHECK", "DEL", "GC")
    rows = []
    for plugin in ("bridge", "loopback"):
        times = [runtime.times_ms.get((plugin, verb), []) for verb in verbs]
        rows.append((plugin, *(f"{sorted(t)[len(t) // 2]:.0f} ms" if t else "" for t in times)))
    return picture.table(("median of", *verbs), rows)


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    # Unwinds like Ctrl-C, so that hosts clean up; the status says which signal it was.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
