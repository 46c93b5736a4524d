"""containerd's CRI: pods as a kubelet asks for them, on hosts with cgroup version 1 and 2."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hosts import CNI_BIN, IPV6, HostError, wait_until
from tests.runtimes import cgroups, networks
from tests.runtimes.containerd import PAUSE, Containerd
from tests.runtimes.cri import CriError
from tests.runtimes.runtime_host import HOST_OUTSIDE, OUTSIDE

pytestmark = pytest.mark.kernel

PORTS = [{"protocol": "TCP", "container_port": 80, "host_port": 8080}]
# Says what it was asked, and refuses to attach.
FAILING = """#!/bin/sh
case $CNI_COMMAND in
ADD) echo '{"cniVersion": "1.0.0", "code": 123, "msg": "not on a Sunday", "details": "by design"}'; exit 1 ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}' ;;
esac
"""


def split(verbs: list[str]) -> tuple[list[str], list[str]]:
    """What loopback was asked, and all the rest in order. containerd attaches both networks at the same time."""
    lo = [one for one in verbs if one.endswith(" loopback")]
    return lo, [one for one in verbs if one not in lo]


@pytest.fixture(scope="module", params=["cgroup1", "cgroup2"])
def shared(request: pytest.FixtureRequest, launcher: Path) -> Iterator[Containerd]:
    version2 = request.param == "cgroup2"
    if not version2 and not cgroups.has_version1():
        pytest.skip("this machine mounts no cgroup version 1, only cgroup2")
    with Containerd(launcher, version2) as containerd:
        containerd.network("pods", networks.CHAIN)
        # Bridges, tables and directories, which stay.
        containerd.remove(containerd.pod("first", port_mappings=PORTS))
        containerd.settle()
        yield containerd


@pytest.fixture
def containerd(shared: Containerd) -> Iterator[Containerd]:
    """Nothing is left when a scenario is over, and nothing had to be removed for it."""
    shared.forget()
    yield shared
    pods = shared.cri.pods()
    shared.remove(*pods)
    try:
        shared.assert_clean()
    except HostError:
        shared.settle()  # what this one left is not the next one's fault
        raise
    assert pods == []
    assert shared.service.cold() == []


def test_a_pod_from_all_sides(containerd: Containerd) -> None:
    """Published on the host, limited, and gone without a trace; stop and remove, each twice."""
    limits = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    a = containerd.pod("a", port_mappings=PORTS, annotations=limits)
    b = containerd.pod("b")
    assert split(containerd.verbs(a)) == (["ADD loopback"], networks.added())
    address = containerd.address(a)
    # The CRI hands over what it was given with capital letters, and a burst that no bucket of the kernel holds.
    add = next(one for one in containerd.requests(a) if one.plugin == "portmap")
    assert add.runtime_config["portMappings"] == [
        {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}
    ]
    shaped = next(one for one in containerd.requests(a) if one.plugin == "bandwidth")
    assert shaped.runtime_config["bandwidth"]["IngressRate"] == 10_000_000
    assert add.args["K8S_POD_NAME"] == "a"

    assert containerd.ask(address) == "a"
    assert containerd.ask(address, netns=containerd.netns(b)) == "a"
    assert containerd.ask(containerd.address(b), netns=containerd.netns(a)) == "b"
    for gateway in networks.GATEWAYS:
        containerd.netns(a).ping(gateway)
    containerd.netns(a).ping(OUTSIDE)
    if IPV6:
        six = containerd.cri.status(a)["network"]["additional_ips"][0]["ip"]
        assert containerd.ask(six, netns=containerd.netns(b)) == "a"
    for target, where in (
        (HOST_OUTSIDE, containerd.outside),  # from elsewhere
        (HOST_OUTSIDE, None),  # from the host
        ("127.0.0.1", None),
        (HOST_OUTSIDE, containerd.netns(b)),  # from another pod
        (HOST_OUTSIDE, containerd.netns(a)),  # from itself
    ):
        assert containerd.ask(target, 8080, netns=where) == "a"
    port = shaped.result()["interfaces"][1]["name"]
    assert "rate 10Mbit" in containerd.host.run(["tc", "qdisc", "show", "dev", port]).stdout
    link = containerd.netns(a).links()["eth0"]
    assert link["mtu"] == 1400

    for _ in range(2):
        containerd.cri.stop_pod(a)
    assert containerd.silent(HOST_OUTSIDE, 8080, netns=containerd.outside)
    for _ in range(2):
        containerd.cri.remove_pod(a)
    containerd.remove(b)
    # Two StopPodSandbox, and RemovePodSandbox stops once more: then without a namespace, and without prevResult.
    deletes = [one for one in containerd.requests(a) if one.verb == "DEL"]
    assert split([f"DEL {one.plugin}" for one in deletes]) == (["DEL loopback"] * 3, networks.deleted() * 3)
    assert {one.status for one in deletes} == {0}
    assert {bool(one.netns) for one in deletes} == {True, False}
    assert not deletes[-1].netns
    assert "prevResult" not in deletes[-1].conf


def test_a_container_in_a_pod(containerd: Containerd) -> None:
    """Containers share what the pod has."""
    pod = containerd.pod("a", port_mappings=PORTS)
    config = {"metadata": {"name": "work"}, "image": {"image": PAUSE}, "command": ["sleep", "1000"], "linux": {}}
    request = {"pod_sandbox_id": pod, "config": config, "sandbox_config": containerd.config("a")}
    container = containerd.cri.call("CreateContainer", request)["container_id"]
    containerd.cri.call("StartContainer", {"container_id": container})
    done = containerd.cri.call("ExecSync", {"container_id": container, "cmd": ["ip", "-o", "-4", "addr"]})
    assert f"{containerd.address(pod)}/16" in base64.b64decode(done["stdout"]).decode()
    containerd.remove(pod)
    assert containerd.verbs(container) == []


@pytest.mark.parametrize("place", [1, 4], ids=["in the middle", "at the end"])
def test_a_plugin_refuses(containerd: Containerd, place: int) -> None:
    """containerd answers with a DEL of all, also of those that never attached anything; nothing is left."""
    failing = containerd.host.path(f"{CNI_BIN}/failing")
    failing.write_text(FAILING, encoding="ascii")
    failing.chmod(0o755)
    plugins = list(networks.CHAIN)
    plugins.insert(place, {"type": "failing"})
    containerd.network("pods", plugins)
    try:
        with pytest.raises(CriError, match=r'plugin type="failing".*not on a Sunday'):
            containerd.pod("a", port_mappings=PORTS)
        lo, asked = split(containerd.verbs())
        assert lo[0] == "ADD loopback"
        assert asked[:place] == networks.added()[:place]
        assert asked[place:][: len(networks.TYPES)] == networks.deleted()
        assert set(asked[place:]) == set(networks.deleted())
        assert {one.status for one in containerd.requests()} == {0}
    finally:
        containerd.network("pods", networks.CHAIN)
        failing.unlink()


def test_a_host_port_that_is_taken(containerd: Containerd) -> None:
    """The second is refused with the first one's name, which keeps the port."""
    a = containerd.pod("a", port_mappings=PORTS)
    with pytest.raises(CriError, match=a[:12]):
        containerd.pod("b", port_mappings=PORTS)
    assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a"
    containerd.remove(a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_containerd_is_started_anew_under_live_pods(containerd: Containerd, number: signal.Signals) -> None:
    a = containerd.pod("a", port_mappings=PORTS)
    b = containerd.pod("b")
    address = containerd.address(a)
    containerd.end(number)
    assert containerd.ask(address, netns=containerd.netns(b)) == "a"
    assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a"
    containerd.begin()
    assert sorted(containerd.cri.pods()) == sorted([a, b])
    assert containerd.address(a) == address
    assert containerd.ask(address, netns=containerd.netns(b)) == "a"
    c = containerd.pod("c")
    assert containerd.ask(address, netns=containerd.netns(c)) == "a"
    containerd.remove(a, b, c)


def test_a_pod_is_killed(containerd: Containerd) -> None:
    """Whoever kills it; the kubelet stops and removes it then. Its namespace is gone before, too, the second time."""
    for vanished in (False, True):
        pod = containerd.pod("a", port_mappings=PORTS)
        pid = containerd.pid(pod)
        netns = containerd.netns(pod)
        containerd.kill(pid)
        wait_until(lambda: containerd.state(pod) == "SANDBOX_NOTREADY", "containerd to see it")  # noqa: B023
        if vanished:
            containerd.host.run(["umount", netns.path])
            containerd.host.run(["rm", netns.path])
        containerd.remove(pod)
        containerd.assert_clean()


def test_many_at_once(containerd: Containerd) -> None:
    names = [f"m{number}" for number in range(8)]
    ports = [[{"protocol": "TCP", "container_port": 80, "host_port": 9000 + number}] for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        pods = list(pool.map(lambda name, port: containerd.pod(name, port_mappings=port), names, ports))
        answers = list(pool.map(lambda number: containerd.ask("127.0.0.1", 9000 + number), range(8)))
        assert answers == names
        list(pool.map(containerd.remove, pods))


def test_an_old_network(containerd: Containerd) -> None:
    """As flannel's and kind's files have it: an old version of the specification, host-local, no firewall."""
    old = [
        {**networks.bridge("old0"), "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.40.0.0/24"}]]}},
        networks.PORTMAP,
    ]
    containerd.network("old", old, "0.3.1")
    try:
        pod = containerd.pod("a", port_mappings=PORTS)
        assert containerd.ask("127.0.0.1", 8080) == "a"
        assert containerd.address(pod).startswith("10.40.0.")
        containerd.remove(pod)
    finally:
        containerd.network("pods", networks.CHAIN)
    containerd.delete_network("old", "old0")


def test_no_worker_is_there(containerd: Containerd) -> None:
    """Then, and only then, each plugin's own process does it."""
    containerd.end_service()
    try:
        pod = containerd.pod("a", port_mappings=PORTS)
        assert containerd.ask(HOST_OUTSIDE, 8080, netns=containerd.outside) == "a"
        containerd.remove(pod)
        done = [line.split() for line in containerd.service.cold() if "VERSION" not in line]
        lo, asked = split([f"{verb} {plugin}" for plugin, verb in done])
        assert lo == ["ADD loopback", "DEL loopback", "DEL loopback"]
        assert asked == networks.added() + networks.deleted() * 2
        assert containerd.verbs() == []
    finally:
        containerd.begin_service()
