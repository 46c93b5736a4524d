"""How overlay networks come into Docker and go; Docker and ipamd are played, and Docker calls back as the real one.

What the real Docker does when a driver refuses: tests/docker/test_overlay.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from ipamd.client import IpamError
from libnetwork import docker
from libnetwork.errors import DriverError
from libnetwork.messages import CreateNetwork, IpamData
from libnetwork.options import NetworkOptions
from libnetwork.sharing import Sharing
from libnetwork.state import Network, Problem, State
from protos.ipam.v1 import ipam_pb2 as pb

LOCAL, OURS = "LocalDefault", "netloom"
OV1 = NetworkOptions("overlay", "ov1")
POOL = IpamData("10.0.0.0/24", "10.0.0.1/24", None, OURS)
DOCKERS = IpamData("172.18.0.0/16", "", None, LOCAL)


class Ipamd:
    """What all hosts know of networks."""

    def __init__(self) -> None:
        self.networks: dict[str, pb.Network] = {}
        self.in_use = False
        self.away = False
        self.shares: list[tuple[str, str]] = []
        self.define("ov1")

    def define(self, name: str, type: str = "overlay", **fields: Any) -> None:  # noqa: A002
        values = {"subnets": ["10.0.0.0/24"], "gateways": ["10.0.0.1/24"], **fields}
        self.networks[name] = pb.Network(name=name, type=type, **values)

    def _answer(self) -> None:
        if self.away:
            raise IpamError(grpc.StatusCode.UNAVAILABLE, "ipamd is not reachable")

    def list_networks(self) -> list[pb.Network]:
        self._answer()
        return list(self.networks.values())

    def get_network(self, name: str) -> pb.Network:
        self._answer()
        if name not in self.networks:
            raise IpamError(grpc.StatusCode.NOT_FOUND, f"no network {name}")
        return self.networks[name]

    def share_network(self, name: str, shown: str) -> pb.Network:
        self._answer()
        if not shown and self.in_use:
            raise IpamError(grpc.StatusCode.FAILED_PRECONDITION, "container c9 on node host2 has 10.0.0.9")
        self.shares.append((name, shown))
        self.networks[name].docker = shown
        return self.networks[name]


class Host:
    """A shim and its Docker."""

    def __init__(self, state: State, ipamd: Ipamd, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.ipamd = state, ipamd
        self.there: dict[str, docker.Network] = {}
        self.in_use: dict[str, list[str]] = {}
        self.away = False
        self.refusing = ""
        self.asked: list[str] = []
        self.now = 1000.0
        self._number = 0
        self.settled = 0
        self.sharing = Sharing(state, lambda: ipamd, "/run/docker.sock", self._settle)  # type: ignore[arg-type, return-value]
        played: dict[str, Callable[..., Any]] = {
            "networks": self._networks,
            "network": self._network,
            "create_network": self._create,
            "remove_network": self._remove,
            "users": self._users,
        }
        for name, does in played.items():
            monkeypatch.setattr(f"libnetwork.sharing.docker.{name}", does)
        monkeypatch.setattr("libnetwork.sharing.time.monotonic", lambda: self.now)

    def _settle(self) -> None:
        self.settled += 1

    # Docker

    def _asked(self, what: str) -> None:
        if self.away:
            raise docker.DockerAwayError("Docker at /run/docker.sock: refused")
        self.asked.append(what)

    def _networks(self, _: str) -> list[docker.Network]:
        self._asked("list")
        return list(self.there.values())

    def _network(self, _: str, id: str) -> docker.Network | None:  # noqa: A002
        self._asked("get")
        return self.there.get(id)

    def _create(self, _: str, body: dict[str, Any]) -> str:
        self._asked(f"make {body['Name']}")
        if self.refusing:
            raise docker.RefusedError(self.refusing)
        assert body["CheckDuplicate"] is False
        return self.create(
            body["Name"],
            ours=body["IPAM"]
            == {
                "Driver": "netloom",
                "Options": {"network": body["Options"]["network"]},
                "Config": [{"Subnet": "10.0.0.0/24", "Gateway": "10.0.0.1"}],
            },
            labels=body["Labels"],
            attachable=body["Attachable"],
            options=NetworkOptions("overlay", body["Options"]["network"], internal=body["Internal"]),
        )

    def _remove(self, _: str, id: str) -> None:  # noqa: A002
        self._asked(f"remove {self.there[id].name}")
        assert not self.in_use.get(id)
        self.remove(id)

    def _users(self, _: str, wanted: docker.Network) -> list[str]:
        self._asked("users")
        return self.in_use.get(wanted.id, [])

    # What is typed, and what Docker's driver then does

    def create(
        self,
        name: str = "ov1",
        *,
        ours: bool = True,
        options: NetworkOptions = OV1,
        labels: dict[str, str] | None = None,
        attachable: bool = False,
        data: tuple[IpamData, ...] = (),
        six: tuple[IpamData, ...] = (),
    ) -> str:
        """docker network create; the id."""
        self._number += 1
        id = f"id{self._number}"  # noqa: A001
        pool = (
            IpamData("10.0.0.0/24", "10.0.0.1/24", None, OURS) if ours else IpamData("172.18.0.0/16", "", None, LOCAL)
        )
        given = CreateNetwork(id, {}, data or (pool,), six)
        network = self.sharing.admit(Network(id, options, ("10.0.0.0/24",), ("10.0.0.1/24",)), given)
        self.state.put(network)
        self.sharing.created(network)
        self.there[id] = docker.Network(
            id,
            name,
            "netloom",
            "netloom" if ours else "default",
            f"2026-01-01T00:00:{self._number:02}Z",
            options.internal,
            attachable,
            {"type": "overlay", "network": options.network},
            labels or {},
        )
        return id

    def remove(self, id: str) -> str:  # noqa: A002
        """docker network rm: Docker removes it whatever the driver answers, which is returned."""
        del self.there[id]
        network = self.state.find(Network, id)
        assert network is not None
        try:
            with self.sharing.going(network):
                self.state.remove(Network, id)
                self.sharing.removed(network)
        except DriverError as error:
            return str(error)
        return ""

    # The test

    def once(self, after_s: float = 0.0, *, look: bool = True) -> list[str]:
        """What one pass made and removed in Docker."""
        self.now += after_s
        self.asked.clear()
        self.sharing.once(look=look)
        return [what for what in self.asked if what.startswith(("make", "remove"))]

    def shown(self) -> list[tuple[str, str]]:
        return [(one.name, one.ipam) for one in self.there.values()]

    def problems(self) -> list[str]:
        return [one.text for one in self.state.all(Problem)]


@pytest.fixture
def ipamd() -> Ipamd:
    return Ipamd()


@pytest.fixture
def host(state: State, ipamd: Ipamd, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(state, ipamd, monkeypatch)


FINAL = [("ov1", "netloom")]


def test_without_overlays_docker_is_not_asked(host: Host) -> None:
    assert host.once(100) == []
    assert host.asked == []


def test_a_network_with_our_ipam_driver_is_shared(host: Host, ipamd: Ipamd) -> None:
    host.create()
    assert host.once() == []
    assert ipamd.shares == [("ov1", "ov1")]
    assert host.once() == []
    assert ipamd.shares == [("ov1", "ov1")]


def test_one_with_dockers_own_is_replaced_and_then_shared(host: Host, ipamd: Ipamd) -> None:
    host.create(ours=False, labels={"a": "b"}, attachable=True)
    (interim,) = host.state.all(Network)
    assert host.sharing.why_interim(interim) == "it is being replaced, try again"
    assert host.once() == ["make ov1", "remove ov1"]  # never none
    host.once()
    assert host.shown() == FINAL
    (network,) = host.there.values()
    assert (network.labels, network.attachable) == ({"a": "b"}, True)
    assert ipamd.shares == [("ov1", "ov1")]
    assert host.once() == []


def test_what_docker_refuses_after_all_is_made_once_more(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that it replaces is gone by then."""
    made = host._create

    def fails_at_the_end(path: str, body: dict[str, Any]) -> str:
        monkeypatch.setattr("libnetwork.sharing.docker.create_network", made)
        id = made(path, body)  # noqa: A001
        del host.there[id]
        host.state.remove(Network, id)
        raise docker.RefusedError("disk full")

    monkeypatch.setattr("libnetwork.sharing.docker.create_network", fails_at_the_end)
    host.create(ours=False)
    assert host.once() == ["make ov1", "remove ov1", "make ov1"]
    assert host.shown() == FINAL


