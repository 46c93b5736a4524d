"""The API, over a real socket to a real process."""

import contextlib
import json
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from tests.ipamd.daemon import Daemon, cidrs, key, now, own, spec, wait_for

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("ipamd"), "[reclaim]\ngrace_s = 0.001\ninterval_s = 0\n") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client("0123456789abcdef") as made:
        yield made


@pytest.fixture
def network(request: pytest.FixtureRequest) -> str:
    """A network of this test's own."""
    return f"net-{abs(hash(request.node.nodeid)) % 10**9}"


def refusal(code: Code, call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(IpamError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.code is code, caught.value
    return caught.value.message


def test_allocate_check_release(client: Client, network: str) -> None:
    pool = own("10.1.0.0/16", "fd00::/64")
    first = client.allocate(key("a", network), network_pool=pool, at=now(), netns=pb.Netns(inode=5, path="/x"))
    assert first.created
    assert cidrs(first) == ["10.1.0.2/16", "fd00::2/64"]
    again = client.allocate(key("a", network), network_pool=pool)
    assert not again.created
    assert (again.generation, cidrs(again)) == (first.generation, cidrs(first))
    assert client.check(key("a", network), cidrs(first)).generation == first.generation
    assert "not 10.1.0.3/16" in refusal(Code.FAILED_PRECONDITION, client.check, key("a", network), ["10.1.0.3/16"])
    assert not client.release(key("a", network), generation=first.generation + 1).released
    released = client.release(key("a", network), generation=first.generation)
    assert [address.cidr for address in released.released] == cidrs(first)
    assert not client.release(key("a", network)).released
    refusal(Code.NOT_FOUND, client.check, key("a", network), cidrs(first))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.AllocateRequest(), "key: client, network, container_id, ifname: wanted a name, found nothing"),
        (pb.AllocateRequest(key=key("a\nb"), pools=["p"]), "printable"),
        (pb.AllocateRequest(key=key("a" * 300), pools=["p"]), "at most 255"),
        (pb.AllocateRequest(key=key("a")), "found neither"),
        (pb.AllocateRequest(key=key("a"), pools=["p"], network_pool=own("10.0.0.0/24")), "found both"),
        (pb.AllocateRequest(key=key("a"), pools=["p", "p"]), "once"),
        (pb.AllocateRequest(key=key("a"), network_pool=own()), "at least one range set"),
        (pb.AllocateRequest(key=key("a"), network_pool=own("10.0.0.5/24")), "write 10.0.0.0/24"),
        (pb.AllocateRequest(key=key("a"), network_pool=own("10.0.0.0/33")), "wanted a CIDR"),
        (pb.AllocateRequest(key=key("a"), network_pool=own("10.0.0.0/24", "10.0.0.128/25")), "overlap"),
        (pb.AllocateRequest(key=key("a"), pools=["p"], at=pb.Instant(boottime_ns=1 << 63)), "below 2^63"),
        (pb.AllocateRequest(key=key("a"), pools=["p"], netns=pb.Netns(path="x" * 5000)), "netns.path"),
    ],
)
def test_what_can_never_work(client: Client, message: pb.AllocateRequest, text: str) -> None:
    assert text in refusal(Code.INVALID_ARGUMENT, client._call, "Allocate", message, pb.AllocateResponse)


def test_pools(client: Client) -> None:
    made = client.create_pool("front", spec("10.2.0.0/29", excludes=["10.2.0.5"], cooldown_ms=5))
    assert made.spec.cooldown_ms == 5
    assert client.get_pool("front") == made
    usage = made.usage[0]
    assert (usage.family, usage.size, usage.free) == ("ipv4", "4", "4")
    assert "front" in [pool.name for pool in client.list_pools()]
    assert client.create_pool("front", made.spec) == made
    refusal(Code.ALREADY_EXISTS, client.create_pool, "front", spec("10.3.0.0/24"))
    for name in ("", "net/x", "a b", "x" * 64):
        assert "name: wanted" in refusal(Code.INVALID_ARGUMENT, client.create_pool, name, made.spec)
    client.allocate(key("p1", "pools"), pools=["front"])
    assert "p1/eth0" in refusal(Code.FAILED_PRECONDITION, client.delete_pool, "front")
    client.release(key("p1", "pools"))
    client.delete_pool("front")
    refusal(Code.NOT_FOUND, client.get_pool, "front")
    refusal(Code.NOT_FOUND, client.delete_pool, "front")
    assert "netloom pool create" in refusal(Code.NOT_FOUND, client.allocate, key("p2"), pools=["front"])


