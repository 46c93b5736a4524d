"""Plugins in order, as the CNI specification has it, with executables that note how they were called."""

from __future__ import annotations

from typing import Any

import pytest

from libnetwork.chain import Chain
from libnetwork.errors import DriverError
from tests.libnetwork.conftest import Plugins

BRIDGE = {"type": "bridge", "capabilities": {"mac": True, "ips": False}}


def chain(plugins: Plugins, *confs: dict[str, Any], timeout_s: float = 60.0) -> Chain:
    given = confs or (BRIDGE, {"type": "firewall"}, {"type": "portmap"})
    return Chain("web", given, ("/nonexistent", str(plugins.directory)), timeout_s=timeout_s)


def add(one: Chain, previous: Any = None) -> dict[str, Any]:
    return one.add("c1", "/run/netns/c1", "eth0", {"mac": "02:00:00:00:00:01", "portMappings": [1]}, previous, "A=1")


def test_add_in_order_each_with_the_result_before(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLOOM_CNI_SOCKET", "/somewhere")
    monkeypatch.setenv("SECRET", "of the shim's own")
    assert add(chain(plugins))["by"] == "portmap"
    assert plugins.calls() == ["ADD bridge", "ADD firewall", "ADD portmap"]
    assert plugins.conf(0) == {
        **BRIDGE,
        "name": "web",
        "cniVersion": "1.0.0",
        "runtimeConfig": {"mac": "02:00:00:00:00:01"},
    }
    assert plugins.conf(1)["prevResult"]["by"] == "bridge"
    assert plugins.conf(2)["prevResult"]["by"] == "firewall"
    assert "runtimeConfig" not in plugins.conf(1)
    seen = plugins.environment()
    assert {name: seen[name] for name in seen if name.startswith(("CNI_", "NETLOOM_"))} == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/c1",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "A=1",
        "CNI_PATH": f"/nonexistent:{plugins.directory}",
        "NETLOOM_CNI_SOCKET": "/somewhere",
    }
    assert "SECRET" not in seen


def test_chained_to_an_earlier_result(plugins: Plugins) -> None:
    add(chain(plugins, {"type": "portmap"}), {"by": "somebody"})
    assert plugins.conf(0)["prevResult"] == {"by": "somebody"}


def test_delete_in_reverse_with_the_whole_result(plugins: Plugins) -> None:
    chain(plugins).delete("c1", "", "eth0", {}, {"by": "all"})
    assert plugins.calls() == ["DEL portmap", "DEL firewall", "DEL bridge"]
    assert [plugins.conf(number)["prevResult"]["by"] for number in range(3)] == ["all"] * 3
    assert plugins.environment()["CNI_NETNS"] == ""


@pytest.mark.parametrize("failing", ["bridge", "firewall", "portmap"])
def test_a_failed_add_is_followed_by_del_of_all(plugins: Plugins, failing: str) -> None:
    plugins.refuse("ADD", failing, "no room", "10.1.0.0/24 is full")
    with pytest.raises(DriverError) as refused:
        add(chain(plugins))
    assert str(refused.value) == f"network web: plugin {failing} (add): no room: 10.1.0.0/24 is full"
    assert plugins.calls()[-3:] == ["DEL portmap", "DEL firewall", "DEL bridge"]
    assert len(plugins.calls()) == 4 + ["bridge", "firewall", "portmap"].index(failing)


def test_what_fails_to_be_undone_is_noted_and_the_rest_undone(plugins: Plugins) -> None:
    plugins.refuse("ADD", "portmap", "first")
    plugins.refuse("DEL", "firewall", "second")
    with pytest.raises(DriverError) as refused:
        add(chain(plugins))
    assert "first" in str(refused.value)
    assert refused.value.__notes__ == ["network web: plugin firewall (del): second"]
    assert plugins.calls()[-1] == "DEL bridge"


@pytest.mark.parametrize("printed", ["", "[]", "null", "{", '"text"', '{"a": "\\377"}'])
def test_what_is_no_result_is_a_failure_and_undone(plugins: Plugins, printed: str) -> None:
    plugins.script("ADD", "firewall", f"printf '%b' '{printed}'; exit 0")
    with pytest.raises(DriverError, match=r"plugin firewall \(add\): wanted a result, found"):
        add(chain(plugins))
    assert plugins.calls()[2:] == ["DEL portmap", "DEL firewall", "DEL bridge"]


@pytest.mark.parametrize("printed", ["oops", "{}", "[1]", '{"msg": ""}'])
def test_a_failure_without_words_has_status_and_standard_error(plugins: Plugins, printed: str) -> None:
    plugins.script("ADD", "bridge", f"echo '{printed}'; echo because >&2; exit 7")
    with pytest.raises(DriverError, match=r"plugin bridge \(add\): exit status 7: because"):
        add(chain(plugins))


def test_one_that_does_not_end(plugins: Plugins) -> None:
    plugins.script("ADD", "bridge", "exec sleep 600")
    with pytest.raises(DriverError, match=r"plugin bridge \(add\): .*timed out after 0.5 seconds"):
        add(chain(plugins, BRIDGE, timeout_s=0.5))
    assert plugins.calls()[-1] == "DEL bridge"


@pytest.mark.parametrize("kind", ["missing", "", "../bridge"])
def test_an_executable_that_is_not_there(plugins: Plugins, kind: str) -> None:
    with pytest.raises(DriverError) as refused:
        add(chain(plugins, BRIDGE, {"type": kind}))
    words = f"network web: plugin {kind!r} is in none of /nonexistent, {plugins.directory}; install it"
    assert str(refused.value) == words
    assert refused.value.__notes__ == [words]
    assert plugins.calls() == ["ADD bridge", "DEL bridge"]


def test_one_that_cannot_be_executed(plugins: Plugins) -> None:
    path = plugins.directory / "bridge"
    path.write_text("#!/nonexistent/interpreter\n")
    with pytest.raises(DriverError, match=r"plugin bridge \(add\): .*No such file"):
        add(chain(plugins))


def test_a_failed_del_does_not_keep_the_others_from_theirs(plugins: Plugins) -> None:
    plugins.refuse("DEL", "portmap", "one")
    plugins.refuse("DEL", "bridge", "two")
    with pytest.raises(DriverError) as refused:
        chain(plugins).delete("c1", "", "eth0", {}, {})
    assert str(refused.value) == ("network web: plugin portmap (del): one; network web: plugin bridge (del): two")
    assert len(plugins.calls()) == 3


def test_gc_asks_all_and_names_the_living(plugins: Plugins) -> None:
    plugins.refuse("GC", "bridge", "unknown command")
    with pytest.raises(DriverError, match="unknown command"):
        chain(plugins).gc([("c1", "eth0")])
    assert plugins.calls() == ["GC bridge", "GC firewall", "GC portmap"]
    assert plugins.conf(1)["cni.dev/valid-attachments"] == [{"containerID": "c1", "ifname": "eth0"}]
    assert plugins.conf(1)["cniVersion"] == "1.1.0"