def test_one_that_cannot_be_replaced_says_so(host: Host) -> None:
    host.create(ours=False)
    host.refusing = "no room"
    assert host.once() == ["make ov1"]
    assert [ipam for _, ipam in host.shown()] == ["default"]
    (interim,) = host.state.all(Network)
    assert host.sharing.why_interim(interim) == "no room"
    host.refusing = ""
    assert host.once(2) == ["make ov1", "remove ov1"]
    assert host.shown() == FINAL


def test_a_shim_that_died_between_the_two(host: Host) -> None:
    host.create(ours=False)
    first = next(iter(host.there))
    host.once()
    # As if the first one had not been removed.
    host.there[first] = docker.Network(first, "ov1", "netloom", "default", "2026")
    host.state.put(Network(first, NetworkOptions("overlay", "ov1"), interim=True))
    assert host.once() == ["remove ov1"]
    assert host.shown() == FINAL


def test_what_others_share_is_made_and_what_they_end_is_removed(host: Host, ipamd: Ipamd) -> None:
    ipamd.networks["ov1"].docker = "blue"
    assert host.once() == ["make blue"]
    assert [host.once(), host.once(20)] == [[], []]
    ipamd.networks["ov1"].docker = ""
    assert host.once() == ["remove blue"]
    assert ipamd.shares == []
    assert list(host.state.all(Network)) == []
    assert host.once(100) == []


