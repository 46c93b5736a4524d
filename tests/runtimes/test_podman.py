"""podman 4 with the CNI backend: what an operator does, and what is there, and gone, afterwards.

Every scenario runs on a host with cgroup version 1 and on one with version 2.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import CNI_BIN, IPV6, HostError, wait_until
from tests.runtimes import cgroups, images, networks
from tests.runtimes.networks import bridge
from tests.runtimes.podman import Podman
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=["cgroup1", "cgroup2"])
def shared(request: pytest.FixtureRequest, launcher: Path) -> Iterator[Podman]:
    version2 = request.param == "cgroup2"
    if not version2 and not cgroups.has_version1():
        pytest.skip("this machine mounts no cgroup version 1, only cgroup2")
    with Podman(launcher, version2) as podman:
        podman.conflist("web", [bridge()])
        back = [[{"subnet": "10.21.0.0/24"}]]
        podman.conflist("back", [bridge("back0", isDefaultGateway=False, ipam={"type": "host-local", "ranges": back})])
        # Bridges, tables and directories, which stay.
        podman.start("first", "--network", "web", "--network", "back")
        podman.podman("rm", "-f", "-t", "0", "first")
        podman.settle()
        yield podman


@pytest.fixture
def podman(shared: Podman) -> Iterator[Podman]:
    """Nothing is left when a scenario is over, and nothing had to be removed for it."""
    shared.forget()
    yield shared
    names = shared.podman("ps", "-aq").stdout.split()
    if names:
        shared.podman("rm", "-f", "-t", "0", *names, check=False)
    try:
        shared.assert_clean()
    except HostError:
        shared.settle()  # what this one left is not the next one's fault
        raise
    assert names == []
    assert shared.service.cold() == []


def remove(podman: Podman, *names: str) -> None:
    podman.podman("rm", "-f", "-t", "0", *names)


def six(podman: Podman, name: str, network: str = "web") -> str:
    return str(podman.inspect(name)["NetworkSettings"]["Networks"][network]["GlobalIPv6Address"])


def test_containers_reach_each_other_and_the_world(podman: Podman) -> None:
    ids = [podman.start(name, "--network", "web") for name in ("a", "b")]
    a, b = podman.address("a", "web"), podman.address("b", "web")
    assert podman.ask(b, netns=podman.netns("a")) == "b"
    assert podman.ask(a, netns=podman.netns("b")) == "a"
    assert podman.ask(a) == "a"
    podman.netns("a").ping("10.20.0.1")
    podman.netns("a").ping(OUTSIDE)  # which has no route back: it has seen the host's address
    if IPV6:
        assert podman.ask(six(podman, "b"), netns=podman.netns("a")) == "b"
        podman.netns("a").ping("fd00:20::1")
    done = podman.podman("exec", "a", "ip", "-o", "-4", "addr", "show", "eth0").stdout
    assert f"{a}/16" in done
    add = podman.requests(ids[0], "ADD")[0]
    assert add.result()["ips"][0]["address"] == f"{a}/16"
    assert add.netns == podman.netns("a").path
    assert a in podman.netloom("ip", "list", "--container", ids[0]).stdout
    remove(podman, "a", "b")
    for one in ids:
        assert podman.verbs(one) == ["ADD bridge", "DEL bridge"]
        assert all(request.status == 0 for request in podman.requests(one))


def test_the_containers_are_where_the_version_has_them(podman: Podman) -> None:
    podman.start("a", "--network", "web")
    pid = podman.inspect("a")["State"]["Pid"]
    lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines()
    assert any(line.startswith("0::/netloom-") for line in lines if podman.cgroup2 or len(lines) == 1) or any(
        ":/netloom-" in line for line in lines if not podman.cgroup2
    )
    assert podman.podman("info", "--format", "{{.Host.CgroupsVersion}}").stdout.strip() == (
        "v2" if podman.cgroup2 else "v1"
    )
    remove(podman, "a")


def test_stop_and_start(podman: Podman) -> None:
    cid = podman.start("a", "--network", "web")
    podman.podman("stop", "-t", "0", "a")
    assert podman.verbs(cid) == ["ADD bridge", "DEL bridge"]
    podman.assert_clean("file /run/netns", "mount", "process")
    podman.podman("start", "a")
    assert podman.ask(podman.address("a", "web")) == "a"
    podman.podman("restart", "-t", "0", "a")
    assert podman.ask(podman.address("a", "web")) == "a"
    remove(podman, "a")
    assert podman.verbs(cid) == ["ADD bridge", "DEL bridge"] * 3


def test_a_container_that_ends_by_itself(podman: Podman) -> None:
    done = podman.podman(
        "run", "--rm", "--network", "web", "--cgroup-parent", cgroups.parent(), images.NAME, "ip", "-o", "link"
    )
    assert "eth0" in done.stdout
    wait_until(lambda: [line for line in podman.verbs() if line.startswith("DEL")], "the DEL")
    assert podman.verbs() == ["ADD bridge", "DEL bridge"]


def test_a_fixed_address_and_mac(podman: Podman) -> None:
    cid = podman.start("a", "--network", "web", "--ip", "10.20.7.7", "--mac-address", "02:aa:bb:cc:dd:ee")
    assert podman.address("a", "web") == "10.20.7.7"
    link = podman.netns("a").links()["eth0"]
    assert link["address"] == "02:aa:bb:cc:dd:ee"
    add = podman.requests(cid, "ADD")[0]
    assert add.args == {"IgnoreUnknown": "1", "K8S_POD_NAME": "a", "MAC": "02:aa:bb:cc:dd:ee", "IP": "10.20.7.7"}
    assert "ips" not in add.runtime_config
    assert podman.ask("10.20.7.7") == "a"
    # The same address once more is refused, the second container does not come up, and nothing of it is left.
    begin = ("run", "-d", "--network", "web", "--ip", "10.20.7.7", "--cgroup-parent", cgroups.parent(), images.NAME)
    refused = podman.podman(*begin, "sleep", "100", check=False)
    assert refused.returncode != 0
    assert "10.20.7.7" in refused.stderr
    assert cid[:12] in refused.stderr, "the holder's name"
    assert podman.ask("10.20.7.7") == "a"
    remove(podman, *podman.podman("ps", "-aq").stdout.split())


def test_two_networks(podman: Podman) -> None:
    cid = podman.start("a", "--network", "web", "--network", "back:interface_name=side,ip=10.21.0.9")
    podman.start("b", "--network", "back")
    assert set(podman.netns("a").links()) == {"lo", "eth0", "side"}
    assert podman.address("a", "back") == "10.21.0.9"
    assert podman.ask("10.21.0.9", netns=podman.netns("b")) == "a"
    assert podman.ask(podman.address("b", "back"), netns=podman.netns("a")) == "b"
    podman.netns("a").ping(OUTSIDE)
    remove(podman, "a", "b")
    assert sorted(podman.verbs(cid)) == ["ADD bridge"] * 2 + ["DEL bridge"] * 2
    assert {(request.verb, request.ifname) for request in podman.requests(cid)} == {
        (verb, ifname) for verb in ("ADD", "DEL") for ifname in ("eth0", "side")
    }


def test_connect_and_disconnect_while_it_runs(podman: Podman) -> None:
    cid = podman.start("a", "--network", "web")
    podman.start("b", "--network", "back")
    there = podman.address("b", "back")
    podman.podman("network", "connect", "back", "a", "--ip", "10.21.0.77")
    assert set(podman.netns("a").links()) == {"lo", "eth0", "eth1"}
    assert podman.ask("10.21.0.77", netns=podman.netns("b")) == "a"
    assert podman.ask(there, netns=podman.netns("a")) == "b"
    podman.podman("network", "disconnect", "back", "a")
    assert set(podman.netns("a").links()) == {"lo", "eth0"}
    assert podman.verbs(cid) == ["ADD bridge", "ADD bridge", "DEL bridge"]
    assert podman.ask(podman.address("a", "web")) == "a"
    podman.podman("network", "disconnect", "web", "a")
    assert set(podman.netns("a").links()) == {"lo"}
    podman.podman("network", "connect", "web", "a")
    assert podman.ask(podman.address("a", "web")) == "a"
    remove(podman, "a", "b")


@pytest.mark.parametrize("fixed", [(), ("--ip", "10.20.7.7")], ids=["any address", "a fixed address"])
def test_network_reload(podman: Podman, fixed: tuple[str, ...]) -> None:
    cid = podman.start("a", "--network", "web", *fixed)
    before = podman.address("a", "web"), podman.netns("a").links()["eth0"]["address"]
    podman.podman("network", "reload", "a")
    assert podman.verbs(cid) == ["ADD bridge", "DEL bridge", "ADD bridge"]
    # A reload asks for the addresses of before by runtimeConfig, the fixed one twice, and for the MAC by CNI_ARGS.
    asked = podman.requests(cid, "ADD")[1]
    assert asked.runtime_config["ips"].count(before[0]) == (2 if fixed else 1)
    assert asked.args["MAC"] == before[1]
    assert (podman.address("a", "web"), podman.netns("a").links()["eth0"]["address"]) == before
    assert podman.ask(before[0]) == "a"
    remove(podman, "a")


def test_conmon_is_killed(podman: Podman) -> None:
    """Nobody is left to call DEL when the container ends: `podman rm -f` does."""
    cid = podman.start("a", "--network", "web")
    state = podman.inspect("a")["State"]
    podman.kill(state["ConmonPid"])
    wait_until(lambda: state["ConmonPid"] not in podman.host.processes(), "the end of conmon")
    assert podman.ask(podman.address("a", "web")) == "a"
    remove(podman, "a")
    assert podman.verbs(cid) == ["ADD bridge", "DEL bridge"]
    cgroups.forget(f"libpod-{cid}")  # podman leaves it in version 1


def test_conmon_and_the_container_are_killed(podman: Podman) -> None:
    cid = podman.start("a", "--network", "web")
    state = podman.inspect("a")["State"]
    podman.kill(state["ConmonPid"])
    podman.kill(state["Pid"])
    wait_until(lambda: state["Pid"] not in podman.host.processes(), "the end of the container")
    assert podman.verbs(cid) == ["ADD bridge"]
    podman.podman("rm", "-f", "-t", "0", "a", check=False)  # podman 4.3 only finds out that it has stopped
    podman.podman("rm", "-f", "-t", "0", "--ignore", "a")
    assert podman.verbs(cid) == ["ADD bridge", "DEL bridge"]
    cgroups.forget(f"libpod-{cid}")


def test_the_container_is_killed(podman: Podman) -> None:
    """conmon sees it and has podman clean up."""
    cid = podman.start("a", "--network", "web")
    podman.kill(podman.inspect("a")["State"]["Pid"])
    wait_until(lambda: podman.verbs(cid) == ["ADD bridge", "DEL bridge"], "the DEL")
    podman.assert_clean("file /run/netns", "mount", "process", "cgroup")
    remove(podman, "a")


def test_many_at_once(podman: Podman) -> None:
    names = [f"m{number}" for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: podman.start(name, "--network", "web", "--network", "back"), names))
        addresses = list(pool.map(lambda name: podman.address(name, "web"), names))
        assert len(set(addresses)) == len(names)
        assert list(pool.map(podman.ask, addresses)) == names
        list(pool.map(lambda name: remove(podman, name), names))


def test_a_full_network_is_told_and_leaves_nothing(podman: Podman) -> None:
    path = podman.conflist("full", [bridge("full0", ipam={"type": "ipamd", "subnet": "10.22.0.0/30"})])
    podman.start("a", "--network", "full")
    refused = podman.podman(
        *("run", "-d", "--network", "full", "--cgroup-parent", cgroups.parent(), images.NAME, "sleep", "100"),
        check=False,
    )
    assert refused.returncode != 0
    assert "no free address" in refused.stderr
    remove(podman, *podman.podman("ps", "-aq").stdout.split())
    path.unlink()
    podman.delete_network("full", "full0")
    podman.netloom("pool", "delete", "net/full", check=False)


def published(podman: Podman, port: int, protocol: str = "tcp") -> list[str]:
    """Who answers on a host port: to somebody outside, to the host, on 127.0.0.1."""
    asked = ((HOST_OUTSIDE, podman.outside), (HOST_OUTSIDE, None), ("127.0.0.1", None))
    return [podman.ask(address, port, netns=where, protocol=protocol) for address, where in asked]


def test_the_whole_chain(podman: Podman) -> None:
    path = podman.conflist("chain", networks.CHAIN)
    cid = podman.start("a", "--network", "chain", "-p", "8080:80", "-p", "127.0.0.1:8081:80")
    podman.start("b", "--network", "chain")
    assert podman.verbs(cid) == networks.added()
    assert published(podman, 8080) == ["a"] * 3
    assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.netns("b")) == "a"
    assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.netns("a")) == "a", "its own port"
    assert podman.ask("127.0.0.1", 8081) == "a"
    assert podman.silent(HOST_OUTSIDE, 8081, netns=podman.outside)
    assert podman.netns("a").links()["eth0"]["mtu"] == 1400
    # With `same-bridge` only those of the same bridge come in without a published port.
    podman.start("c", "--network", "web")
    assert podman.ask(podman.address("a", "chain"), netns=podman.netns("b")) == "a"
    # A reload, and a port that is gone with its container.
    podman.podman("network", "reload", "a")
    assert published(podman, 8080) == ["a"] * 3
    remove(podman, "a")
    assert podman.silent("127.0.0.1", 8080)
    assert podman.silent(HOST_OUTSIDE, 8080, netns=podman.outside)
    remove(podman, "b", "c")
    assert podman.verbs(cid) == networks.added() + (networks.deleted() + networks.added()) + networks.deleted()
    path.unlink()


def test_somebody_flushes_nftables(podman: Podman) -> None:
    """`systemctl reload nftables`: what is published comes back by itself."""
    path = podman.conflist("chain", networks.CHAIN)
    podman.start("a", "--network", "chain", "-p", "8080:80")
    podman.host.run(["nft", "flush", "ruleset"])
    assert published(podman, 8080) == ["a"] * 3
    podman.netns("a").ping(OUTSIDE)
    remove(podman, "a")
    path.unlink()


# busybox has no server for UDP.
SAY = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("", 5353))
    while True:
        _, asker = server.recvfrom(4096)
        server.sendto(sys.argv[1].encode(), asker)
"""


