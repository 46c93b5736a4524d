"""The IPAM driver on a real ipamd with the memory store; the host's routes are played."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

import pytest

from ipamd.client import Client
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import CLIENT, DEFAULT_POOLS, IpamDriver
from libnetwork.messages import Empty, PoolRef, ReleaseAddress, RequestAddress, RequestPool
from libnetwork.state import Ended, Pool, State
from protos.ipam.v1 import ipam_pb2 as pb
from tests.ipamd.daemon import Daemon

GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}


@dataclass(frozen=True)
class Route:
    dst: Any


class Driver:
    """An IpamDriver, and what Docker asks of it, in short."""

    def __init__(self, state: State, client: Client) -> None:
        self.client = client
        self.driver = IpamDriver(state, lambda: client, lambda: None)  # type: ignore[arg-type, return-value]

    def pool(self, pool: str = "", sub: str = "", v6: bool = False) -> str:
        answer = self.driver.request_pool(RequestPool("netloom", pool, sub, {}, v6))
        assert answer["Data"] == {}
        return str(answer["PoolID"])

    def subnet(self, **given: Any) -> str:
        return str(self.driver.request_pool(RequestPool(**given))["Pool"])

    def address(self, pool: str, address: str = "", gateway: bool = False) -> str:
        return str(self.driver.request_address(RequestAddress(pool, address, GATEWAY if gateway else None))["Address"])

    def release(self, pool: str, address: str) -> None:
        assert self.driver.release_address(ReleaseAddress(pool, address)) == {}

    def drop(self, pool: str) -> None:
        assert self.driver.release_pool(PoolRef(pool)) == {}

    def held(self) -> list[str]:
        self.driver.settle()
        found = self.client.list_allocations(pb.ListAllocationsRequest(client=CLIENT))
        return sorted(address.cidr for one in found for address in one.addresses)

    def pools(self) -> list[str]:
        return sorted(pool.name for pool in self.client.list_pools() if pool.name.startswith("docker-"))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    one = Daemon(tmp_path_factory.mktemp("ipamd"))
    text = one.config.read_text()
    path = f'path = "{one.database}"'
    assert path in text
    one.config.write_text(text.replace(path, 'kind = "memory"'))
    with one:
        yield one


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[Route]:
    found = [Route(ip_network("0.0.0.0/0"))]
    monkeypatch.setattr("libnetwork.ipam_driver.route.all_routes", lambda *_: list(found))
    return found


@pytest.fixture
def ipam(daemon: Daemon, state: State, routes: list[Route]) -> Iterator[Driver]:
    with daemon.client() as client:
        one = Driver(state, client)
        yield one
        one.driver.settle()
        for pool in list(state.all(Pool)):
            for held in list(client.list_allocations(pb.ListAllocationsRequest(client=CLIENT))):
                client.release(held.key)
            one.drop(pool.id)
        assert (one.held(), one.pools()) == ([], [])


def test_what_docker_is_told(ipam: Driver) -> None:
    assert ipam.driver.capabilities(Empty()) == {"RequiresMACAddress": False, "RequiresRequestReplay": True}
    assert set(ipam.driver.address_spaces(Empty()).values()) == {"netloom"}


def test_one_network_from_pool_to_nothing(ipam: Driver) -> None:
    pool = ipam.pool("10.1.0.0/24")
    assert ipam.address(pool, gateway=True) == "10.1.0.1/24"
    assert ipam.address(pool) == "10.1.0.2/24"
    assert ipam.address(pool, "10.1.0.77") == "10.1.0.77/24"
    assert ipam.address(pool) == "10.1.0.3/24"
    ipam.release(pool, "10.1.0.2")
    ipam.release(pool, "10.1.0.2")
    assert ipam.held() == ["10.1.0.1/24", "10.1.0.3/24", "10.1.0.77/24"]
    with pytest.raises(DriverError, match=r"10\.1\.0\.0/24: ipamd: "):
        ipam.drop(pool)
    for address in ("10.1.0.1", "10.1.0.3", "10.1.0.77"):
        ipam.release(pool, address)
    ipam.drop(pool)
    ipam.drop(pool)
    ipam.release(pool, "10.1.0.3")


def test_an_address_that_is_taken_or_outside_or_none(ipam: Driver) -> None:
    pool = ipam.pool("10.2.0.0/24")
    ipam.address(pool, "10.2.0.5")
    with pytest.raises(DriverError, match=r"10\.2\.0\.5"):
        ipam.address(pool, "10.2.0.5")
    with pytest.raises(DriverError, match=r"address 10\.3\.0\.5 does not lie in the network's subnet 10\.2\.0\.0/24"):
        ipam.address(pool, "10.3.0.5")
    with pytest.raises(DriverError, match="wanted an address, found 'five'"):
        ipam.address(pool, "five")
    with pytest.raises(DriverError, match="pool nowhere is unknown to netloom-docker"):
        ipam.address("nowhere")


def test_a_full_network(ipam: Driver) -> None:
    pool = ipam.pool("10.2.0.0/30")
    ipam.address(pool, gateway=True)
    ipam.address(pool)
    with pytest.raises(DriverError, match=r"pool 10\.2\.0\.0/30: ipamd: "):
        ipam.address(pool)


def test_ip_range_gateway_and_auxiliary_addresses(ipam: Driver) -> None:
    pool = ipam.pool("10.3.0.0/16", "10.3.5.0/30")
    assert len(ipam.pools()) == 2
    assert ipam.address(pool, gateway=True) == "10.3.0.1/16"
    assert ipam.address(pool, "10.3.5.1") == "10.3.5.1/16"  # --aux-address
    # All four addresses of the range are a container's: it is no subnet.
    assert [ipam.address(pool) for _ in range(3)] == ["10.3.5.0/16", "10.3.5.2/16", "10.3.5.3/16"]
    with pytest.raises(DriverError):
        ipam.address(pool)
    assert ipam.address(pool, "10.3.200.3") == "10.3.200.3/16"
    ipam.release(pool, "10.3.200.3")
    ipam.release(pool, "10.3.5.2")
    assert ipam.address(pool) == "10.3.5.2/16"


def test_a_range_that_holds_the_gateway(ipam: Driver) -> None:
    pool = ipam.pool("10.3.0.0/16", "10.3.0.0/24")
    assert ipam.address(pool, gateway=True) == "10.3.0.1/16"
    assert ipam.address(pool) == "10.3.0.2/16"


def test_a_range_at_the_end_leaves_the_broadcast_address_alone(ipam: Driver) -> None:
    pool = ipam.pool("10.3.0.0/24", "10.3.0.252/30")
    assert [ipam.address(pool) for _ in range(3)] == ["10.3.0.252/24", "10.3.0.253/24", "10.3.0.254/24"]
    with pytest.raises(DriverError):
        ipam.address(pool)


def test_a_range_that_is_the_subnet(ipam: Driver) -> None:
    pool = ipam.pool("10.3.0.0/24", "10.3.0.0/24")
    assert len(ipam.pools()) == 1
    assert ipam.address(pool) == "10.3.0.1/24"


@pytest.mark.parametrize(
    ("pool", "sub", "words"),
    [
        ("10.4.0.0/24", "10.5.0.0/25", "--ip-range 10.5.0.0/25 does not lie in --subnet 10.4.0.0/24"),
        ("10.4.0.0/24", "10.4.0.0/16", "does not lie in"),
        ("10.4.0.0/24", "fd00::/64", "does not lie in"),
        ("10.4.0.7/24", "", "--subnet 10.4.0.7/24: "),
        ("ten", "", "--subnet ten: "),
        ("10.4.0.0/24", "ten", "--ip-range ten: "),
    ],
)
def test_what_is_no_pool(ipam: Driver, pool: str, sub: str, words: str) -> None:
    with pytest.raises(DriverError) as refused:
        ipam.pool(pool, sub)
    assert words in str(refused.value)


@pytest.mark.parametrize("other", ["10.5.0.0/24", "10.5.0.0/25", "10.0.0.0/8", "10.5.0.128/25"])
def test_what_overlaps_is_refused(ipam: Driver, other: str) -> None:
    ipam.pool("10.5.0.0/24")
    with pytest.raises(DriverError, match=f"pool {other} overlaps with 10.5.0.0/24, which another network has"):
        ipam.pool(other)
    assert ipam.pools() == ["docker-10.5.0.0_24"]


def test_a_free_one_is_chosen_that_no_route_and_no_network_has(ipam: Driver, routes: list[Route]) -> None:
    routes += [
        Route(ip_network("172.17.0.0/16")),
        Route(ip_network("172.18.5.0/24")),
        Route(ip_network("172.20.0.1/32")),
    ]
    ipam.pool("172.19.128.0/17")
    assert ipam.subnet() == "172.21.0.0/16"
    # Docker asks again for as long as it finds the answer in use.
    assert ipam.subnet() == "172.22.0.0/16"
    routes.append(Route(ip_network("172.0.0.0/8")))
    assert ipam.subnet() == "192.168.0.0/20"
    routes.append(Route(ip_network("192.0.0.0/8")))
    with pytest.raises(DriverError, match="none of the 31 default pools is free of other networks and of this host's"):
        ipam.subnet()


def test_default_pools_of_the_operators_choice(ipam: Driver, state: State, routes: list[Route]) -> None:
    def driver(*pools: str) -> Driver:
        chosen = Driver(state, ipam.client)
        chosen.driver = IpamDriver(state, lambda: ipam.client, lambda: None, pools)  # type: ignore[arg-type, return-value]
        return chosen

    routes.append(Route(ip_network("10.200.1.0/24")))
    few = driver("10.200.0.0/22,24", "10.201.0.0/16")
    assert [few.subnet() for _ in range(4)] == ["10.200.0.0/24", "10.200.2.0/24", "10.200.3.0/24", "10.201.0.0/16"]
    for wrong in (
        "ten",
        "10.0.0.1/8",
        "10.0.0.0/8,7",
        "10.0.0.0/8,31",
        "10.0.0.0/8,x",
        "fd00::/48,64",
        "10.0.0.0/8,25",
    ):
        with pytest.raises(DriverError, match=f"--default-pool {wrong.partition(',')[0]}"):
            driver(wrong)
    assert len(driver(*DEFAULT_POOLS).driver._default_pools) == 31


def test_ipv6(ipam: Driver) -> None:
    pool = ipam.pool("fd00:6::/64", v6=True)
    assert ipam.address(pool, gateway=True) == "fd00:6::1/64"
    assert ipam.address(pool, "FD00:6:0::77") == "fd00:6::77/64"
    assert ipam.address(pool) == "fd00:6::2/64"
    ipam.release(pool, "fd00:6:0:0::77")
    assert "fd00:6::77/64" not in ipam.held()
    with pytest.raises(DriverError, match="an IPv6 pool needs --subnet"):
        ipam.pool(v6=True)


def test_dockerd_starts_again_and_asks_for_what_it_has(ipam: Driver) -> None:
    pool = ipam.pool("10.7.0.0/16", "10.7.1.0/24")
    ipam.address(pool, "10.7.0.1", gateway=True)
    container = ipam.address(pool)
    outside = ipam.address(pool, "10.7.9.9")
    before = ipam.held()
    ipam.driver.activate()
    assert ipam.pool("10.7.0.0/16", "10.7.1.0/24") == pool
    assert ipam.address(pool, "10.7.0.1", gateway=True) == "10.7.0.1/16"
    assert ipam.address(pool, container.partition("/")[0]) == container
    assert ipam.address(pool, "10.7.9.9") == outside
    assert ipam.held() == before
    # Once each: from then on it is somebody else's wish.
    for address in ("10.7.0.1", "10.7.9.9", container.partition("/")[0]):
        with pytest.raises(DriverError):
            ipam.address(pool, address)
    with pytest.raises(DriverError, match="overlaps with"):
        ipam.pool("10.7.0.0/16", "10.7.1.0/24")


def test_after_our_own_restart_docker_does_not_ask_again(ipam: Driver, state: State) -> None:
    pool = ipam.pool("10.8.0.0/24")
    ipam.address(pool, gateway=True)
    given = ipam.address(pool)
    again = Driver(state, ipam.client)
    again.driver.recover()
    with pytest.raises(DriverError):
        again.address(pool, given.partition("/")[0])
    with pytest.raises(DriverError, match="overlaps"):
        again.pool("10.8.0.0/24")
    again.release(pool, given.partition("/")[0])
    assert again.held() == ["10.8.0.1/24"]


def test_a_pool_that_was_asked_for_when_the_shim_died_is_given_again(ipam: Driver, state: State) -> None:
    pool = ipam.pool("10.8.0.0/24")
    again = Driver(state, ipam.client)
    again.driver.recover()
    assert again.pool("10.8.0.0/24") == pool


def test_a_dockerd_that_starts_while_ipamd_is_away(
    ipam: Driver, daemon: Daemon, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activate must not fail: Docker would take us for no driver until its next start."""
    pool = ipam.pool("10.8.0.0/24")
    given = ipam.address(pool)
    with Client(f"{daemon.directory}/nobody.sock", timeout_s=0.2) as away:
        driver = Driver(state, ipam.client)
        driver.driver._client = lambda: away
        driver.driver.activate()
        with pytest.raises(DriverError, match="ipamd"):
            driver.address(pool, given.partition("/")[0])
        driver.driver._client = lambda: ipam.client
        assert driver.address(pool, given.partition("/")[0]) == given