def test_what_was_made_for_others_is_not_shared_anew_when_they_end_it(host: Host, ipamd: Ipamd) -> None:
    """However soon: two hosts that did so would never agree."""
    ipamd.networks["ov1"].docker = "ov1"
    assert host.once() == ["make ov1"]
    ipamd.networks["ov1"].docker = ""
    assert host.once() == ["remove ov1"]
    assert ipamd.shares == []


def test_one_of_two_that_is_removed_by_hand_ends_nothing(host: Host, ipamd: Ipamd) -> None:
    id = host.create()  # noqa: A001
    host.once()
    host.there["id9"] = _like(host.there[id], "id9")
    host.state.put(Network("id9", NetworkOptions("overlay", "ov1"), shared=True))
    assert host.remove("id9") == ""
    assert ipamd.networks["ov1"].docker == "ov1"
    assert list(host.there) == [id]


def test_without_a_change_docker_is_asked_now_and_then(host: Host, ipamd: Ipamd) -> None:
    ipamd.networks["ov1"].docker = "ov1"
    host.once()
    host.once(1, look=False)
    assert host.asked == []
    host.once(10, look=False)
    assert host.asked == ["list"]
    ipamd.define("ov2", docker="ov2")
    host.once(1, look=False)
    assert "make ov2" in host.asked


def test_what_docker_lost_comes_back(host: Host, ipamd: Ipamd) -> None:
    """By somebody who removed it while the shim was away: nobody was asked."""
    host.create()
    host.once()
    host.there.clear()
    # Docker may be about to tell that it is being removed.
    assert [host.once(), host.once(9)] == [[], []]
    assert host.once(2) == ["make ov1"]
    assert host.once() == []
    assert ipamd.shares == [("ov1", "ov1")]


def test_what_is_being_removed_is_not_made_meanwhile(host: Host, ipamd: Ipamd) -> None:
    """Docker does not list it from the beginning of its removal on; the follower may look at any moment of that."""
    id = host.create()  # noqa: A001
    host.once()
    network = host.state.find(Network, id)
    assert network is not None
    del host.there[id]
    assert host.once() == []
    with host.sharing.going(network):
        host.state.remove(Network, id)
        assert host.once(20) == []
        host.sharing.removed(network)
    assert host.once() == []
    assert ipamd.shares == [("ov1", "ov1"), ("ov1", "")]