def test_udp(podman: Podman) -> None:
    """The flows of the first are forgotten, so that the next holder of the port answers those who asked before."""
    path = podman.conflist("chain", networks.CHAIN)
    for name in ("a", "b"):
        podman.start(name, "--network", "chain", "-p", "5300:5353/udp")
        server = podman.netns(name).popen([sys.executable, "-I", "-S", "-c", SAY, name])
        for where, port in ((podman.outside, 4000), (None, 4001)):
            assert podman.ask(HOST_OUTSIDE, 5300, netns=where, protocol="udp", source=port) == name
        server.kill()
        server.wait()
        remove(podman, name)
    path.unlink()


def test_a_host_port_that_is_taken(podman: Podman) -> None:
    path = podman.conflist("chain", networks.CHAIN)
    cid = podman.start("a", "--network", "chain", "-p", "8080:80")
    second = ("run", "-d", "--network", "chain", "--cgroup-parent", cgroups.parent(), "-p", "8080:80", images.NAME)
    refused = podman.podman(*second, "sleep", "100", check=False)
    assert refused.returncode != 0
    assert "8080" in refused.stderr
    assert published(podman, 8080) == ["a"] * 3
    remove(podman, *podman.podman("ps", "-aq").stdout.split())
    assert cid not in str(podman.host.allocations())
    path.unlink()


