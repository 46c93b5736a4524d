"""What Docker's authorization plugin lets pass, and what not; Docker and ipamd are played.

What the real Docker makes of it: tests/docker/test_overlay_three.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from ipamd.client import IpamError
from libnetwork import docker
from libnetwork import http as shim
from libnetwork.authorization import Authorization, asked_of, removal
from libnetwork.errors import DriverError
from libnetwork.messages import Asked
from libnetwork.options import NetworkOptions
from libnetwork.state import Network, State
from libnetwork.sticky import Flights
from protos.ipam.v1 import ipam_pb2 as pb
from tests.libnetwork.test_http import ask, serving
from tests.libnetwork.test_sharing import Host, Ipamd

REFUSED = "; stop these containers, or disconnect them (docker network disconnect ov1 CONTAINER)"


def body(uri: str, method: str = "DELETE", **more: Any) -> bytes:
    return json.dumps({"RequestMethod": method, "RequestUri": uri, "User": "", **more}).encode()


def test_which_request_removes_a_network() -> None:
    for uri, name in {
        "/v1.41/networks/ov1": "ov1",
        "/networks/ov1": "ov1",
        "/v1.41/networks/ov1?force=1#there": "ov1",
        "/v1.41/networks/my%20net%2F%C3%A4": "my net/ä",
        "/v1.41/%6eetworks/ov1": "ov1",
        "http://docker/v1.24/networks/ov1": "ov1",
        "/v1.41/networks/prune": "prune",
        "/v1.41/networks/": "",
        "/v1.41/networks": "",
        "/v1.41/containers/networks": "",
        "/v1.41/volumes/networks/ov1": "",
        "/networks/%ff": "",
        "": "",
    }.items():
        assert removal(asked_of(body(uri))) == name, uri
    for method, uri in (("GET", "/networks/ov1"), ("POST", "/v1.41/networks/prune"), ("POST", "/networks/ov1/connect")):
        assert removal(asked_of(body(uri, method))) == ""
    for malformed in (b"", b"{", b"[]", b'{"RequestMethod": 7}', b'{"RequestBody": "?"}', b"\xff"):
        assert removal(asked_of(malformed)) == ""


class Members(Ipamd):
    """With addresses that containers have, as (node, address, client)."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[str, str, str]] = []
        self.etcd_away = False
        self.listed = 0

    def list_allocations(self, wanted: pb.ListAllocationsRequest) -> Iterator[pb.Allocation]:
        assert (wanted.pool, wanted.cluster) == ("ov1", True)
        self.listed += 1
        if self.etcd_away:
            raise IpamError(grpc.StatusCode.UNAVAILABLE, "etcd does not answer")
        for node, address, client in self.held:
            if client == wanted.client:
                key = pb.AttachmentKey(node=node, client=client)
                yield pb.Allocation(key=key, addresses=[pb.Address(cidr=f"{address}/24")])


