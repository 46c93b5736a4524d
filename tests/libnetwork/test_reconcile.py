"""What is removed, when, and in which order; Docker and both drivers are played."""

from __future__ import annotations

from typing import Any

import pytest

from kernel.errors import Busy
from libnetwork.docker import DockerAwayError, Truth
from libnetwork.errors import DriverError
from libnetwork.messages import Collect
from libnetwork.reconcile import Reconciler


class Stage:
    """Both drivers' part that the comparison uses, Docker, and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.endpoints: set[str] = set()
        self.networks: set[str] = set()
        self.pools: dict[str, str] = {}
        self.addresses: set[tuple[str, str]] = set()
        self.truth: Truth | Exception = Truth()
        self.failing: dict[str, Exception] = {}
        self.done: list[str] = []
        self.ends = 0
        self.now = 1000.0
        monkeypatch.setattr("libnetwork.reconcile.time.monotonic", lambda: self.now)
        self.reconciler = Reconciler(self._look, self, self, grace_s=60.0)  # type: ignore[arg-type]

    def _look(self) -> Truth:
        self.done.append("look")
        if isinstance(self.truth, Exception):
            raise self.truth
        return self.truth

    def owned(self) -> Any:
        """Both drivers have a method of this name; they are asked in turn."""
        self.done.append("owned")
        first = self.done.count("owned") % 2 == 1
        return (set(self.endpoints), set(self.networks)) if first else (dict(self.pools), set(self.addresses))

    def end(self) -> None:
        """What Docker has deleted is not compared: it goes, whatever Docker says."""
        self.ends += 1

    def _discard(self, what: str) -> None:
        self.done.append(what)
        if what in self.failing:
            raise self.failing[what]

    def discard_endpoint(self, one: str) -> None:
        self._discard(f"endpoint {one}")
        self.endpoints.discard(one)

    def discard_network(self, one: str) -> None:
        self._discard(f"network {one}")
        self.networks.discard(one)

    def discard_address(self, name: str, address: str) -> None:
        self._discard(f"address {name} {address}")
        self.addresses.discard((name, address))

    def discard_pool(self, one: str) -> None:
        self._discard(f"pool {one}")
        del self.pools[one]

    def look(self, after_s: float) -> list[str]:
        """What one look, so much later, did."""
        self.now += after_s
        self.done.clear()
        self.reconciler.once()
        return [what for what in self.done if what not in ("look", "owned")]

    def fill(self) -> None:
        self.endpoints, self.networks = {"e"}, {"n"}
        self.pools, self.addresses = {"p": "10.1.0.0/24"}, {("p", "10.1.0.2")}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


ALL = ["endpoint e", "network n", "address p 10.1.0.2", "pool p"]


def test_what_docker_lacks_for_a_minute_is_removed_in_order(stage: Stage) -> None:
    stage.fill()
    assert stage.look(0) == []
    assert stage.look(59) == []
    assert stage.look(1) == ALL
    assert stage.look(1) == []


def test_ours_is_read_before_docker_is_asked(stage: Stage) -> None:
    """What Docker makes in between is in its answer, and not in what we compare."""
    stage.look(0)
    assert stage.done == ["owned", "owned", "look"]


def test_what_docker_has_stays(stage: Stage) -> None:
    stage.fill()
    stage.truth = Truth(frozenset("n"), frozenset("e"), frozenset({"10.1.0.0/24"}), frozenset({"10.1.0.2"}))
    for _ in range(3):
        assert stage.look(100) == []


def test_what_comes_back_meanwhile_begins_anew(stage: Stage) -> None:
    stage.endpoints = {"e"}
    assert stage.look(0) == []
    stage.truth = Truth(endpoints=frozenset("e"))
    assert stage.look(50) == []
    stage.truth = Truth()
    assert stage.look(50) == []
    assert stage.look(59) == []
    assert stage.look(2) == ["endpoint e"]


def test_nothing_while_docker_is_away(stage: Stage) -> None:
    stage.fill()
    stage.look(0)
    stage.truth = DockerAwayError("refused")
    for _ in range(3):
        with pytest.raises(DockerAwayError):
            stage.look(1000)
        assert stage.done == ["owned", "owned", "look"]
    assert stage.ends == 4


def test_a_thread_that_looks_forgets_what_was_missing_while_docker_was_away(stage: Stage) -> None:
    """dockerd that starts has no list yet of what it will have."""
    stage.fill()
    stage.look(0)
    stage.truth = DockerAwayError("refused")
    waits = iter([False, True])
    stage.reconciler._stop.wait = lambda _: next(waits)  # type: ignore[method-assign, assignment, misc]
    stage.reconciler._run()
    stage.truth = Truth()
    assert stage.look(1000) == []
    assert stage.look(60) == ALL


@pytest.mark.parametrize("error", [DriverError("no"), Busy("delete", 16), OSError(28, "full")])
def test_what_cannot_be_removed_does_not_keep_the_rest(stage: Stage, error: Exception) -> None:
    stage.fill()
    stage.look(0)
    stage.failing = {"endpoint e": error}
    assert stage.look(60) == ALL
    assert stage.look(20) == ["endpoint e"]
    stage.failing = {}
    assert stage.look(20) == ["endpoint e"]
    assert stage.look(20) == []


def test_a_look_that_is_asked_for_tells_what_it_did_and_what_it_suspects(stage: Stage) -> None:
    stage.endpoints = {"e"}
    stage.look(0)
    stage.networks = {"n"}
    stage.look(50)
    stage.now += 10
    ends = stage.ends
    would = stage.reconciler.collect(Collect(dry_run=True))
    assert stage.ends == ends
    assert would["Removed"] == [{"Kind": "endpoint", "Name": "e"}]
    assert would["Suspected"] == [{"Kind": "network", "Name": "n", "MissingS": 10.0}]
    assert stage.endpoints == {"e"}
    assert stage.reconciler.collect(Collect()) == would | {"GraceS": 60.0}
    assert stage.endpoints == set()
    stage.now += 1000
    stage.failing = {"network n": DriverError("no")}
    assert stage.reconciler.collect(Collect())["Suspected"] == [{"Kind": "network", "Name": "n", "MissingS": 1010.0}]


def test_a_look_that_is_asked_for_while_docker_is_away(stage: Stage) -> None:
    stage.truth = DockerAwayError("refused")
    with pytest.raises(DriverError, match="nothing was compared: refused"):
        stage.reconciler.collect(Collect())


def test_the_thread_survives_anything_and_says_each_thing_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    waits = iter([False, False, False, False, True])
    errors: list[Exception] = [
        DriverError("ipamd: away"),
        DriverError("ipamd: away"),
        KeyError("x"),
        DockerAwayError("d"),
    ]
    stage.reconciler._stop.wait = lambda _: next(waits)  # type: ignore[method-assign, assignment, misc]
    stage.reconciler._look = lambda: (_ for _ in ()).throw(errors.pop(0))
    stage.reconciler._run()
    told = [record.netloom_fields["error"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told == ["ipamd: away", "KeyError('x')", "d"]


def test_start_and_stop(stage: Stage) -> None:
    reconciler = Reconciler(stage._look, stage, stage, interval_s=600.0)  # type: ignore[arg-type]
    reconciler.start()
    reconciler.stop()
    assert stage.done == []