def test_ports_of_a_container_in_two_networks(podman: Podman) -> None:
    """podman publishes them by each network, and conmon listens at them while a network comes back."""
    second = bridge("back0", isDefaultGateway=False, isGateway=True, ipam={"type": "ipamd", "subnet": "10.21.0.0/24"})
    paths = [podman.conflist("chain", networks.CHAIN), podman.conflist("second", [second, networks.PORTMAP])]
    podman.start("a", "--network", "chain,second", "-p", "8080:80")
    assert published(podman, 8080) == ["a"] * 3
    for verb in ("disconnect", "connect"):
        podman.podman("network", verb, "second", "a")
        assert published(podman, 8080) == ["a"] * 3
    podman.podman("network", "reload", "a")
    assert published(podman, 8080) == ["a"] * 3
    remove(podman, "a")
    podman.host.run(["ip", "address", "flush", "dev", "back0"])
    for path in paths:
        path.unlink()


def test_podmans_own_network(podman: Podman) -> None:
    """What `podman network create` writes, as it is: version 0.4.0, bridge, portmap, firewall, tuning, host-local."""
    podman.podman("network", "create", "made")
    written = json.loads(podman.host.path("/etc/cni/net.d/made.conflist").read_text(encoding="utf-8"))
    assert [plugin["type"] for plugin in written["plugins"]] == ["bridge", "portmap", "firewall", "tuning"]
    assert written["cniVersion"] == "0.4.0"
    cid = podman.start("a", "--network", "made", "-p", "8080:80", "--mac-address", "02:aa:bb:cc:dd:ef")
    podman.start("b", "--network", "made")
    assert podman.netns("a").links()["eth0"]["address"] == "02:aa:bb:cc:dd:ef"
    assert published(podman, 8080) == ["a"] * 3
    assert podman.ask(podman.address("a", "made"), netns=podman.netns("b")) == "a"
    assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.netns("b")) == "a"
    podman.netns("a").ping(OUTSIDE)
    podman.podman("network", "reload", "a")
    assert published(podman, 8080) == ["a"] * 3
    podman.podman("network", "disconnect", "made", "b")
    podman.podman("network", "connect", "made", "b", "--ip", "10.89.0.99")
    assert podman.ask("10.89.0.99", netns=podman.netns("a")) == "b"
    remove(podman, "a", "b")
    kinds = ["bridge", "portmap", "firewall", "tuning"]
    add, delete = [f"ADD {kind}" for kind in kinds], [f"DEL {kind}" for kind in reversed(kinds)]
    assert podman.verbs(cid) == add + delete + add + delete
    podman.podman("network", "rm", "made")  # and its bridge
    assert written["plugins"][0]["bridge"] not in podman.host.links()
    podman.delete_network("made")


