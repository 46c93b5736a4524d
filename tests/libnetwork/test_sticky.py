"""For whom an address is, and who waits for whom; Docker is played: it holds no two locks just when a test wants it.

What the real Docker makes of it: tests/docker/test_sticky.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from libnetwork import docker
from libnetwork.docker import Container, Place
from libnetwork.messages import Asked
from libnetwork.options import NetworkOptions
from libnetwork.state import Endpoint, Network, Pool, Problem, State
from libnetwork.sticky import Flights, Wish, wish_of
from tests.hosts import wait_until

WEB, TWO, PLAIN = "a1" * 32, "b2" * 32, "c3" * 32
POOL, POOL6, POOL_TWO = "docker-10.1.0.0_24", "docker-fd00.._64", "docker-10.2.0.0_24"


def post(uri: str, body: Any = None) -> Asked:
    return Asked("POST", uri, json.dumps(body).encode() if body is not None else None)


def test_which_requests_may_want_an_address() -> None:
    connect = {"Container": "web", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.1.0.7"}}}
    for asked, wish in {
        post("/v1.41/containers/web/start"): Wish("start", "web"),
        post("/containers/web/start?detachKeys=ctrl-x"): Wish("start", "web"),
        post("/v1.41/containers/w%65b/restart?t=5"): Wish("restart", "web"),
        post("/v1.41/networks/my%20net/connect", connect): Wish("connect", "web", "my net", ("10.1.0.7",)),
        post("/networks/n/connect", {"Container": "c", "EndpointConfig": None}): Wish("connect", "c", "n"),
        post("/v1.41/build?t=x&networkmode=ov1"): Wish("build"),
        post("/v1.41/build?t=x&networkmode=default"): None,
        post("/v1.41/build?t=x"): None,
        post("/v1.41/containers/web/stop"): None,
        post("/v1.41/containers/create?name=start"): None,
        post("/networks/n/connect"): None,
        post("/containers/%ff/start"): None,
        post(""): None,
        Asked("GET", "/containers/web/start"): None,
    }.items():
        assert wish_of(asked) == wish, asked


class Desk:
    """Flights, and the Docker that they ask."""

    def __init__(self, state: State, monkeypatch: pytest.MonkeyPatch, sure: bool = True) -> None:
        self.now = 1000.0
        self.away = False
        self.there: dict[str, Container] = {}
        self.locked: set[str] = set()
        self.state = state
        self.flights = Flights(state, "", clock=lambda: self.now, patience_s=30)
        monkeypatch.setattr("libnetwork.docker.containers", self._containers)
        monkeypatch.setattr("libnetwork.docker.find_container", self._find)
        monkeypatch.setattr("libnetwork.docker.network", self._network)
        monkeypatch.setattr("libnetwork.docker.is_let_alone", lambda _path, id, _timeout: id not in self.locked)  # noqa: A006
        options = NetworkOptions(sticky=True)
        state.put(Network(WEB, options, ("10.1.0.0/24", "fd00::/64"), ()))
        state.put(Network(TWO, options, ("10.2.0.0/24",), ()))
        state.put(Network(PLAIN, NetworkOptions(), ("10.3.0.0/24",), ()))
        for pool, cidr in ((POOL, "10.1.0.0/24"), (POOL6, "fd00::/64"), (POOL_TWO, "10.2.0.0/24")):
            state.put(Pool(pool, cidr))
        if sure:
            self.flights.activate()
        asyncio.run(self.flights.before(Asked("GET", "/_ping")))

    def container(self, name: str, *networks: str, state: str = "exited", **places: Place) -> None:
        there = {network[:2]: Place(network, f"{name}-{network[:2]}") for network in networks}
        self.there[name] = Container(f"id-{name}", name, state, there | places)
        for network in networks:
            self.state.put(Endpoint(f"{name}-{network[:2]}", network, (), "", ""))

    def _containers(self, _: str, **filters: list[str]) -> list[Container]:
        if self.away:
            raise docker.DockerAwayError("Docker at : refused")
        return [one for one in self.there.values() if one.state in filters["status"]]

    def _find(self, _: str, name: str) -> Container | None:
        if self.away:
            raise docker.DockerAwayError("Docker at : refused")
        return self.there.get(name)

    def _network(self, _: str, name: str) -> docker.Network | None:
        return docker.Network({"web": WEB, "two": TWO}[name], name) if name in ("web", "two") else None

    def is_blocked(self, coming: Coroutine[Any, Any, None]) -> bool:
        """Whether somebody has to wait, who then goes on."""

        async def wait() -> bool:
            task = asyncio.ensure_future(coming)
            while not task.done():
                await asyncio.sleep(0)
                waiting = [one for one in self.flights._queue if not one.goes]
                if waiting:
                    self.flights._hurry(waiting[-1])
                    await task
                    return True
            return False

        return asyncio.run(wait())

    def start(self, name: str, verb: str = "start") -> bool:
        """`is_blocked`."""
        return self.is_blocked(self.flights.before(post(f"/v1.41/containers/{name}/{verb}")))

    def who(self, *pools: str) -> str:
        """For whom these are, who then is attached with them; its name."""
        (name,) = {self.flights.who(pool) for pool in pools}
        given = [(pool, str(number)) for number, pool in enumerate(pools)]
        for pool, address in given:
            self.flights.given(pool, address, name)
        for network in (WEB, TWO):
            self.flights.joined(network, [address for _, address in given])
        return name

    def over(self, name: str, verb: str = "start") -> None:
        body = {"RequestMethod": "POST", "RequestUri": f"/v1.41/containers/{name}/{verb}", "ResponseStatusCode": 204}
        self.flights.after(json.dumps(body).encode())


@pytest.fixture
def desk(state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    made = Desk(state, monkeypatch)
    yield made
    made.flights.close()


def test_one_start(desk: Desk) -> None:
    desk.container("web", WEB, TWO)
    assert not desk.start("web")
    assert desk.flights.who("docker-10.3.0.0_24") == ""
    assert desk.who(POOL, POOL6) == desk.who(POOL_TWO) == "web"
    assert desk.flights.who(POOL) == ""  # it has one
    desk.over("web")
    assert not desk.start("web")
    desk.over("web")
    assert desk.flights.who(POOL) == ""
    assert desk.flights._flights == [] and desk.flights._queue == []


def test_a_network_by_its_name_and_addresses_that_are_named(desk: Desk) -> None:
    desk.container("web", two=Place(), web=Place(named=("10.1.0.9",)), gone=Place())
    assert not desk.start("web")
    assert desk.flights.who(POOL) == ""
    assert desk.who(POOL6) == desk.who(POOL_TWO) == "web"
    # It wants no other, so it keeps nobody waiting who does.
    desk.container("other", WEB)
    desk.container("both", web=Place(named=("10.1.0.9", "fd00::9")))
    assert not desk.start("other")
    assert not desk.start("both")
    assert desk.flights.who(POOL) == "other"


def test_they_go_one_after_the_other(desk: Desk) -> None:
    desk.container("one", WEB, TWO)
    desk.container("two", TWO)
    desk.container("web", WEB)
    assert not desk.start("one")
    assert desk.start("two")
    desk.locked = {"id-one", "id-two"}
    assert desk.flights.who(POOL_TWO) == ""  # it waited in vain, and now they are two
    desk.locked = {"id-two"}
    assert desk.who(POOL_TWO) == "two"  # the other one is not being started: Docker told of it
    assert desk.who(POOL, POOL6) == "one"
    assert not desk.start("web")  # nobody else wants one of these any more
    assert desk.flights.who(POOL) == "web"
    for name in ("one", "two", "web"):
        desk.over(name)
    assert desk.flights._flights == []


def test_one_that_is_being_attached_keeps_nobody_waiting(desk: Desk) -> None:
    desk.container("one", WEB, TWO)
    desk.container("two", TWO, WEB)
    assert not desk.start("one")
    assert desk.flights.who(POOL) == "one"
    desk.flights.given(POOL, "10.1.0.2", "one")
    assert desk.start("two")  # the other family is still to come
    desk.over("two")
    assert desk.flights.who(POOL6) == "one"
    desk.flights.given(POOL6, "fd00::2", "one")
    assert not desk.start("two")
    desk.locked = {"id-one", "id-two"}
    assert desk.flights.who(POOL_TWO) == "two"  # and not one's, though that wants one there, too
    desk.flights.given(POOL_TWO, "10.2.0.2", "two")
    desk.flights.joined(TWO, ["10.2.0.3"])  # nobody's
    desk.flights.joined(PLAIN, ["10.2.0.2"])
    desk.flights.joined(TWO, ["10.2.0.2"])
    desk.flights.joined(WEB, ["10.1.0.2", "fd00::2"])  # nobody else who may ask for one wants its other one any more
    assert desk.who(POOL_TWO) == "one"


def test_whoever_was_attached_takes_its_turn(desk: Desk) -> None:
    desk.container("one", WEB, TWO)
    desk.container("two", TWO)
    assert not desk.start("one")
    desk.flights.who(POOL)
    desk.flights.who(POOL6)
    desk.flights.given(POOL6, "fd00::2", "one")
    assert not desk.start("two")
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(desk.flights.joined, WEB, ["fd00::2"])
        wait_until(lambda: not desk.flights._queue[0].goes, "its turn")
        assert not going_on.done()
        assert desk.who(POOL_TWO) == "two"
        going_on.result(30)
    assert desk.who(POOL_TWO) == "one"


def test_not_too_many_go_at_once(desk: Desk) -> None:
    """Each of them may keep a thread waiting that serves Docker's calls."""
    for number in range(20):
        desk.container(f"c{number}", WEB, TWO)
    for number in range(8):
        assert not desk.start(f"c{number}")
        assert desk.flights.who(POOL) == desk.flights.who(POOL6) == f"c{number}"
    assert desk.start("c8")
    for number in range(9):
        desk.over(f"c{number}")
    assert not desk.start("c9")