def test_exhaustion_cooling_and_status(client: Client, network: str) -> None:
    pool = own("10.4.0.0/30")
    assert client.status(network=network, network_pool=pool).node == "host"
    client.allocate(key("a", network), network_pool=pool)
    for call in (
        lambda: client.allocate(key("b", network), network_pool=pool),
        lambda: client.status(network=network, network_pool=pool),
    ):
        assert "no free address" in refusal(Code.RESOURCE_EXHAUSTED, call)
    client.release(key("a", network))
    for call in (
        lambda: client.allocate(key("b", network), network_pool=pool),
        lambda: client.status(network=network, network_pool=pool),
    ):
        assert "cooling down" in refusal(Code.UNAVAILABLE, call)
    usage = client.get_pool(f"net/{network}").usage[0]
    assert (usage.allocated, usage.cooling, usage.free) == (0, 1, "0")
    refusal(Code.NOT_FOUND, client.status, pools=["absent"])
    assert client.status().store == "sqlite"


def test_reservations(client: Client) -> None:
    client.create_pool("res", spec("10.5.0.0/24"))
    assert client.reserve("res", "10.5.0.2", "printer") == pb.Reservation(
        pool="res", address="10.5.0.2", note="printer"
    )
    assert [r.address for r in client.list_reservations("res")] == ["10.5.0.2"]
    assert cidrs(client.allocate(key("r"), pools=["res"])) == ["10.5.0.3/24"]
    assert "printer" in refusal(Code.ALREADY_EXISTS, client.reserve, "res", "10.5.0.2")
    client.unreserve("res", "10.5.0.2")
    refusal(Code.NOT_FOUND, client.unreserve, "res", "10.5.0.2")
    assert client.list_reservations("res") == []
    client.release(key("r"))


def test_list_is_streamed_and_filtered(client: Client, network: str) -> None:
    pool = own("10.6.0.0/16")
    for number in range(1200):  # more than two pages
        client.allocate(key(f"c{number}", network), network_pool=pool, netns=pb.Netns(inode=number + 1, cookie=7))
    found = list(client.list_allocations(pb.ListAllocationsRequest(network=network)))
    assert [a.key.container_id for a in found] == [f"c{n}" for n in range(1200)]
    one = found[7]
    assert (one.key.node, one.key.client, one.netns.inode, one.netns.cookie) == ("host", "cni", 8, 7)
    assert one.at.boot_id == now().boot_id
    assert list(client.list_allocations(pb.ListAllocationsRequest(address="10.6.0.9", network=network))) == [one]
    assert list(client.list_allocations(pb.ListAllocationsRequest(container_id="c7", pool=f"net/{network}"))) == [one]
    assert list(client.list_allocations(pb.ListAllocationsRequest(client="docker"))) == []
    with pytest.raises(IpamError) as caught:
        list(client.list_allocations(pb.ListAllocationsRequest(address="nonsense")))
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_garbage_collection(client: Client, network: str) -> None:
    pool = own("10.7.0.0/24")
    held = {name: client.allocate(key(name, network), network_pool=pool) for name in ("a", "b", "c")}
    client.allocate(key("x", f"{network}-other"), network_pool=own("10.8.0.0/24"))
    before = now()
    client.allocate(key("young", network), network_pool=pool)
    request = pb.GarbageCollectRequest(
        client="cni",
        network=network,
        before=before,
        valid=[pb.Attachment(container_id="a", ifname="eth0"), pb.Attachment(container_id="b", ifname="eth1")],
        living=[held["c"].generation],
        dry_run=True,
    )
    for _ in range(2):
        answer = client.garbage_collect(request)
        assert [a.key.container_id for a in answer.released] == ["b"]
        assert [a.key.container_id for a in answer.living] == ["c"]
    request.dry_run = False
    assert [a.reason for a in client.garbage_collect(request).released] == ["not among the valid attachments"]
    assert not client.garbage_collect(request).released
    left = [a.key.container_id for a in client.list_allocations(pb.ListAllocationsRequest(network=network))]
    assert left == ["a", "c", "young"]
    assert len(list(client.list_allocations(pb.ListAllocationsRequest(network=f"{network}-other")))) == 1
    without_before = pb.GarbageCollectRequest(client="cni", network=network)
    assert "before" in refusal(Code.INVALID_ARGUMENT, client.garbage_collect, without_before)
    elsewhen = pb.GarbageCollectRequest(client="cni", network=network, before=pb.Instant(boot_id="x", boottime_ns=1))
    assert "of boot x" in refusal(Code.INVALID_ARGUMENT, client.garbage_collect, elsewhen)