def ended(pool: str, address: str) -> Ended:
    return Ended(f"{pool}.{address}", pool, address)


def test_what_docker_could_not_give_back_is_taken_back_by_who_wants_it(ipam: Driver, state: State) -> None:
    pool = ipam.pool("10.8.0.0/24", "10.8.0.8/31")
    assert {ipam.address(pool), ipam.address(pool)} == {"10.8.0.8/24", "10.8.0.9/24"}
    with pytest.raises(DriverError):
        ipam.address(pool)
    state.put(ended(pool, "10.8.0.9"))
    assert ipam.address(pool) == "10.8.0.9/24"  # as no other is left
    with pytest.raises(DriverError):
        ipam.address(pool)
    state.put(ended(pool, "10.8.0.8"))
    assert ipam.address(pool, "10.8.0.8") == "10.8.0.8/24"  # as this one is asked for
    with pytest.raises(DriverError):
        ipam.address(pool, "10.8.0.8")
    assert list(state.all(Ended)) == []
    # By another shim, which has not given them.
    again = Driver(state, ipam.client)
    state.put(ended(pool, "10.8.0.8"))
    assert again.address(pool) == "10.8.0.8/24"


def test_a_release_that_comes_after_the_address_was_taken_back_is_the_old_ones(ipam: Driver, state: State) -> None:
    pool = ipam.pool("10.8.0.0/24")
    ipam.address(pool, "10.8.0.5")
    state.put(ended(pool, "10.8.0.5"))
    ipam.address(pool, "10.8.0.5")
    ipam.release(pool, "10.8.0.5")
    assert ipam.held() == ["10.8.0.5/24"]
    state.put(ended(pool, "10.8.0.5"))  # the new one's endpoint
    ipam.release(pool, "10.8.0.5")
    assert ipam.held() == []
    assert list(state.all(Ended)) == []
    # One that ended without a late release: the next is its own.
    for _ in range(2):
        ipam.address(pool, "10.8.0.5")
        state.put(ended(pool, "10.8.0.5"))
    ipam.address(pool, "10.8.0.5")
    state.put(ended(pool, "10.8.0.5"))
    ipam.release(pool, "10.8.0.5")
    assert ipam.held() == []