def test_whoever_is_over_keeps_nobody_waiting(desk: Desk) -> None:
    desk.container("one", WEB)
    desk.container("two", WEB)
    assert not desk.start("one")
    assert not desk.start("one")  # the same again: Docker does one after the other
    desk.over("one")
    desk.over("one")
    assert not desk.start("two")
    desk.over("two")
    # One of whose end Docker does not tell.
    assert not desk.start("one")
    desk.now += 60
    assert not desk.start("two")
    assert desk.flights.who(POOL) == "two"


def test_a_connect(desk: Desk) -> None:
    desk.container("web", WEB, state="running")
    desk.container("still", WEB)

    def connect(name: str, **named: str) -> bool:
        body = {"Container": name, "EndpointConfig": {"IPAMConfig": named}}
        return desk.is_blocked(desk.flights.before(post("/networks/two/connect", body)))

    assert not connect("web", IPv4Address="10.2.0.9")
    assert desk.flights.who(POOL_TWO) == ""
    assert not connect("web")
    assert desk.flights.who(POOL_TWO) == "web"
    body = json.dumps({"Container": "web", "EndpointConfig": {"IPAMConfig": {}}}).encode()
    over = {"RequestMethod": "POST", "RequestUri": "/networks/two/connect"}
    desk.flights.after(json.dumps(over).encode())
    assert len(desk.flights._flights) == 1
    over |= {"RequestBody": base64.b64encode(body).decode()}
    desk.flights.after(json.dumps(over).encode())
    assert desk.flights._flights == []
    # One that does not run yet: Docker notes it for a start that is under way, or does it when that is over.
    assert not desk.start("still")
    assert not connect("still")
    body = json.dumps({"Container": "still", "EndpointConfig": {"IPAMConfig": {}}}).encode()
    desk.flights.after(json.dumps(over | {"RequestBody": base64.b64encode(body).decode()}).encode())
    assert len(desk.flights._flights) == 1
    assert desk.who(POOL, POOL6) == desk.who(POOL_TWO) == "still"
    assert not any(one.wants for one in desk.flights._queue)