def test_liveness(client: Client, network: str) -> None:
    pool = own("10.9.0.0/24")
    client.allocate(key("dead", network), network_pool=pool, netns=pb.Netns(inode=101, cookie=1))
    client.allocate(key("alive", network), network_pool=pool, netns=pb.Netns(inode=102, cookie=2))
    live = [pb.LiveNetns(inode=101, cookie=9), pb.LiveNetns(inode=102, cookie=2)]

    def names(found: object) -> list[str]:
        return [a.key.container_id for a in found if a.key.network == network]  # type: ignore[attr-defined]

    first = client.report_liveness(now(), live)
    assert (names(first.released), names(first.suspected)) == ([], ["dead"])
    time.sleep(0.01)
    trial = client.report_liveness(now(), live, dry_run=True)
    assert names(trial.released) == ["dead"]
    second = client.report_liveness(now(), live)
    assert names(second.released) == ["dead"]
    assert names(client.list_allocations()) == ["alive"]
    assert "host's own" in refusal(Code.INVALID_ARGUMENT, client.report_liveness, now(), [])


def test_request_ids_and_reasons_are_logged(daemon: Daemon, client: Client, network: str) -> None:
    client.allocate(key("a", network), network_pool=own("10.10.0.0/24"))
    client.release(key("a", network))

    def lines() -> list[dict[str, object]]:
        found = [json.loads(line) for line in daemon.log.read_text().splitlines() if network in line]
        return [line for line in found if line.get("request_id") == "0123456789abcdef"]

    wait_for("both lines", lambda: len(lines()) == 2)
    allocated, released = lines()
    assert allocated["msg"] == "allocated"
    assert released["msg"] == "released"
    assert released["fields"]["reason"] == "request"  # type: ignore[index]
    assert released["fields"]["addresses"] == "10.10.0.2/24"  # type: ignore[index]


def test_health_and_reflection(daemon: Daemon) -> None:
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "netloom.ipam.v1.Ipam"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = list(stub.ServerReflectionInfo(asked, timeout=60))
        names = {service.name for service in answer.list_services_response.service}
        assert {"netloom.ipam.v1.Ipam", "grpc.health.v1.Health"} <= names


def test_rights_of_the_socket(daemon: Daemon) -> None:
    status = os.stat(daemon.socket)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert os.listdir(os.path.dirname(daemon.socket)) != []
    assert not [name for name in os.listdir(os.path.dirname(daemon.socket)) if name.startswith(".ipamd")]


def test_metrics_and_health_pages(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        daemon.stop()
        text = daemon.config.read_text().replace('node = "host"', 'node = "host"\nhttp_listen = "127.0.0.1:0"')
        daemon.config.write_text(text)
        daemon.start()
        address = _listening_port(daemon)
        with daemon.client() as client:
            client.allocate(key("a"), network_pool=own("10.1.0.0/24"))
            page = ""

            def sampled() -> bool:
                nonlocal page
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
                    page = answer.read().decode()
                return 'netloom_ipamd_pool_allocated{family="ipv4",pool="net/n"} 1.0' in page

            wait_for("the pool's gauge", sampled)
        assert 'netloom_ipamd_allocations_total{result="created"} 1.0' in page
        assert 'netloom_ipamd_request_seconds_count{code="OK",method="Allocate"} 1.0' in page
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=60) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{address}/secret", timeout=60)


def _listening_port(daemon: Daemon) -> str:
    """The kernel chose the port; the process' only TCP socket tells it."""
    assert daemon.process is not None
    inodes = set()
    for fd in os.listdir(f"/proc/{daemon.process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(f"/proc/{daemon.process.pid}/fd/{fd}"))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[9]}]" in inodes and fields[3] == "0A":
            return f"127.0.0.1:{int(fields[1].split(':')[1], 16)}"
    raise AssertionError("it does not listen")