def test_what_was_released_otherwise_is_not_taken_from_who_has_it_now(ipam: Driver, state: State) -> None:
    pool = ipam.pool("10.8.0.0/24", "10.8.0.8/32")
    state.put(ended(pool, "10.8.0.8"))
    assert ipam.address(pool) == "10.8.0.8/24"
    with pytest.raises(DriverError):
        ipam.address(pool)


def test_an_address_is_released_when_nobody_has_it_any_more(ipam: Driver, state: State) -> None:
    """And whoever asks for one waits for that."""
    gone = threading.Event()
    driver = Driver(state, ipam.client)
    driver.driver._before_release = lambda _: None if gone.wait(30) else pytest.fail("never")
    pool = driver.pool("10.8.0.0/24", "10.8.0.8/32")
    driver.address(pool)
    driver.release(pool, "10.8.0.8")
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(driver.address, pool)
        assert wait([waiting], timeout=0.2).done == set()
        gone.set()
        assert waiting.result(30) == "10.8.0.8/24"


def test_a_release_that_fails_is_told(
    ipam: Driver, daemon: Daemon, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ipam.pool("10.8.0.0/24")
    ipam.address(pool)
    state.put(ended(pool, "10.8.0.1"))
    with Client(f"{daemon.directory}/nobody.sock", timeout_s=0.2) as away:
        ipam.driver._client = lambda: away
        ipam.release(pool, "10.8.0.1")
        ipam.driver.settle()
    ipam.driver._client = lambda: ipam.client
    assert "not released" in caplog.text
    assert ipam.address(pool, "10.8.0.1") == "10.8.0.1/24"  # it is known all the same


def test_what_the_comparison_removes(ipam: Driver) -> None:
    pool = ipam.pool("10.9.0.0/16", "10.9.1.0/24")
    ipam.address(pool, gateway=True)
    ipam.address(pool)
    ipam.address(pool, "10.9.7.7")
    pools, addresses = ipam.driver.owned()
    assert pools == {pool: "10.9.0.0/16"}
    assert addresses == {(pool, "10.9.1.0"), (f"{pool}.rest", "10.9.7.7")}
    for name, address in addresses:
        ipam.driver.discard_address(name, address)
        ipam.driver.discard_address(name, address)
    assert ipam.held() == ["10.9.0.1/16"]
    ipam.driver.discard_pool(pool)
    ipam.driver.discard_pool(pool)
    assert (ipam.held(), ipam.pools(), ipam.driver.owned()) == ([], [], ({}, set()))


def test_many_at_once(ipam: Driver, daemon: Daemon, state: State) -> None:
    pool = ipam.pool("10.10.0.0/24")
    with ThreadPoolExecutor(8) as executor:
        given = list(executor.map(lambda _: ipam.address(pool), range(40)))
    assert len(set(given)) == 40


class Overlay:
    """ipamd's client, for which a pool is that of an overlay network."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.network = pb.Network(
            name="ov1",
            type="overlay",
            subnets=["10.70.0.0/24", "fd00:70::/64"],
            gateways=["10.70.0.1/24", "fd00:70::1/64"],
            pool="ov1",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def list_networks(self) -> list[pb.Network]:
        return [self.network]

    def get_network(self, name: str) -> pb.Network:
        return self.network if name == "ov1" else self._client.get_network(name)


@pytest.fixture
def overlay(daemon: Daemon, state: State, routes: list[Route]) -> Iterator[Driver]:
    with daemon.client() as client:
        spec = pb.PoolSpec(cooldown_ms=0)
        for subnet in ("10.70.0.0/24", "fd00:70::/64"):
            spec.range_sets.add(ranges=[pb.Range(subnet=subnet)])
        client.create_pool("ov1", spec)
        one = Driver(state, Overlay(client))  # type: ignore[arg-type]
        yield one
        one.driver.settle()
        for held in list(client.list_allocations(pb.ListAllocationsRequest(client=CLIENT))):
            client.release(held.key)
        client.delete_pool("ov1")


def test_an_overlays_pool_is_ipamds_own(overlay: Driver, state: State) -> None:
    asked = RequestPool("netloom", "10.70.0.0/24", "", {"network": "ov1"})
    answer = overlay.driver.request_pool(asked)
    assert answer == {"PoolID": "overlay-ov1-4", "Pool": "10.70.0.0/24", "Data": {}}
    assert overlay.driver.request_pool(asked) == answer  # another network of Docker's, for a moment
    assert overlay.pool("10.70.0.0/24") == "overlay-ov1-4"  # its subnet says it, too
    six = overlay.pool("fd00:70::/64", v6=True)
    assert six == "overlay-ov1-6"
    assert list(state.all(Pool)) == []
    for gateway in ("", "10.70.0.1"):
        assert overlay.address("overlay-ov1-4", gateway, gateway=True) == "10.70.0.1/24"
    assert overlay.address(six, gateway=True) == "fd00:70::1/64"
    assert overlay.held() == []
    # Docker asks for each family by itself.
    assert overlay.address("overlay-ov1-4") == "10.70.0.2/24"
    assert overlay.address(six) == "fd00:70::2/64"
    assert overlay.address("overlay-ov1-4", "10.70.0.99") == "10.70.0.99/24"
    with pytest.raises(DriverError, match=r"10\.70\.0\.99"):
        overlay.address("overlay-ov1-4", "10.70.0.99")
    with pytest.raises(DriverError, match=r"10\.71\.0\.9 does not lie in"):
        overlay.address("overlay-ov1-4", "10.71.0.9")
    for address in ("10.70.0.1", "10.70.0.2", "10.70.0.99"):
        overlay.release("overlay-ov1-4", address)
    overlay.drop("overlay-ov1-4")
    assert overlay.held() == ["fd00:70::2/64"]
    assert [pool.name for pool in overlay.client.list_pools()] == ["ov1"]


def test_a_new_dockerd_asks_for_an_overlays_addresses_again(overlay: Driver) -> None:
    pool = overlay.pool("10.70.0.0/24")
    first = overlay.address(pool)
    overlay.driver.activate()
    assert overlay.pool("10.70.0.0/24") == pool
    assert overlay.address(pool, "10.70.0.1", gateway=True) == "10.70.0.1/24"
    assert overlay.address(pool, first.partition("/")[0]) == first
    with pytest.raises(DriverError, match=r"10\.70\.0\.2"):
        overlay.address(pool, first.partition("/")[0])
    assert overlay.held() == [first]


def test_an_overlays_address_that_docker_could_not_give_back(overlay: Driver, state: State) -> None:
    pool = overlay.pool("10.70.0.0/24")
    overlay.address(pool, "10.70.0.9")
    state.put(Ended("overlay-ov1-4.10.70.0.9", pool, "10.70.0.9"))
    assert overlay.address(pool, "10.70.0.9") == "10.70.0.9/24"
    assert list(state.all(Ended)) == []
    state.put(Ended("overlay-ov1-4.10.70.0.9", pool, "10.70.0.9"))
    overlay.driver.discard_address("ov1", "10.70.0.9")
    assert (overlay.held(), list(state.all(Ended))) == ([], [])


def test_what_is_no_overlays_pool(overlay: Driver) -> None:
    def refused(text: str, pool: str = "", sub: str = "", network: str = "ov1", v6: bool = False) -> None:
        options = {"network": network} if network else {}
        with pytest.raises(DriverError, match=text):
            overlay.driver.request_pool(RequestPool("netloom", pool, sub, options, v6))

    refused("ov9: netloom has none of this name; make it first: netloom network create ov9", network="ov9")
    refused("--subnet 10.9.0.0/24: overlay network ov1 has 10.70.0.0/24 and fd00:70::/64", "10.9.0.0/24")
    refused("--ip-range 10.70.0.0/28: .* leave it out", "10.70.0.0/24", "10.70.0.0/28")
    refused("overlaps with 10.70.0.0/24, which overlay network ov1 has", "10.70.0.0/16", network="")
    with pytest.raises(DriverError, match=r"--gateway 10\.70\.0\.7: overlay network ov1 has 10\.70\.0\.1 on every"):
        overlay.address(overlay.pool("10.70.0.0/24"), "10.70.0.7", gateway=True)
    # Docker asks for ever where it does not take what it is offered.
    offer = {"options": {"network": "ov1"}}
    for _ in range(2):
        assert overlay.subnet(**offer) == "10.70.0.0/24"
        refused("Docker does not take 10.70.0.0/24 of overlay network ov1 by itself.* add --subnet 10.70.0.0/24")
    assert overlay.subnet(**offer) == "10.70.0.0/24"
    overlay.address("overlay-ov1-4", gateway=True)  # it took it
    assert overlay.subnet(**offer) == "10.70.0.0/24"
    overlay.drop("overlay-ov1-4")


def test_no_default_pool_is_an_overlays(overlay: Driver) -> None:
    overlay.client.network.subnets[0] = "172.17.0.0/16"  # type: ignore[attr-defined]
    pool = overlay.pool()
    assert pool == "docker-172.18.0.0_16"
    overlay.drop(pool)