def test_a_network_that_podman_made_with_ipamd_in_it(podman: Podman) -> None:
    """As docs/operations.md tells: only `ipam` of the file is changed."""
    podman.podman("network", "create", "--subnet", "10.90.0.0/24", "made")
    file = podman.host.path("/etc/cni/net.d/made.conflist")
    document = json.loads(file.read_text(encoding="utf-8"))
    document["plugins"][0]["ipam"]["type"] = "ipamd"
    file.write_text(json.dumps(document), encoding="utf-8")
    cid = podman.start("a", "--network", "made", "-p", "8080:80")
    assert published(podman, 8080) == ["a"] * 3
    address = podman.address("a", "made")
    assert f"{address}/24" in str(podman.host.allocations())
    podman.podman("network", "reload", "a")
    assert podman.address("a", "made") == address
    remove(podman, "a")
    assert cid not in str(podman.host.allocations())
    podman.podman("network", "rm", "made")


def test_debians_default_network(podman: Podman) -> None:
    """What `podman run` uses where no network is named: the file that the package brings."""
    brought = Path("/etc/cni/net.d/87-podman-bridge.conflist").read_text(encoding="utf-8")
    file = podman.host.path("/etc/cni/net.d/87-podman-bridge.conflist")
    file.write_text(brought, encoding="utf-8")
    document = json.loads(brought)
    cid = podman.start("a", "-p", "8080:80")
    assert published(podman, 8080) == ["a"] * 3
    assert podman.verbs(cid) == [f"ADD {plugin['type']}" for plugin in document["plugins"]]
    remove(podman, "a")
    file.unlink()
    podman.delete_network("podman", document["plugins"][0]["bridge"])


