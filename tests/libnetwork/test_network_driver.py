"""The network driver with scripted plugins; what the kernel does is played: the namespace, the interface's moves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kernel import macs
from kernel.errors import Busy
from libnetwork.errors import DriverError
from libnetwork.messages import (
    CreateEndpoint,
    CreateNetwork,
    Empty,
    EndpointInterface,
    EndpointRef,
    IpamData,
    Join,
    NetworkRef,
    ProgramExternal,
)
from libnetwork.network_driver import NetworkDriver
from libnetwork.sharing import Sharing
from libnetwork.state import Ended, Endpoint, Network, Problem, State
from libnetwork.sticky import Flights
from tests.libnetwork.conftest import Plugins, endpoint

N, E = "n1" * 32, "e1" * 32
TAKEN = "$.runtimeConfig.portMappings[{}].hostPort: tcp port 8080 is published by container c7"
GENERIC = "com.docker.network.generic"


class Staging:
    """Of one namespace."""

    def __init__(self) -> None:
        self.forgotten: list[set[str]] = []

    @contextmanager
    def lent(self, _: Any) -> Iterator[str]:
        yield "/run/netloom/staging/a"

    def forget(self, in_use: Any) -> None:
        self.forgotten.append(in_use())


class Stage:
    """A driver, and what it did to interfaces."""

    def __init__(self, state: State, plugins: Plugins, conf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.plugins, self.conf_dir = state, plugins, conf_dir
        self.links: list[str] = []
        self.move_fails = False
        monkeypatch.setattr(
            "libnetwork.network_driver.link.delete", lambda _, name: self.links.append(f"delete {name}")
        )
        monkeypatch.setattr(NetworkDriver, "_move_out", self._move_out)
        self.driver = NetworkDriver(
            state,
            Staging(),  # type: ignore[arg-type]
            lambda: None,  # type: ignore[arg-type, return-value]
            (str(plugins.directory),),
            str(conf_dir),
            Sharing(state, lambda: None, "/run/docker.sock", lambda: None),  # type: ignore[arg-type, return-value]
            Flights(state, "/run/docker.sock"),
        )

    def _move_out(self, _: Any, path: str, ifname: str) -> None:
        self.links.append(f"move {path} {ifname}")
        if self.move_fails:
            raise Busy("move", 16)

    def network(self, id: str = N, gateway: str = "10.1.0.1/24", internal: bool = False, **generic: str) -> None:  # noqa: A002
        options = {GENERIC: {name.replace("__", "."): value for name, value in generic.items()}}
        if internal:
            options["com.docker.network.internal"] = True  # type: ignore[assignment]
        data = (IpamData("10.1.0.0/24", gateway),)
        assert self.driver.create_network(CreateNetwork(id, options, data, ())) == {}

    def listed(self, *plugins: dict[str, Any]) -> None:
        document = {"cniVersion": "1.0.0", "name": "mine", "plugins": list(plugins)}
        (self.conf_dir / "mine.conflist").write_text(json.dumps(document))

    def create(self, address: str = "10.1.0.2/24", mac: str = "") -> dict[str, Any]:
        return self.driver.create_endpoint(CreateEndpoint(N, E, EndpointInterface(address, "", mac)))

    def join(self) -> dict[str, Any]:
        return self.driver.join(Join(N, E, "/run/docker/netns/x"))

    def program(self, *ports: dict[str, Any]) -> None:
        mapping = [{"Proto": 6, "Port": 80, **port} for port in ports]
        assert self.driver.program(ProgramExternal(N, E, {"com.docker.network.portmap": mapping})) == {}

    def delete(self) -> None:
        assert self.driver.delete_endpoint(EndpointRef(N, E)) == {}
        self.driver.settle()

    def attached(self, **generic: Any) -> None:
        self.network(**generic)
        self.create()
        self.join()

    def endpoint(self) -> Endpoint | None:
        return self.state.find(Endpoint, E)


@pytest.fixture
def stage(state: State, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    (tmp_path / "net.d").mkdir()
    return Stage(state, plugins, tmp_path / "net.d", monkeypatch)


ROUTED = (
    """echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.2/24", "gateway": "10.1.0.9"}], "routes": ["""
    """{"dst": "0.0.0.0/0"}, {"dst": "10.5.0.0/16", "gw": "10.1.0.7"}, {"dst": "10.6.0.0/16"}]}'; exit 0"""
)