class Desk:
    """A shim, its Docker, and the plugin."""

    def __init__(self, host: Host, ipamd: Members, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.ipamd = host, ipamd
        self.here: dict[str, str] = {}
        self.pauses = 0
        self.meanwhile: Callable[[], object] = list  # of no effect
        self.plugin = Authorization(host.sharing, Flights(host.state, ""), lambda: ipamd, "/run/docker.sock")  # type: ignore[arg-type, return-value]
        monkeypatch.setattr("libnetwork.docker.network", self._network)
        monkeypatch.setattr("libnetwork.docker.addresses", lambda _path, _network: self.here)
        monkeypatch.setattr("libnetwork.authorization.time.sleep", self._sleep)

    def _network(self, _: str, name: str) -> docker.Network | None:
        found = [one for one in self.host.there.values() if name in (one.id, one.name) or one.id.startswith(name)]
        if self.host.away or len(found) > 1:
            raise docker.DockerAwayError("Docker at /run/docker.sock: refused, or ambiguous")
        return found[0] if found else None

    def _sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.host.now += seconds
        self.meanwhile()


@pytest.fixture
def ipamd() -> Members:
    return Members()


@pytest.fixture
def desk(state: State, ipamd: Members, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    made = Desk(Host(state, ipamd, monkeypatch), ipamd, monkeypatch)
    yield made
    made.plugin.close()


def shared(desk: Desk) -> str:
    """ov1 is in Docker, for all hosts."""
    identity = desk.host.create()
    desk.host.once()
    return identity


def test_in_use_on_another_host(desk: Desk, ipamd: Members) -> None:
    identity = shared(desk)
    ipamd.held = [("host3", "10.0.0.9", "docker"), ("host2", "10.0.0.7", "docker"), ("host2", "10.0.0.8", "podman")]
    for name in ("ov1", identity, identity[:2]):
        assert (
            desk.plugin.judge(name) == f"network ov1 is in use by 10.0.0.7 on host2, and by 10.0.0.9 on host3{REFUSED}"
        )
    assert desk.pauses > 3  # that host might have been about to tell of a release
    ipamd.held = [("host2", f"10.0.0.{number}", "docker") for number in range(2, 60)]
    assert "by 10.0.0.2, 10.0.0.3, 10.0.0.4, 10.0.0.5 and 54 more on host2;" in desk.plugin.judge("ov1")


def test_in_use_on_this_host_it_says_so_at_once(desk: Desk, ipamd: Members) -> None:
    shared(desk)
    ipamd.held = [("host1", "10.0.0.2", "docker"), ("host2", "10.0.0.7", "docker")]
    desk.here = {"10.0.0.2": "ann"}
    assert "by ann (10.0.0.2) on host1, and by 10.0.0.7 on host2;" in desk.plugin.judge("ov1")
    assert desk.pauses == 0


def test_what_was_given_back_a_moment_ago(desk: Desk, ipamd: Members) -> None:
    shared(desk)
    ipamd.held = [("host2", "10.0.0.7", "docker")]
    desk.meanwhile = ipamd.held.clear
    settled = desk.host.settled
    assert desk.plugin.judge("ov1") == ""
    assert desk.host.settled == settled + 1  # our own releases first


def test_what_is_none_of_its_business(desk: Desk, ipamd: Members, state: State) -> None:
    assert desk.plugin.judge("ov1") == ""
    ipamd.held = [("host2", "10.0.0.7", "docker")]
    assert desk.plugin.judge("ov1") == "" and desk.host.asked == []  # no overlay here: Docker is not asked
    identity = shared(desk)
    assert desk.plugin.judge("nobody") == ""
    # Of another type; one that nobody shares, or by another name of this host's own; one that is about to be replaced.
    desk.host.there["other"] = docker.Network("other", "web", "netloom")
    state.put(Network("other", NetworkOptions("bridge")))
    assert desk.plugin.judge("web") == ""
    for name in ("", "shown-as-this"):
        ipamd.networks["ov1"].docker = name
        assert desk.plugin.judge("ov1") == ""
    ipamd.networks["ov1"].docker = "ov1"
    network = state.get(Network, identity)
    state.put(msgspec.structs.replace(network, interim=True))
    assert desk.plugin.judge("ov1") == ""
    state.put(network)
    assert ipamd.listed == 0
    assert desk.plugin.judge("ov1") != ""
    # One of two: the other one stays for all.
    desk.host.there["second"] = docker.Network("second", "ov1-too", "netloom")
    state.put(Network("second", network.options))
    assert desk.plugin.judge("ov1") == ""


def test_who_is_away(desk: Desk, ipamd: Members) -> None:
    shared(desk)
    ipamd.etcd_away = True
    assert "whether they use it is not known: etcd does not answer" in desk.plugin.judge("ov1")
    ipamd.away = True
    with pytest.raises(DriverError):
        desk.plugin.judge("ov1")
    desk.host.away = True
    with pytest.raises(docker.DockerAwayError):
        desk.plugin.judge("ov1")


def test_what_the_shim_removes_itself_is_not_judged(
    desk: Desk, ipamd: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = shared(desk)
    ipamd.networks["ov1"].docker = ""
    seen = []

    def remove(_: str, id: str) -> None:  # noqa: A002
        seen.append(desk.host.sharing.removing(id))
        desk.host.remove(id)

    monkeypatch.setattr("libnetwork.docker.remove_network", remove)
    assert not desk.host.sharing.removing(identity)
    desk.host.once()
    assert seen == [True]
    assert not desk.host.sharing.removing(identity)


# Over the socket


class Judge(Authorization):
    """Says what a test wants."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self._says = says
        self.over: list[bytes] = []
        super().__init__(self, self, None, "")  # type: ignore[arg-type]

    async def before(self, asked: Asked) -> None:
        """No container is of any interest."""

    def after(self, body: bytes) -> None:
        self.over.append(body)

    def removing(self, id: str) -> bool:  # noqa: A002
        return id == "own"

    def judge(self, name: str) -> str:
        return self._says(name)


@contextmanager
def answering(says: Callable[[str], str], path: str) -> Iterator[Judge]:
    judge = Judge(says)
    with ThreadPoolExecutor(1) as executor, serving(shim.application({}, executor, (), judge.routes()), path):
        yield judge
    judge.close()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # the path of a socket has 107 bytes
    return "s"


BEFORE, AFTER = "AuthZPlugin.AuthZReq", "AuthZPlugin.AuthZRes"
ALLOWED = (200, {"Allow": True})


def test_answers(path: str) -> None:
    asked = []

    def says(name: str) -> str:
        asked.append(name)
        if name == "fault":
            raise ZeroDivisionError
        if name == "away":
            raise DriverError("ipamd is away")
        return "it is in use" if name == "ov1" else ""

    with answering(says, path) as judge:
        assert ask(path, BEFORE, body("/v1.41/networks/ov1")) == (200, {"Allow": False, "Msg": "it is in use"})
        for name in ("web", "fault", "away", "own"):
            assert ask(path, BEFORE, body(f"/networks/{name}")) == ALLOWED
        assert asked == ["ov1", "web", "fault", "away"]
        for what in (b"", b"{", body("/containers/json", "GET"), body("/networks/prune", "POST")):
            assert ask(path, BEFORE, what) == ALLOWED
        assert ask(path, AFTER, body("/networks/ov1")) == ALLOWED
        # Docker's answers, of any size: a long list of containers.
        long = body("/containers/json", "GET", ResponseBody="x" * (shim._LARGEST + 1))
        assert ask(path, AFTER, long) == ALLOWED
        assert judge.over == [body("/networks/ov1")]
        assert ask(path, BEFORE, long) == ALLOWED
        assert asked == ["ov1", "web", "fault", "away"]


def test_all_else_is_answered_while_removals_are_judged(path: str) -> None:
    arrived, go = threading.Semaphore(0), threading.Event()

    def says(_: str) -> str:
        arrived.release()
        assert go.wait(30)
        return "in use"

    with answering(says, path), ThreadPoolExecutor(20) as others:
        waiting = [others.submit(ask, path, BEFORE, body("/networks/ov1")) for _ in range(20)]
        assert arrived.acquire(timeout=30)
        assert ask(path, BEFORE, body("/networks/own")) == ALLOWED
        assert ask(path, BEFORE, body("/networks", "GET")) == ALLOWED
        assert ask(path, AFTER, body("/networks", "GET")) == ALLOWED
        assert not any(one.done() for one in waiting)
        go.set()
        assert {one.result()[1]["Allow"] for one in waiting} == {False}