REFERENCE = "/usr/lib/cni"


def test_netloom_is_put_in_front_of_the_reference_plugins(podman: Podman) -> None:
    """With containers running: theirs go without a trace, new ones join them, and their port is free again."""
    podman.use_plugins(REFERENCE)
    podman.podman("network", "create", "made")
    a = podman.start("a", "--network", "made", "-p", "8080:80")
    podman.start("b", "--network", "made")
    assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.outside) == "a"
    assert podman.verbs() == []
    podman.use_plugins(CNI_BIN, REFERENCE)
    c = podman.start("c", "--network", "made", "-p", "8081:80")
    assert podman.ask(podman.address("b", "made"), netns=podman.netns("c")) == "b"
    assert published(podman, 8081) == ["c"] * 3
    assert podman.ask(HOST_OUTSIDE, 8080, netns=podman.outside) == "a"
    remove(podman, "a")
    assert podman.silent(HOST_OUTSIDE, 8080, netns=podman.outside)
    podman.start("d", "--network", "made", "-p", "8080:80")
    assert published(podman, 8080) == ["d"] * 3
    podman.podman("network", "reload", "b")
    assert podman.ask(podman.address("b", "made"), netns=podman.netns("c")) == "b"
    subnet = podman.address("b", "made").rpartition(".")[0]
    remove(podman, "b", "c", "d")
    left = [rule for rule in (json.dumps(one) for one in podman.host.nft()) if any(x in rule for x in (a, c, subnet))]
    assert left == []
    podman.podman("network", "rm", "made")
    podman.delete_network("made")
    podman.use_plugins(CNI_BIN)
    # The chains that all containers of the reference share stay, as they do with the reference itself.
    for table in ("nat", "filter"):
        podman.host.run(["nft", "delete", "table", "ip", table], check=False)
        podman.host.run(["nft", "delete", "table", "ip6", table], check=False)