def test_capabilities(stage: Stage) -> None:
    assert stage.driver.capabilities(Empty()) == {"Scope": "local", "ConnectivityScope": "local"}


def test_an_unknown_option_of_dockers_is_told(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.network(com__docker__network__new="1")
    assert caplog.records[0].netloom_fields["option"] == "com.docker.network.new=1"  # type: ignore[attr-defined]


def test_two_networks_do_not_share_a_bridge(stage: Stage) -> None:
    stage.network(com__docker__network__bridge__name="br0")
    stage.network(com__docker__network__bridge__name="br0")  # the same again
    with pytest.raises(DriverError, match=f"bridge.name=br0: network {N[:12]} has this bridge"):
        stage.network("n2", com__docker__network__bridge__name="br0")
    with pytest.raises(DriverError, match=r"conflist mine: no \.conflist"):
        stage.network("n3", conflist="mine")
    assert [one.id for one in stage.state.all(Network)] == [N]


def test_a_container_from_create_to_delete(stage: Stage) -> None:
    stage.network()
    assert stage.create() == {"Interface": {"MacAddress": "02:42:0a:01:00:02"}}
    assert stage.plugins.calls() == []
    assert stage.join() == {
        "InterfaceName": {"SrcName": "nle1e1e1e1e1e1", "DstPrefix": "eth"},
        "StaticRoutes": [],
        "Gateway": "10.1.0.1",
        "GatewayIPv6": "",
    }
    assert stage.plugins.conf(0)["runtimeConfig"] == {"mac": "02:42:0a:01:00:02"}
    assert stage.driver.leave(EndpointRef(N, E)) == {}
    stage.delete()
    assert stage.plugins.calls() == ["ADD bridge", "ADD firewall", "DEL firewall", "DEL bridge"]
    assert stage.plugins.environment()["CNI_NETNS"] == ""
    assert stage.links[0] == "move /run/netloom/staging/a nle1e1e1e1e1e1"
    assert "delete nle1e1e1e1e1e1" in stage.links
    assert stage.endpoint() is None
    stage.delete()
    stage.driver.delete_network(NetworkRef(N))
    assert stage.plugins.calls()[4:] == ["GC bridge", "GC firewall"]
    assert stage.driver.delete_network(NetworkRef(N)) == {}


def test_a_mac_that_docker_chose_is_not_in_the_answer(stage: Stage) -> None:
    stage.network()
    assert stage.create(mac="02:00:00:00:00:07") == {"Interface": {}}


def test_routes_of_the_result_and_gateways(stage: Stage) -> None:
    stage.plugins.script("ADD", "firewall", ROUTED)
    stage.network(gateway="")
    stage.create()
    answer = stage.join()
    assert answer["StaticRoutes"] == [
        {"Destination": "10.5.0.0/16", "RouteType": 0, "NextHop": "10.1.0.7"},
        {"Destination": "10.6.0.0/16", "RouteType": 1},
    ]
    assert answer["Gateway"] == "10.1.0.9"
    assert "DisableGatewayService" not in answer


@pytest.mark.parametrize(("gateway", "internal"), [("", False), ("10.1.0.1/24", True)])
def test_without_a_way_out_docker_makes_none_of_its_own(stage: Stage, gateway: str, internal: bool) -> None:
    stage.network(gateway=gateway, internal=internal)
    stage.create()
    answer = stage.join()
    assert answer["DisableGatewayService"] is True
    assert not answer.get("Gateway")


def test_a_network_with_endpoints_is_not_removed(stage: Stage) -> None:
    stage.network()
    stage.create()
    with pytest.raises(DriverError, match=f"still has 1 endpoints, such as {E[:12]}"):
        stage.driver.delete_network(NetworkRef(N))


def test_unknown_ones(stage: Stage) -> None:
    with pytest.raises(DriverError, match=f"network {N[:12]} is unknown"):
        stage.create()
    stage.network()
    with pytest.raises(DriverError, match=f"endpoint {E[:12]} is unknown"):
        stage.join()
    with pytest.raises(DriverError, match="is unknown"):
        stage.driver.operational_info(EndpointRef(N, E))
    assert stage.driver.revoke(EndpointRef(N, E)) == {}
    stage.delete()


def test_a_join_that_fails_leaves_nothing_and_can_be_tried_again(stage: Stage) -> None:
    stage.network()
    stage.create()
    before = stage.endpoint()
    stage.plugins.refuse("ADD", "firewall", "no")
    with pytest.raises(DriverError, match=r"firewall \(add\): no"):
        stage.join()
    assert stage.plugins.calls() == ["ADD bridge", "ADD firewall", "DEL firewall", "DEL bridge"]
    assert stage.endpoint() == before
    (stage.plugins.directory / "ADD firewall").unlink()
    assert stage.join()["Gateway"] == "10.1.0.1"


def test_an_interface_that_cannot_be_moved(stage: Stage) -> None:
    stage.network()
    stage.create()
    stage.move_fails = True
    with pytest.raises(DriverError, match=f"endpoint {E[:12]}: move: Device or resource busy"):
        stage.join()
    assert stage.plugins.calls() == ["ADD bridge", "DEL firewall", "DEL bridge"]


def test_a_shim_that_died_in_the_middle_of_join(stage: Stage) -> None:
    """Its successor finds the path of the namespace and no result: DEL there, then ADD."""
    stage.network()
    stage.state.put(endpoint(E, staging="/run/netloom/staging/b"))
    stage.join()
    assert stage.plugins.calls() == ["DEL firewall", "DEL bridge", "ADD bridge", "ADD firewall"]
    again = stage.endpoint()
    assert again is not None
    assert again.staging == "/run/netloom/staging/a"


def test_addresses_of_the_plugins_own(stage: Stage) -> None:
    stage.listed({"type": "bridge", "ipam": {"type": "ipamd"}}, {"type": "portmap"})
    stage.network(gateway="", conflist="mine")
    answer = stage.create(address="")["Interface"]
    assert answer["Address"] == "10.1.0.2/24"
    assert answer["MacAddress"].startswith("02:42:")
    assert stage.plugins.calls() == ["ADD bridge"]
    stage.join()
    assert stage.plugins.calls() == ["ADD bridge"]


def test_when_their_add_fails_nothing_stays_as_docker_does_not_call_again(stage: Stage) -> None:
    stage.listed({"type": "bridge"})
    stage.network(gateway="", conflist="mine")
    stage.plugins.refuse("ADD", "bridge", "full")
    with pytest.raises(DriverError, match="full"):
        stage.create(address="")
    assert stage.endpoint() is None
    stage.plugins.refuse("DEL", "bridge", "stuck")
    with pytest.raises(DriverError, match="full"):
        stage.create(address="")
    assert stage.endpoint() is not None  # for the comparison with Docker to finish


def test_a_failed_del_goes_on_is_told_and_kept(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.attached()
    stage.program({"HostPort": 8080})
    for name in ("portmap", "firewall"):
        stage.plugins.refuse("DEL", name, f"{name} is stuck")
    stage.delete()
    (told,) = [one.netloom_fields for one in caplog.records if one.message == "not detached"]  # type: ignore[attr-defined]
    assert [name in told["error"] for name in ("portmap is stuck", "firewall is stuck")] == [True, True]
    assert stage.plugins.calls()[3:] == ["DEL portmap", "DEL firewall", "DEL bridge"] * 2
    assert stage.links[-1] == "delete nle1e1e1e1e1e1"
    kept = stage.endpoint()
    assert kept is not None
    assert kept.ports is not None
    for name in ("portmap", "firewall"):
        (stage.plugins.directory / f"DEL {name}").unlink()
    assert stage.driver.owned() == (set(), {N})  # no longer to be compared with what Docker has
    stage.driver.end()
    stage.driver.end()
    stage.driver.settle()
    assert stage.endpoint() is None


def test_what_could_meet_with_a_del_waits_for_it(stage: Stage) -> None:
    """The next endpoint of the network, published ports, and the network's end."""
    waits = 'while [ ! -e "$here/go" ]; do sleep 0.01; done'
    other = CreateEndpoint(N, "e2" * 32, EndpointInterface("10.1.0.3/24", "", ""))
    stage.attached()
    stage.driver.create_endpoint(other)
    stage.plugins.script("DEL", "firewall", waits)
    stage.driver.delete_endpoint(EndpointRef(N, E))
    ports = {"com.docker.network.portmap": [{"Proto": 6, "Port": 80, "HostPort": 8080}]}
    calls = (
        lambda: stage.driver.create_endpoint(other),
        lambda: stage.driver.program(ProgramExternal(N, "e2" * 32, ports)),
        lambda: stage.driver.delete_network(NetworkRef(N)),
        stage.driver.settle,
        lambda: stage.driver.settle_address("10.1.0.2"),
    )
    with ThreadPoolExecutor(len(calls)) as executor:
        begun = [executor.submit(call) for call in calls]
        try:
            stage.driver.settle("another network")
            stage.driver.leave(EndpointRef(N, E))
            stage.driver.settle_address("10.1.0.3")
            assert wait(begun, timeout=0.5).done == set()
            assert stage.endpoint() is not None
        finally:
            (stage.plugins.directory / "go").touch()
        wait(begun)
    assert stage.endpoint() is None


def test_a_del_that_hangs_keeps_nobody_from_starting_for_ever(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetworkDriver.settle, "__defaults__", ("", 0.01))
    stage.attached()
    stage.plugins.script("DEL", "firewall", 'while [ ! -e "$here/go" ]; do sleep 0.01; done')
    stage.driver.delete_endpoint(EndpointRef(N, E))
    try:
        stage.driver.create_endpoint(CreateEndpoint(N, "e2" * 32, EndpointInterface("10.1.0.3/24", "", "")))
        assert stage.endpoint() is not None
    finally:
        (stage.plugins.directory / "go").touch()
        stage.driver.settle_address("10.1.0.2")


def test_an_endpoint_whose_network_is_lost(stage: Stage) -> None:
    stage.attached()
    stage.state.remove(Network, N)
    stage.delete()
    assert stage.endpoint() is None
    assert stage.links[-1] == "delete nle1e1e1e1e1e1"


# Published ports


def ports(stage: Stage) -> list[tuple[str, int, int]]:
    found = stage.endpoint()
    assert found is not None
    return [(one.host_ip, one.host_port, one.port) for one in found.ports or ()]


def test_ports_come_and_go(stage: Stage) -> None:
    stage.attached(com__docker__network__bridge__host_binding_ipv4="192.0.2.7")
    stage.program({"HostPort": 8080}, {"HostPort": 53, "Proto": 17, "Port": 53, "HostIP": "127.0.0.1"})
    conf = stage.plugins.conf(2)
    assert conf["type"] == "portmap"
    assert conf["prevResult"]["by"] == "firewall"
    assert conf["runtimeConfig"]["portMappings"] == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.7"},
        {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"},
    ]
    assert ports(stage) == [("", 8080, 80), ("127.0.0.1", 53, 53)]
    for _ in range(2):
        assert stage.driver.revoke(EndpointRef(N, E)) == {}
    assert stage.plugins.calls()[3:] == ["DEL portmap"]
    assert ports(stage) == []


def test_a_port_of_our_choice(stage: Stage) -> None:
    stage.attached()
    stage.program({"HostPort": 0})
    ((_, port, _),) = ports(stage)
    assert 1024 <= port <= 65535
    found = stage.endpoint()
    assert found is not None
    assert found.ports is not None
    assert found.ports[0].chosen
    assert stage.plugins.conf(2)["runtimeConfig"]["portMappings"][0]["hostPort"] == port


def test_the_first_free_port_of_a_range(stage: Stage) -> None:
    stage.attached()
    answer = json.dumps({"code": 103, "msg": TAKEN.format(1)})
    free = f"case $(ls \"$here/calls\" | grep -c 'ADD portmap') in 1 | 2) echo '{answer}'; exit 1 ;; esac"
    stage.plugins.script("ADD", "portmap", free)
    stage.program({"HostPort": 7000, "HostPortEnd": 7005}, {"HostPort": 9000, "HostPortEnd": 9005})
    assert ports(stage) == [("", 7000, 80), ("", 9002, 80)]  # only the one that was taken is another
    assert not any(one.chosen for one in stage.state.get(Endpoint, E).ports or ())


def test_a_port_that_is_taken_is_refused_at_once(stage: Stage) -> None:
    stage.attached()
    stage.plugins.refuse("ADD", "portmap", TAKEN.format(0), code=103)
    for last in (0, 8080, 8082):
        with pytest.raises(DriverError, match="is published by container c7"):
            stage.program({"HostPort": 8080, "HostPortEnd": last}, {"HostPort": 0})
    assert stage.plugins.calls().count("ADD portmap") == 1 + 1 + 3
    assert ports(stage) == []


def test_ports_of_our_choice_that_are_all_taken(stage: Stage) -> None:
    stage.attached()
    stage.plugins.refuse("ADD", "portmap", TAKEN.format(1), code=103)
    with pytest.raises(DriverError, match="is published by container c7"):
        stage.program({"HostPort": 8080}, {"HostPort": 0})
    tried = [call for call in stage.plugins.calls() if call == "ADD portmap"]
    assert len(tried) == 32


@pytest.mark.parametrize(("words", "code"), [("no nftables here", 100), (TAKEN.format(0), 5), (TAKEN.format(9), 103)])
def test_what_another_port_would_not_help(stage: Stage, words: str, code: int) -> None:
    stage.attached()
    stage.plugins.refuse("ADD", "portmap", words, code=code)
    with pytest.raises(DriverError):
        stage.program({"HostPort": 0}, {"HostPort": 7000, "HostPortEnd": 7005})
    assert stage.plugins.calls().count("ADD portmap") == 1


def test_what_cannot_be_published(stage: Stage) -> None:
    stage.attached()
    with pytest.raises(DriverError, match="protocol 1 is none of tcp, udp, sctp"):
        stage.program({"HostPort": 8080, "Proto": 1})
    with pytest.raises(DriverError, match="portmap: "):
        stage.program({"HostPort": "8080"})
    stage.program()
    assert ports(stage) == []


def test_macvlan_publishes_nothing(stage: Stage) -> None:
    stage.plugins.make("macvlan")
    stage.attached(type="macvlan", parent="eth0")
    stage.program({"HostPort": 8080})
    assert stage.plugins.calls() == ["ADD macvlan"]


def test_an_overlay_is_attached_by_its_name_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(Sharing, "admit", lambda _, network, __: network)
    monkeypatch.setattr(Sharing, "removed", lambda _, network: removed.append(network.id))
    stage.plugins.make("netloom")
    stage.network(type="overlay", network="ov1")
    stage.create()
    assert stage.join()["Gateway"] == "10.1.0.1"
    conf = stage.plugins.conf(0)
    assert (conf["type"], conf["network"], conf["runtimeConfig"]) == ("netloom", "ov1", {"mac": "02:42:0a:01:00:02"})
    assert conf["ipam"] == {
        "type": "static",
        "addresses": [{"address": "10.1.0.2/24", "gateway": "10.1.0.1"}],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    stage.delete()
    assert stage.plugins.calls() == ["ADD netloom", "DEL netloom"]
    # Docker gives the address back next, to the pool of that network.
    assert [(one.pool_id, one.address) for one in stage.state.all(Ended)] == [("overlay-ov1-4", "10.1.0.2")]
    stage.driver.delete_network(NetworkRef(N))
    assert removed == [N]
    # What Docker forgot was not removed by anybody.
    stage.network(type="overlay", network="ov1")
    stage.driver.discard_network(N)
    assert removed == [N]


def test_an_overlay_that_is_being_replaced_takes_no_container(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sharing, "admit", lambda _, network, __: replace(network, interim=True))
    stage.network(type="overlay", network="ov1")
    with pytest.raises(DriverError, match="overlay network ov1: it is being replaced, try again"):
        stage.create()
    stage.state.put(Problem("ov1", "Docker is full"))
    with pytest.raises(DriverError, match="overlay network ov1: Docker is full"):
        stage.create()
    stage.driver.delete_network(NetworkRef(N))
    assert stage.plugins.calls() == []


def test_macs_follow_from_addresses(stage: Stage) -> None:
    stage.network()
    answer = stage.driver.create_endpoint(CreateEndpoint(N, E, EndpointInterface("", "fd00::2/64", "")))
    assert answer == {"Interface": {"MacAddress": macs.of_address(ip_address("fd00::2"))}}