def test_a_restart_takes_its_turn_when_its_endpoint_goes(desk: Desk) -> None:
    desk.container("slow", WEB, TWO, state="running")
    desk.container("quick", WEB)
    assert not desk.start("slow", "restart")
    assert not desk.start("quick")
    assert desk.flights.who(POOL) == "quick"
    with ThreadPoolExecutor(1) as pool:
        desk.flights.leaves("nobody's")
        leaving = pool.submit(desk.flights.leaves, "slow-b2")
        wait_until(lambda: desk.flights._queue[-1].name == "slow", "its turn")
        assert not leaving.done()  # its other family
        assert desk.who(POOL6) == "quick"
        leaving.result(30)
    desk.flights.leaves("slow-a1")
    assert desk.who(POOL, POOL6) == "slow"
    desk.over("slow", "restart")
    desk.container("died", WEB, state="running")  # between Docker's answer and now
    desk.state.put(Endpoint("died-a1", WEB, (), "", "", ended=True))
    assert not desk.start("died", "restart")
    assert desk.flights.who(POOL) == "died"
    desk.over("died", "restart")
    desk.container("off", WEB)
    assert not desk.start("off", "restart")  # nothing goes first
    assert desk.flights.who(POOL) == "off"


def test_what_docker_starts_by_itself(desk: Desk) -> None:
    desk.container("loop", WEB, state="restarting")
    desk.container("named", web=Place(WEB, named=("10.1.0.9",)), state="restarting")
    desk.container("elsewhere", PLAIN, state="restarting")
    desk.locked = {"id-loop"}
    assert desk.flights.who(POOL) == "loop"
    desk.container("web", WEB)
    assert not desk.start("web")
    desk.locked = {"id-web"}
    assert desk.flights.who(POOL) == "web"
    desk.over("web")
    assert not desk.start("web")
    desk.locked = {"id-web", "id-loop"}
    assert desk.flights.who(POOL) == ""
    desk.away = True
    assert desk.flights.who(POOL) == ""