def test_removed_by_hand_it_goes_for_all(host: Host, ipamd: Ipamd) -> None:
    id = host.create()  # noqa: A001
    host.once()
    assert host.remove(id) == ""
    assert ipamd.shares == [("ov1", "ov1"), ("ov1", "")]
    assert host.settled == 1  # what a container had that has just ended does not count
    assert host.once() == []
    assert host.shown() == []


def test_removed_while_others_use_it_another_one_is_there_at_once(host: Host, ipamd: Ipamd) -> None:
    id = host.create(labels={"a": "b"})  # noqa: A001
    host.once()
    ipamd.in_use = True
    assert host.remove(id) == "network ov1 comes back: container c9 on node host2 has 10.0.0.9"
    assert host.shown() == FINAL
    (network,) = host.there.values()
    assert network.labels == {"a": "b"}
    assert network.id != id
    assert host.once() == []


def test_where_that_fails_it_comes_later(host: Host, ipamd: Ipamd) -> None:
    id = host.create()  # noqa: A001
    host.once()
    ipamd.in_use, host.refusing = True, "no"
    assert "comes back" in host.remove(id)
    assert host.shown() == []
    host.refusing = ""
    assert host.once() == ["make ov1"]


def test_removed_while_ipamd_is_away_it_comes_back(host: Host, ipamd: Ipamd) -> None:
    id = host.create()  # noqa: A001
    host.once()
    ipamd.away = True
    assert "ipamd is not reachable" in host.remove(id)
    with pytest.raises(DriverError, match="ipamd is not reachable"):
        host.once()
    ipamd.away = False
    assert host.once() == ["make ov1"]


def test_another_name_of_this_host_is_its_own_matter(host: Host, ipamd: Ipamd) -> None:
    """Where the shared name is another network's here."""
    ipamd.networks["ov1"].docker = "ov1"
    host.there["foreign"] = docker.Network("foreign", "ov1", "bridge", "default")
    assert host.once() == []
    (text,) = host.problems()
    assert "another network of this name (driver bridge); remove that (docker network rm foreign)" in text
    id = host.create("blue")  # noqa: A001
    assert host.once(60) == []
    assert (host.problems(), ipamd.shares) == ([], [])
    assert host.remove(id) == ""
    assert ipamd.networks["ov1"].docker == "ov1"


def test_a_foreign_network_of_the_name_is_left_alone_and_told_once(
    host: Host, ipamd: Ipamd, caplog: pytest.LogCaptureFixture
) -> None:
    ipamd.networks["ov1"].docker = "ov1"
    host.there["foreign"] = docker.Network("foreign", "ov1", "bridge", "default")
    for _ in range(5):
        assert host.once(60) == []
    assert len(caplog.records) == 1
    del host.there["foreign"]
    assert host.once(60) == ["make ov1"]
    assert host.problems() == []


def test_what_docker_refuses_is_tried_ever_more_rarely(host: Host, ipamd: Ipamd) -> None:
    ipamd.networks["ov1"].docker = "ov1"
    host.refusing = "not today"
    tries = [second for second in range(200) if host.once(1) == ["make ov1"]]
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert set(pauses[5:]) == {30}
    assert host.problems() == ["not today"]
    host.refusing = ""
    host.once(30)
    assert (host.shown(), host.problems()) == (FINAL, [])


def test_where_a_container_is_it_stays(host: Host, ipamd: Ipamd) -> None:
    id = host.create()  # noqa: A001
    host.once()
    host.in_use[id] = ["ann"]
    ipamd.networks["ov1"].docker = ""
    assert host.once() == []
    assert "container ann refers to it: docker network disconnect ov1 ann" in host.problems()[0]
    # Shared again meanwhile: it is as it should be.
    ipamd.networks["ov1"].docker = "ov1"
    assert host.once(60) == []
    assert host.problems() == []
    ipamd.networks["ov1"].docker = ""
    host.in_use.clear()
    assert host.once() == ["remove ov1"]