def test_a_plugin_that_only_the_reference_has(podman: Podman) -> None:
    """podman looks into the directories one after the other."""
    podman.use_plugins(CNI_BIN, REFERENCE)
    mixed = bridge("mix0", ipam={"type": "ipamd", "subnet": "10.23.0.0/24"})
    path = podman.conflist("mixed", [mixed, {"type": "sbr"}, networks.PORTMAP])
    cid = podman.start("a", "--network", "mixed", "-p", "8080:80")
    assert published(podman, 8080) == ["a"] * 3
    assert "from" in podman.netns("a").run(["ip", "rule", "show", "table", "100"]).stdout
    remove(podman, "a")
    assert podman.verbs(cid) == ["ADD bridge", "ADD portmap", "DEL portmap", "DEL bridge"]
    path.unlink()
    podman.delete_network("mixed", "mix0")
    podman.use_plugins(CNI_BIN)


PLAIN: list[tuple[str, dict[str, Any], str]] = [
    ("host-local", bridge("hl0", ipam={"type": "host-local", "ranges": [[{"subnet": "10.30.0.0/24"}]]}), "0.4.0"),
    ("ptp", {"type": "ptp", "ipMasq": True, "ipam": {"type": "ipamd", "subnet": "10.31.0.0/24"}}, "1.0.0"),
    ("ptp-old", {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.32.0.0/24"}}, "0.3.1"),
    (
        "macvlan",
        {
            "type": "macvlan",
            "master": "outside",
            "ipam": {"type": "static", "addresses": [{"address": "192.0.2.77/24", "gateway": HOST_OUTSIDE}]},
        },
        "1.0.0",
    ),
]


@pytest.mark.parametrize(("name", "plugin", "version"), PLAIN, ids=[name for name, _, _ in PLAIN])
def test_other_plugins(podman: Podman, name: str, plugin: dict[str, Any], version: str) -> None:
    path = podman.conflist(name, [plugin, {"type": "loopback"}], version)
    cid = podman.start("a", "--network", name)
    address = podman.address("a", name)
    assert podman.ask(address, netns=podman.outside if plugin["type"] == "macvlan" else None) == "a"
    remove(podman, "a")
    kind = plugin["type"]
    assert podman.verbs(cid) == [f"ADD {kind}", "ADD loopback", "DEL loopback", f"DEL {kind}"]
    path.unlink()
    podman.delete_network(name, plugin.get("bridge", ""))


def test_no_worker_is_there(podman: Podman) -> None:
    """Then, and only then, the plugin's own process does it."""
    podman.end_service()
    try:
        podman.start("a", "--network", "web")
        podman.netns("a").ping("10.20.0.1")
        remove(podman, "a")
        done = [line for line in podman.service.cold() if "VERSION" not in line]
        assert done[0] == "bridge ADD"
        assert set(done[1:]) == {"bridge DEL"}
        assert podman.verbs() == []
    finally:
        podman.begin_service()


def test_ipamd_is_away(podman: Podman) -> None:
    """Removing works, and the address is free once ipamd is back."""
    cid = podman.start("a", "--network", "web")
    podman.ipamd.stop()
    try:
        refused = podman.podman(
            *("run", "-d", "--network", "web", "--cgroup-parent", cgroups.parent(), images.NAME, "sleep", "100"),
            check=False,
        )
        assert refused.returncode != 0
        assert "ipamd is not reachable" in refused.stderr
        remove(podman, *podman.podman("ps", "-aq").stdout.split())
    finally:
        podman.ipamd.start()
    wait_until(lambda: not [line for line in podman.host.allocations() if cid in line], "the release")


def test_an_upgrade_of_the_workers_between_two_containers(podman: Podman) -> None:
    podman.start("a", "--network", "web")
    podman.service.signal(signal.SIGHUP)
    podman.start("b", "--network", "web")
    assert podman.ask(podman.address("b", "web"), netns=podman.netns("a")) == "b"
    remove(podman, "a", "b")