@pytest.mark.parametrize("what", ["unknown", "away", "build"])
def test_a_request_that_may_start_anything(desk: Desk, what: str) -> None:
    desk.container("web", WEB)
    uri = "/build?networkmode=web" if what == "build" else "/containers/who/start"
    desk.away = what == "away"
    assert not desk.is_blocked(desk.flights.before(post(uri)))
    desk.away = False
    assert not desk.start("web")
    assert desk.flights.who(POOL) == ""
    desk.flights.after(json.dumps({"RequestMethod": "POST", "RequestUri": uri}).encode())
    assert desk.flights.who(POOL) == "web"
    desk.over("web")
    # Docker does not tell of its end.
    assert not desk.is_blocked(desk.flights.before(post(uri)))
    assert not desk.start("web")
    assert desk.flights.who(POOL) == ""
    desk.now += 3601
    assert desk.flights.who(POOL) == "web"


def test_what_a_shim_before_this_one_let_go(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(state, monkeypatch, sure=False)
    desk.container("web", WEB)
    assert not desk.start("web")
    assert desk.flights.who(POOL) == ""
    desk.now += 31
    assert desk.flights.who(POOL) == "web"
    desk.flights.close()


def test_a_new_dockerd(desk: Desk) -> None:
    desk.container("web", WEB)
    assert not desk.start("web")
    desk.flights.activate()
    desk.container("loop", WEB, state="restarting")
    assert desk.flights.who(POOL) == ""  # it does not serve yet, and would not answer
    assert desk.flights._flights == []
    assert not desk.start("web")
    desk.locked = {"id-web"}
    assert desk.flights.who(POOL) == "web"


def test_overlays(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(state, monkeypatch)
    for id, sticky in (("d4" * 32, None), ("e5" * 32, True), ("f6" * 32, False)):  # noqa: A001
        options = NetworkOptions("overlay", network=f"ov{id[0]}", sticky=sticky)
        state.put(Network(id, options, ("10.9.0.0/24",), ()))
    all_overlays = Flights(state, "", all_overlays=True)
    assert set(desk.flights._sticky()) == {WEB, TWO, "e5" * 32}
    assert set(all_overlays._sticky()) == {WEB, TWO, "d4" * 32, "e5" * 32}
    desk.container("web", "e5" * 32)
    assert not desk.start("web")
    assert desk.flights.who("overlay-ove-4") == "web"
    desk.flights.close()


def test_words_where_docker_does_not_ask(desk: Desk, state: State) -> None:
    state.put(Problem("ov1", "of an overlay"))
    desk.flights.tell()
    assert [one.id for one in state.all(Problem)] == ["ov1"]
    desk.flights.activate()
    desk.flights.tell()
    texts = [one.text for one in state.all(Problem) if one.id != "ov1"]
    assert len(texts) == 2
    assert all('"authorization-plugins": ["netloom"]' in text for text in texts)
    state.remove(Network, TWO)
    desk.flights.tell()
    assert sorted(one.id for one in state.all(Problem)) == ["ov1", f"sticky-{WEB}"]
    asyncio.run(desk.flights.before(Asked("GET", "/_ping")))
    desk.flights.tell()
    assert [one.id for one in state.all(Problem)] == ["ov1"]


def test_a_container_of_which_docker_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(docker.DockerAwayError):
        docker.is_let_alone("s", "web", 0.05)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        listening.listen()
        assert not docker.is_let_alone("s", "web", 0.05)