def test_a_definition_that_is_gone_may_be_about_to_come(host: Host, ipamd: Ipamd) -> None:
    host.create()
    host.once()
    gone = ipamd.networks.pop("ov1")
    assert [host.once(), host.once(9)] == [[], []]
    ipamd.networks["ov1"] = gone
    assert host.once(9) == []
    del ipamd.networks["ov1"]
    assert [host.once(), host.once(9), host.once(2)] == [[], [], ["remove ov1"]]


def test_of_two_the_one_that_is_used_stays(host: Host, ipamd: Ipamd) -> None:
    ipamd.networks["ov1"].docker = "ov1"
    first = host.create()
    second = "id9"
    host.there[second] = _like(host.there[first], second)
    host.state.put(Network(second, NetworkOptions("overlay", "ov1"), shared=True))
    host.in_use[second] = ["ann"]
    assert host.once() == ["remove ov1"]
    assert list(host.there) == [second]
    assert ipamd.shares == []


def _like(one: docker.Network, id: str) -> docker.Network:  # noqa: A002
    return docker.Network(id, one.name, one.driver, one.ipam, one.created + "9", options=one.options)


def test_docker_away_nothing_is_concluded(host: Host, ipamd: Ipamd) -> None:
    host.create()
    host.once()
    host.away = True
    ipamd.networks["ov1"].docker = ""
    with pytest.raises(docker.DockerAwayError):
        host.once()
    host.away = False
    assert host.once() == ["remove ov1"]


def test_a_shim_begins_with_what_the_last_one_told(host: Host, state: State, ipamd: Ipamd) -> None:
    state.put(Problem("ov1", "old"))
    host.sharing.start()
    host.sharing.stop()
    assert host.problems() == []


def test_what_is_not_admitted(host: Host, ipamd: Ipamd) -> None:
    def refused(text: str, **given: Any) -> None:
        with pytest.raises(DriverError, match=text):
            host.create(**given)

    ipamd.define("plain", "routed")
    ipamd.define("six", subnets=["fd00::/64"], gateways=["fd00::1/64"])
    ipamd.define("inner", internal=True)
    ipamd.define("dual", subnets=["10.0.0.0/24", "fd00::/64"], gateways=["10.0.0.1/24", "fd00::1/64"])
    refused("netloom network create ov9 --type overlay", options=NetworkOptions("overlay", "ov9"))
    refused("network plain is of type routed", options=NetworkOptions("overlay", "plain"))
    refused("six has no IPv4 subnet", options=NetworkOptions("overlay", "six"))
    refused("leave --internal out", options=NetworkOptions("overlay", "ov1", internal=True), ours=False)
    refused("inner has no way out; add --internal", options=NetworkOptions("overlay", "inner"))
    refused(
        "use --ipam-driver netloom --ipam-opt network=ov1 --subnet 10.0.0.0/24",
        data=(IpamData("10.9.0.0/24", "10.9.0.1/24", None, OURS),),
    )
    refused("--gateway 10.0.0.9/24", data=(IpamData("10.0.0.0/24", "10.0.0.9/24", None, OURS),))
    refused(
        "netloom ip reserve ov1 10.0.0.7", data=(IpamData("10.0.0.0/24", "10.0.0.1/24", {"x": "10.0.0.7/24"}, OURS),)
    )
    refused("no IPv6 subnet; leave --ipv6 out", options=NetworkOptions("overlay", "ov1", ipv6=True))
    refused("has the subnet fd00::/64, and Docker none", options=NetworkOptions("overlay", "dual", ipv6=True))
    both = (IpamData("fd00::/64", "fd00::1/64", None, OURS),)
    host.create(options=NetworkOptions("overlay", "dual", ipv6=True), six=both)
    # Without --internal what is defined as such is replaced by one that is.
    host.create("in", options=NetworkOptions("overlay", "inner"), ours=False)
    host.create()
    host.once()
    assert [one.internal for one in host.there.values() if one.name == "in"] == [True]
    refused("Docker has this overlay network already, as ov1; use that", name="blue")
    host.there = {one.id: one for one in host.there.values() if one.name != "ov1"}
    host.create("blue")  # Docker forgot the other one
