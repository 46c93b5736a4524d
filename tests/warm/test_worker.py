"""A warm worker serves as a cold process would, refuses who is elsewhere, and is the same after each request."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni import wire
from kernel import deleter
from tests.hosts import Host, wait_until
from tests.warm.service import COLD, SOCKET, Service, bridge

pytestmark = pytest.mark.kernel

NO_ADDRESS = {"ipam": {}, "isDefaultGateway": False, "ipMasq": False}


@pytest.fixture
def service(host: Host, launcher: Path) -> Iterator[Service]:
    host.start_ipamd(pools={"cooldown_s": 0})
    one = Service(host, launcher, ["--workers", "2", "--max-workers", "8"])
    one.start()
    yield one
    assert one.stop() == 0


def foreign(host: Host, name: str, script: str) -> dict[str, object]:
    """A network whose IPAM plugin is this shell script; it is found by /run/foreign in CNI_PATH."""
    directory = host.path("/run/foreign")
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    (directory / name).chmod(0o755)
    return bridge(ipam={"type": name}, isDefaultGateway=False)


RESULT = """echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.7.0.5/24"}]}'"""


def test_all_verbs_are_served_warm_and_leave_nothing(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    service.add(c1).ok()
    service.delete(c1).ok()
    before = host.snapshot()
    result = service.add(c1).result()
    host.ping(result["ips"][0]["address"].split("/")[0])
    service.call("CHECK", bridge(prevResult=result), netns=c1).ok()
    status = {**bridge(), "cniVersion": "1.1.0"}
    service.call("STATUS", status).ok()
    service.call("GC", {**status, "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}).ok()
    service.call("VERSION", {}).ok()
    service.delete(c1).ok()
    assert service.cold() == []
    host.assert_clean(before)


def test_errors_arrive_as_they_are_from_a_cold_process(service: Service) -> None:
    c1 = service.host.netns("c1")
    for conf in (b"{", b"[]", json.dumps(bridge(mtu="x")).encode(), json.dumps(bridge(vlan=7)).encode()):
        warm = service.call("ADD", conf, netns=c1)
        cold = service.call("ADD", conf, netns=c1, env={"NETLOOM_CNI_SOCKET": "/nonexistent"})
        assert (warm.status, warm.json) == (cold.status, cold.json)
    assert len(service.cold()) == 4


def test_a_delegate_sees_the_process_that_the_launcher_is(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    tell = "pwd; umask; grep -E 'Sig(Blk|Ign)' /proc/self/status; env | sort"
    script = f"{{ {tell}; }} > /run/seen.$WAY; echo said >&2; {RESULT}"
    conf = foreign(host, "telling", script)
    there = host.path("/run/there")
    there.mkdir()
    seen = {}
    for way, env in (("warm", {}), ("cold", {"NETLOOM_CNI_SOCKET": "/nonexistent"})):
        environment = {"NETLOOM_CNI_COLD": COLD, "WAY": way, "ODD": "\udcfe", "PATH": os.environ["PATH"], **env}
        environment |= {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": c1.path, "CNI_IFNAME": "eth0"}
        # Without LC_ALL a Python that starts would set LC_CTYPE (PEP 538), and the cold way's delegate would see it.
        environment |= {"CNI_PATH": "/run/foreign", "LC_ALL": "C.UTF-8"}
        shell = ["sh", "-c", "umask 0027; exec /opt/cni/bin/bridge"]
        done = host.run(shell, input=json.dumps(conf), env=environment, cwd="/run/there")
        assert done.stderr == "said\n"
        lines = host.path(f"/run/seen.{way}").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        assert lines[:2] == ["/run/there", "0027"]
        # The lower 31; those above belong to the C library, and whoever started the tests may have them ignored.
        assert [int(line.split()[1], 16) & 0x7FFFFFFF for line in lines[2:4]] == [0, 0]
        seen[way] = [line for line in lines if not line.startswith(("WAY=", "NETLOOM_CNI_SOCKET=", "_=", "Sig"))]
        service.call("DEL", conf, netns=c1, path="/run/foreign", env={"WAY": "del"}).ok()
    assert seen["warm"] == seen["cold"]
    for pid in service.workers():
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert "Umask:\t0022" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")


@pytest.mark.parametrize(
    "elsewhere",
    [
        ["unshare", "--net"],
        ["unshare", "--mount"],
        ["unshare", "--user", "--map-root-user"],
        ["chroot", "/run/root"],
    ],
    ids=" ".join,
)
def test_a_launcher_elsewhere_is_not_served(service: Service, elsewhere: list[str]) -> None:
    host = service.host
    if elsewhere[0] == "chroot":
        # With everything under it that is under the real one.
        script = (
            'for one in /*; do new=/run/root$one; if [ -L "$one" ]; then cp -d "$one" "$new"; elif [ -d "$one" ]; '
            'then mkdir -p "$new" && mount --rbind "$one" "$new"; fi; done'
        )
        host.path("/run/root").mkdir()
        host.run(["sh", "-c", script])
    env = {"CNI_COMMAND": "VERSION", "NETLOOM_CNI_COLD": COLD, "PATH": os.environ["PATH"]}
    done = host.run([*elsewhere, "/opt/cni/bin/bridge"], env=env, cwd="/")
    assert "supportedVersions" in done.stdout
    assert service.cold() == ["bridge VERSION"]


def test_a_user_who_is_not_root_is_not_served(service: Service) -> None:
    host = service.host
    host.path("/run/cold.log").touch()
    host.path("/run/cold.log").chmod(0o666)
    env = {"CNI_COMMAND": "VERSION", "NETLOOM_CNI_COLD": COLD, "PATH": os.environ["PATH"]}
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/opt/cni/bin/bridge"]
    assert host.path(SOCKET).stat().st_mode & 0o777 == 0o600
    host.run(nobody, env=env, check=False, cwd="/")
    host.path(SOCKET).chmod(0o666)
    host.run(nobody, env=env, check=False, cwd="/")
    assert service.cold() == ["bridge VERSION"] * 2


def test_a_netns_that_only_the_launcher_has_goes_cold(service: Service) -> None:
    c1 = service.host.netns("c1")
    command = f'exec 9< {c1.path}; exec /opt/cni/bin/bridge < "$CONF"'
    service.host.path("/run/conf").write_text(json.dumps(bridge()), encoding="utf-8")
    env = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/proc/self/fd/9",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CONF": "/run/conf",
        "NETLOOM_CNI_COLD": COLD,
        "PATH": os.environ["PATH"],
    }
    service.host.run(["bash", "-c", command], env=env)
    assert service.cold() == ["bridge ADD"]
    assert c1.addresses()["eth0"]
    service.delete(c1).ok()


def places(pid: int) -> bytes:
    """As a launcher beside this worker would tell them."""
    paths = [f"/proc/{pid}/ns/{kind}" for kind in ("net", "mnt", "user")] + [f"/proc/{pid}/root/"]
    return b"".join(
        number.to_bytes(8, "little") for path in paths for number in (os.stat(path).st_dev, os.stat(path).st_ino)
    )


def version_request(service: Service, **fields: bytes) -> bytes:
    wanted = {
        wire.TAG_PROGRAM: b"bridge",
        wire.TAG_ENVIRONMENT: b"CNI_COMMAND=VERSION\0",
        wire.TAG_UMASK: wire.u32(0o22),
        wire.TAG_PLACES: places(service.workers()[0]),
        wire.TAG_DESCRIPTORS: wire.u32(wire.DESCRIPTOR_CWD),
    }
    return wire.frame(wire.KIND_REQUEST, {**wanted, **{int(tag[1:]): value for tag, value in fields.items()}}.items())


def dial(service: Service) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(60)
    directory = os.open(service.host.path(SOCKET).parent, os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{directory}/cni.sock")
    finally:
        os.close(directory)
    return connection


def kinds(connection: socket.socket) -> list[int]:
    """What a worker said until it closed the connection."""
    data = b""
    try:
        while more := connection.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    found = []
    while data:
        head = wire.header(data)
        found.append(head.kind)
        data = data[wire.HEADER_SIZE + head.length :]
    return found


def test_a_request_in_pieces_is_served(service: Service) -> None:
    request = version_request(service)
    with dial(service) as connection:
        cwd = os.open("/", os.O_PATH)
        socket.send_fds(connection, [request[:5]], [cwd])
        os.close(cwd)
        for piece in (request[5:20], request[20:90], request[90:]):
            time.sleep(0.02)
            connection.sendall(piece)
        answer = b""
        while answer.count(b"supportedVersions") == 0:
            answer += connection.recv(65536)
        assert wire.header(answer).kind == wire.KIND_ACCEPTED
        connection.sendall(wire.frame(wire.KIND_DONE))


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 5000,
        wire.frame(wire.KIND_DONE),
        wire.frame(wire.KIND_REQUEST),
        wire.frame(wire.KIND_REQUEST, [(wire.TAG_PLACES, b"short")]),
        wire.frame(wire.KIND_REQUEST, [(77, b"x")], required=True),
        wire.frame(wire.KIND_REQUEST)[:-4] + b"\xff\xff\xff\xff",
    ],
)
def test_garbage_from_root_is_refused_and_harms_nobody(service: Service, garbage: bytes) -> None:
    workers = set(service.workers())
    with dial(service) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        assert kinds(connection) == [wire.KIND_REFUSED]
    service.call("VERSION", {}).ok()
    assert service.cold() == []
    assert workers <= set(service.workers())


def test_requests_that_lie_are_refused(service: Service) -> None:
    requests = [
        version_request(service),  # announces a descriptor that does not come
        version_request(service, _1=b"no-such-plugin"),
        version_request(service, _5=b"\1" * 64),
        version_request(service, _6=wire.u32(0)),
    ]
    for request in requests:
        with dial(service) as connection:
            connection.sendall(request)
            assert kinds(connection) == [wire.KIND_REFUSED]


def test_descriptors_that_nobody_asked_for_are_closed(service: Service) -> None:
    def count() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in service.workers()]

    wait_until(lambda: len(count()) == 2 and len(set(count())) == 1, "both workers to have opened what they keep")
    before = count()
    for _ in range(20):
        with dial(service) as connection:
            many = [os.open("/", os.O_PATH) for _ in range(12)]
            socket.send_fds(connection, [b"x" * 100], many)
            for fd in many:
                os.close(fd)
            connection.shutdown(socket.SHUT_WR)
            assert kinds(connection) == [wire.KIND_REFUSED]
    service.call("VERSION", {}).ok()
    # 240 came in all. A worker may have connected to ipamd meanwhile, which is some of its own.
    assert sum(count()) < sum(before) + 24


def test_who_connects_and_says_nothing_holds_a_worker_for_a_moment_only(service: Service) -> None:
    with dial(service) as one, dial(service) as two, dial(service) as three:
        for _ in range(3):
            service.call("VERSION", {}).ok()
        assert service.cold() == []
        for connection in (one, two, three):
            assert kinds(connection) == [wire.KIND_REFUSED]


def test_ipamd_may_restart_between_two_requests(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    for _ in range(3):
        service.add(c1).ok()
        assert host._ipamd is not None
        host._ipamd.restart()
        service.delete(c1).ok()
    assert host.allocations() == []
    assert service.cold() == []


def test_ipamd_is_away(service: Service) -> None:
    host = service.host
    c1, c2 = host.netns("c1"), host.netns("c2")
    service.add(c1).ok()
    assert host._ipamd is not None
    host._ipamd.stop()
    assert service.add(c2, "c2").code() == 11
    assert service.call("STATUS", {**bridge(), "cniVersion": "1.1.0"}).code() == 50
    service.delete(c1).ok()
    assert c1.links().keys() == {"lo"}
    host._ipamd.start()
    wait_until(lambda: host.allocations() == [], "the release record to be replayed")
    service.add(c2, "c2").ok()
    service.delete(c2, "c2").ok()
    assert service.cold() == []


def test_hanging_plugins_of_others_do_not_stop_the_rest(service: Service) -> None:
    host = service.host
    conf = foreign(host, "hanging", f"while [ -e /run/hang ]; do sleep 0.05; done; {RESULT}")
    host.path("/run/hang").touch()
    c1, other = host.netns("c1"), host.netns("other")
    env = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "h",
        "CNI_NETNS": c1.path,
        "CNI_PATH": "/run/foreign",
        "NETLOOM_CNI_COLD": COLD,
        "NETLOOM_CNI_WAIT_MS": "30000",
        "PATH": os.environ["PATH"],
    }
    script = f"echo {shlex.quote(json.dumps(conf))} | /opt/cni/bin/bridge"
    hanging = [host.popen(["sh", "-c", script], env={**env, "CNI_IFNAME": f"eth{i}"}) for i in range(4)]
    wait_until(lambda: len(service.workers()) > 2, "another worker")
    for _ in range(4):
        service.add(other).ok()
        service.delete(other).ok()
    assert all(process.poll() is None for process in hanging)
    host.path("/run/hang").unlink()
    for process in hanging:
        process.wait(60)
    assert service.cold() == []


def test_growth_over_many_requests(service: Service) -> None:
    host = service.host
    c1 = host.netns("c1")
    conf = json.dumps(bridge())
    loop = f"""
export CNI_CONTAINERID=c1 CNI_NETNS={c1.path} CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin
export NETLOOM_CNI_COLD={COLD} NETLOOM_CNI_WAIT_MS=30000
i=0
while [ $i -lt $1 ]; do
    for verb in ADD DEL; do echo {shlex.quote(conf)} | CNI_COMMAND=$verb /opt/cni/bin/bridge > /run/out || break 2; done
    i=$((i + 1))
done
[ $i -eq $1 ] || cat /run/out >&2
[ $i -eq $1 ]
"""

    def serve(count: int) -> dict[int, tuple[int, int, int]]:
        host.run(["sh", "-c", loop, "sh", str(count)])
        return {pid: measure(pid) for pid in service.workers()}

    before = serve(100)
    snapshot = host.snapshot()
    after = serve(250)
    assert before.keys() == after.keys()
    for pid, (descriptors, threads, memory_kb) in after.items():
        # A deletion may find the threads waiting that were enough before.
        assert descriptors <= before[pid][0] + deleter.MOST
        assert threads <= before[pid][1] + deleter.MOST
        assert memory_kb - before[pid][2] < 512, "a leak of some KiB for each pair of requests would be seen here"
    assert service.cold() == []
    host.assert_clean(snapshot)


def measure(pid: int) -> tuple[int, int, int]:
    """Open descriptors, threads, and KiB of private memory of a process."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), private


def test_a_request_beyond_its_deadline_is_interrupted(host: Host, launcher: Path) -> None:
    service = Service(host, launcher, ["--workers", "1", "--deadline", "1"])
    service.start()
    (worker,) = service.workers()
    c1 = host.netns("c1")
    conf = foreign(host, "sleeping", "exec sleep 600")
    before = host.snapshot()
    call = service.call("ADD", conf, netns=c1, path="/run/foreign")
    assert call.code() == 11
    assert "1 s" in call.json["msg"]
    wait_until(lambda: worker not in service.workers(), "the end of the worker that was interrupted")
    service.call("VERSION", {}).ok()
    assert service.cold() == []
    host.assert_clean(before)
    assert not [line for line in host.processes().values() if "sleep 600" in line]
    assert service.stop() == 0
