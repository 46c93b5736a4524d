"""The IPAM plugin `ipamd`: each verb in each spec version, each key, and days on which the daemon is away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from cni.versions import SUPPORTED
from protos.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from tests.cni.lab import FOUR, SIX, WITH_CHECK, Lab, both, net, pool
from tests.hosts import Host, Netns, wait_until

pytestmark = pytest.mark.kernel


def conf(version: str = "1.1.0", name: str = "net", **ipam: Any) -> dict[str, Any]:
    return {"cniVersion": version, "name": name, "type": "ipamd", "ipam": {"type": "ipamd", **ipam}}


def add(lab: Lab, document: dict[str, Any], container_id: str = "c1", **more: Any) -> list[str]:
    """The addresses that ADD gave."""
    answer = lab.cni("ADD", "ipamd", document, container_id=container_id, **{"netns": "/proc/self/ns/net", **more})
    return [str(ip["address"]) for ip in answer.result()["ips"]]


def delete(lab: Lab, document: dict[str, Any], *containers: str, **more: Any) -> None:
    for container_id in containers or ("c1",):
        lab.cni("DEL", "ipamd", document, container_id=container_id, **more).ok()


def refused(lab: Lab, document: dict[str, Any], container_id: str = "refused", **more: Any) -> dict[str, Any]:
    """The error object of an ADD that must fail and leave nothing."""
    before = lab.host.snapshot()
    answer = lab.cni("ADD", "ipamd", document, container_id=container_id, **{"netns": "/proc/self/ns/net", **more})
    if answer.status == 0:
        delete(lab, document, container_id)
    assert answer.code() > 0
    lab.host.assert_clean(before)
    error: dict[str, Any] = answer.json
    return error


def stub(lab: Lab) -> Any:
    import grpc  # noqa: PLC0415

    return ipam_pb2_grpc.IpamStub(grpc.insecure_channel(f"unix:{lab.host.path(lab.ipamd.socket)}"))


# Each verb in each version


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_verb(lab: Lab, version: str) -> None:
    document = {**net(version, ipam={**both(), "routes": [{"dst": "0.0.0.0/0"}]}), "type": "ipamd"}
    subnets = [entry["subnet"] for (entry,) in document["ipam"]["ranges"]]
    with lab.space() as netns:
        before = lab.host.snapshot()
        result = lab.cni("ADD", "ipamd", document, netns=netns).result()
        assert result["cniVersion"] == version
        if version in ("0.1.0", "0.2.0"):
            addresses = [result[key]["ip"] for key in ("ip4", "ip6") if key in result]
            assert result["ip4"]["routes"] == [{"dst": "0.0.0.0/0"}]
            assert set(result) <= {"cniVersion", "ip4", "ip6", "dns"}
        else:
            addresses = [ip["address"] for ip in result["ips"]]
            assert all("interface" not in ip for ip in result["ips"])
            assert all(("version" in ip) is (version not in ("1.0.0", "1.1.0")) for ip in result["ips"])
            assert result["routes"] == [{"dst": "0.0.0.0/0"}]
            assert "interfaces" not in result
        assert [str(ip_interface(address).network) for address in addresses] == subnets
        (held,) = lab.host.allocations()
        assert all(address in held for address in addresses)
        assert netns.path in held
        again = lab.cni("ADD", "ipamd", document, netns=netns).result()
        assert again == result
        checked = lab.cni("CHECK", "ipamd", {**document, "prevResult": result}, netns=netns)
        assert (checked.status == 0) is (version in WITH_CHECK)
        for verb in ("STATUS", "GC"):
            valid = [{"containerID": "c1", "ifname": "eth0"}]
            answer = lab.cni(verb, "ipamd", {**document, "cni.dev/valid-attachments": valid})
            assert (answer.status == 0) is (version == "1.1.0")
        assert len(lab.host.allocations()) == 1
        for _ in range(2):
            answer = lab.cni("DEL", "ipamd", document, netns=netns)
            answer.ok()
            assert answer.stdout == ""
        lab.host.assert_clean(before)
        assert set(netns.links()) == {"lo"}


# Where addresses come from


def test_a_named_pool(lab: Lab) -> None:
    api = stub(lab)
    spec = ipam_pb2.PoolSpec(excludes=["10.40.0.2"])
    spec.range_sets.add(ranges=[ipam_pb2.Range(subnet="10.40.0.0/29", gateway="10.40.0.6")])
    api.CreatePool(ipam_pb2.CreatePoolRequest(name="blue", spec=spec))
    spec = ipam_pb2.PoolSpec()
    spec.range_sets.add(ranges=[ipam_pb2.Range(subnet="10.41.0.0/29")])
    api.CreatePool(ipam_pb2.CreatePoolRequest(name="red", spec=spec))
    blue = conf(pool="blue")
    answer = lab.cni("ADD", "ipamd", blue, netns="/proc/self/ns/net")
    assert answer.result()["ips"] == [{"address": "10.40.0.1/29", "gateway": "10.40.0.6"}]
    # Another network may use the same pool; several pools give an address each.
    assert add(lab, conf(name="other", pools=["blue", "red"]), "c2") == ["10.40.0.3/29", "10.41.0.2/29"]
    error = refused(lab, conf(pool="green"))
    assert error["code"] == 7
    assert "green" in error["msg"]
    assert refused(lab, conf(pool="blue", subnet="10.1.0.0/16"))["code"] == 7
    assert refused(lab, conf(pool="blue", pools=["red"]))["code"] == 7
    delete(lab, blue)
    delete(lab, conf(name="other", pools=["blue", "red"]), "c2")
    for name in ("blue", "red"):
        api.DeletePool(ipam_pb2.DeletePoolRequest(name=name))


def test_host_locals_keys(lab: Lab) -> None:
    document = conf(
        name="legacy",
        subnet="10.50.0.0/24",
        rangeStart="10.50.0.20",
        rangeEnd="10.50.0.21",
        gateway="10.50.0.99",
        ranges=[[{"subnet": "10.51.0.0/24", "rangeStart": "10.51.0.7"}], [{"subnet": SIX}]],
    )
    answer = lab.cni("ADD", "ipamd", document, netns="/proc/self/ns/net").result()
    assert answer["ips"] == [
        {"address": "10.50.0.20/24", "gateway": "10.50.0.99"},
        {"address": "10.51.0.7/24", "gateway": "10.51.0.1"},
        {"address": "fd00:1::2/64", "gateway": "fd00:1::1"},
    ]
    assert add(lab, document, "c2")[0] == "10.50.0.21/24"
    error = refused(lab, document)
    assert error["code"] == 100
    delete(lab, document, "c1", "c2")


def test_a_set_of_several_ranges_gives_one_address(lab: Lab) -> None:
    document = conf(name="split", ranges=[[{"subnet": "10.52.0.0/30"}, {"subnet": "10.53.0.0/30"}]])
    assert [add(lab, document, f"c{n}") for n in range(2)] == [["10.52.0.2/30"], ["10.53.0.2/30"]]
    delete(lab, document, "c0", "c1")


def test_excluded_addresses(lab: Lab) -> None:
    document = conf(name="exclude", subnet="10.54.0.0/29", exclude=["10.54.0.2", "10.54.0.4/31"])
    given = [add(lab, document, f"c{n}")[0] for n in range(2)]
    assert given == ["10.54.0.3/29", "10.54.0.6/29"]
    assert refused(lab, document)["code"] == 100
    delete(lab, document, "c0", "c1")


@pytest.mark.parametrize("key", ["ipRanges", "IPRanges", "IpRanges"])
def test_the_capability_ip_ranges(lab: Lab, key: str) -> None:
    # containerd capitalises every key of runtimeConfig, and those inside it.
    inner = {"Subnet": "10.55.0.0/24", "RangeStart": "10.55.0.40", "Gateway": "10.55.0.9"}
    if key == "ipRanges":
        inner = {"subnet": "10.55.0.0/24", "rangeStart": "10.55.0.40", "gateway": "10.55.0.9"}
    document = {**conf(name=f"capable-{key}", subnet="10.56.0.0/24"), "runtimeConfig": {key: [[inner]]}}
    assert add(lab, document) == ["10.55.0.40/24", "10.56.0.2/24"]
    delete(lab, document)


@pytest.mark.parametrize(
    ("keys", "args"),
    [
        ({"runtimeConfig": {"ips": ["10.1.9.9"]}}, ""),
        ({"runtimeConfig": {"Ips": ["10.1.9.9/16"]}}, "IP=10.1.7.7"),
        # Twice the same, as podman's `network reload` says it.
        ({"runtimeConfig": {"ips": ["10.1.9.9", "10.1.9.9/16"]}}, ""),
        ({"runtimeConfig": {"IPs": ["10.1.9.9"]}, "args": {"cni": {"ips": ["10.1.8.8"]}}}, "IP=10.1.7.7"),
        ({"args": {"cni": {"ips": ["10.1.9.9"]}}}, "IP=10.1.7.7"),
        ({}, "IP=10.1.9.9"),
        ({}, "IP=10.1.9.9/16;IgnoreUnknown=1;K8S_POD_UID=x"),
        ({}, "IP=10.1.9.9;MAC=02:00:00:00:00:01"),
    ],
    ids=str,
)
def test_an_address_that_was_asked_for(lab: Lab, keys: dict[str, Any], args: str) -> None:
    document = {**conf(subnet=FOUR), **keys}
    assert add(lab, document, args=args) == ["10.1.9.9/16"]
    # Taken: who has it is told.
    error = refused(lab, document, args=args)
    assert error["code"] == 101
    assert "10.1.9.9" in error["msg"]
    assert "c1" in error["msg"]
    delete(lab, document, args=args)


def test_an_address_for_each_family(lab: Lab) -> None:
    document = {**conf(ranges=pool(FOUR, SIX)["ranges"]), "runtimeConfig": {"ips": ["fd00:1::77", "10.1.7.7"]}}
    assert add(lab, document) == ["10.1.7.7/16", "fd00:1::77/64"]
    delete(lab, document)
    half = {**document, "runtimeConfig": {"ips": ["fd00:1::77"]}}
    four, six = add(lab, half)
    assert six == "fd00:1::77/64"
    assert ip_interface(four).network == ip_network(FOUR)
    delete(lab, half)


@pytest.mark.parametrize("wanted", ["10.1.0.1", "10.2.0.5", "10.1.0.0", "10.1.255.255", "fd00::5"])
def test_addresses_that_nobody_gets(lab: Lab, wanted: str) -> None:
    document = {**conf(subnet=FOUR), "runtimeConfig": {"ips": [wanted]}}
    error = refused(lab, document)
    assert error["code"] in (7, 101)
    assert wanted in error["msg"]


@pytest.mark.parametrize("wanted", ["nonsense", "10.1.0.300", "10.1.0.5/99", "", 5, None, [], "10.1.0.5\n", "1e3"])
def test_what_is_no_address(lab: Lab, wanted: object) -> None:
    error = refused(lab, {**conf(subnet=FOUR), "runtimeConfig": {"ips": [wanted]}})
    assert error["code"] == 7
    assert "ips" in error["msg"]


POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=x"


@pytest.mark.parametrize(
    ("sticky", "more"),
    [
        (True, {"args": POD}),
        (True, {"args": "IgnoreUnknown=1;K8S_POD_NAME=web-0"}),
        ("label:app", {"labels": [{"key": "tier", "value": "x"}, {"key": "app", "value": "web"}]}),
        ("web-0", {}),
    ],
)
def test_a_workload_that_comes_back(lab: Lab, sticky: object, more: dict[str, Any]) -> None:
    document = conf(**pool(FOUR), sticky=sticky)
    if "labels" in more:
        document["args"] = {"cni": {"labels": more["labels"]}}
    args = {key: value for key, value in more.items() if key != "labels"}
    first = add(lab, document, "c1", **args)
    delete(lab, document, "c1", **args)
    other = add(lab, conf(**pool(FOUR)), "other")
    assert other != first
    assert add(lab, document, "c2", **args) == first
    delete(lab, document, "c2", "other", **args)


@pytest.mark.parametrize(
    ("sticky", "args", "text"),
    [
        (True, "IgnoreUnknown=1;K8S_POD_NAMESPACE=default", "a container id is no lasting name"),
        ("label:app", "", 'no label "app" in args.cni.labels'),
        ("", "", '$.ipam.sticky: ""'),
        ("label:", "", "$.ipam.sticky"),
        (7, "", "$.ipam.sticky"),
    ],
)
def test_a_workload_without_a_name(lab: Lab, sticky: object, args: str, text: str) -> None:
    document = conf(**pool(FOUR), sticky=sticky)
    error = refused(lab, document, args=args)
    assert error["code"] == 7
    assert text in error["msg"]
    delete(lab, document, "refused")


def test_what_stands_in_resolv_conf(lab: Lab) -> None:
    resolv = lab.host.path("/run/resolv.conf")
    resolv.write_bytes(
        b"# comment\nnameserver 192.0.2.53 # inline\n; another\nnameserver\t2001:db8::53\n\nnonsense\nnameserver\n"
        b"domain example.org\nsearch a.example b.example\noptions ndots:5 edns0\nbad \xff\xfe\n"
    )
    document = conf(subnet=FOUR, resolvConf="/run/resolv.conf")
    result = lab.cni("ADD", "ipamd", document, netns="/proc/self/ns/net").result()
    assert result["dns"] == {
        "nameservers": ["192.0.2.53", "2001:db8::53"],
        "domain": "example.org",
        "search": ["a.example", "b.example"],
        "options": ["ndots:5", "edns0"],
    }
    delete(lab, document)
    resolv.unlink()
    error = refused(lab, document)
    assert error["code"] == 7
    assert "resolvConf" in error["msg"]
    delete(lab, document)


def test_routes_are_handed_on(lab: Lab) -> None:
    routes = [
        {"dst": "0.0.0.0/0", "gw": "10.1.0.9"},
        {"dst": "192.0.2.0/24", "mtu": 1400, "advmss": 1360, "priority": 10, "table": 100, "scope": 0},
        {"dst": "2001:db8::/32"},
    ]
    document = conf(subnet=FOUR, routes=routes)
    result = lab.cni("ADD", "ipamd", document, netns="/proc/self/ns/net").result()
    assert result["routes"] == routes
    delete(lab, document)


NO_ROUTES: tuple[dict[str, Any], ...] = (
    *({"dst": "nonsense"}, {"dst": "10.0.0.0/33"}, {"dst": "10.0.0.1"}, {"dst": ""}, {}, {"gw": "10.1.0.1"}),
    *({"dst": "10.0.0.0/8", "gw": "x"}, {"dst": "10.0.0.0/8", "gw": "10.1.0.1/16"}, {"dst": "10.0.0.0/8", "mtu": -1}),
    *({"dst": "10.0.0.0/8", "table": 2**32}, {"dst": "10.0.0.0/8", "scope": 256}, {"dst": "10.0.0.0/8", "mtu": "x"}),
)


@pytest.mark.parametrize("route", NO_ROUTES, ids=json.dumps)
def test_routes_that_are_none(lab: Lab, route: dict[str, Any]) -> None:
    error = refused(lab, conf(subnet=FOUR, routes=[{"dst": "0.0.0.0/0"}, route]))
    assert error["code"] == 7
    assert "routes[1]" in error["msg"]


@pytest.mark.parametrize(
    "ipam",
    [
        {},
        {"subnet": "nonsense"},
        {"subnet": "10.1.0.5/16"},
        {"subnet": "10.1.0.0/33"},
        {"subnet": "10.1.0.0/32"},
        {"subnet": "10.1.0.0/16", "rangeStart": "10.2.0.1"},
        {"subnet": "10.1.0.0/16", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8"},
        {"subnet": "10.1.0.0/16", "gateway": "nonsense"},
        {"subnet": "10.1.0.0/16", "exclude": ["nonsense"]},
        {"ranges": [[]]},
        {"ranges": [[{"subnet": "10.1.0.0/16"}, {"subnet": "fd00::/64"}]]},
        {"ranges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "10.1.2.0/24"}]]},
        {"ranges": [{"subnet": "10.1.0.0/16"}]},
        {"ranges": "10.1.0.0/16"},
        {"subnet": 5},
        {"pool": 5},
        {"pool": "../x"},
        {"pools": "x"},
        {"subnet": "10.1.0.0/16", "timeout": 0},
        {"subnet": "10.1.0.0/16", "timeout": 1e9},
        {"subnet": "10.1.0.0/16", "timeout": "x"},
        {"subnet": "10.1.0.0/16", "socket": 5},
    ],
    ids=json.dumps,
)
def test_configurations_that_are_refused(lab: Lab, ipam: dict[str, Any]) -> None:
    document = conf(name="bad", **ipam)
    error = refused(lab, document)
    assert error["code"] == 7
    assert error["msg"]
    # DEL of what was refused succeeds all the same.
    delete(lab, document, "refused")


# Changes


def test_a_changed_range_is_taken_over(lab: Lab) -> None:
    name = "changing"
    small = conf(name=name, subnet="10.60.0.0/24", rangeEnd="10.60.0.3")
    assert [add(lab, small, f"c{n}") for n in range(2)] == [["10.60.0.2/24"], ["10.60.0.3/24"]]
    assert refused(lab, small)["code"] == 100
    large = conf(name=name, subnet="10.60.0.0/16")
    assert add(lab, large, "c2") == ["10.60.0.4/16"]
    # What was given stays as it is.
    assert add(lab, large, "c0")[0].startswith("10.60.0.2/")
    # A shrink that drops a taken address is refused, with its holder.
    error = refused(lab, small)
    assert error["code"] == 102
    assert "10.60.0.4" in error["msg"]
    assert "c2" in error["msg"]
    delete(lab, large, "c2")
    assert refused(lab, small)["code"] == 100
    delete(lab, small, "c0", "c1")
    moved = conf(name=name, subnet="10.61.0.0/24")
    assert add(lab, moved, "c3") == ["10.61.0.2/24"]
    delete(lab, moved, "c3")


def test_a_grown_network_under_the_bridge_keeps_its_masquerade(lab: Lab) -> None:
    small = net(isDefaultGateway=True, ipMasq=True, ipam=pool("10.62.3.0/24"))
    large = net(isDefaultGateway=True, ipMasq=True, forceAddress=True, ipam=pool("10.62.0.0/16"))
    with lab.attached(small) as old:
        with lab.attached(large) as new:
            new.check()
        assert not lab.host.path("/run/netloom/attachments/net").joinpath(f"{new.container_id}@eth0.bridge").exists()
        old.call("DEL").ok()


def test_exhausted_and_free_again(lab: Lab) -> None:
    document = conf(name="tiny", subnet="10.63.0.0/30")
    add(lab, document)
    error = refused(lab, document)
    assert error["code"] == 100
    assert "net" in error["msg"] or "tiny" in error["msg"]
    delete(lab, document)
    assert add(lab, document, "c2") == ["10.63.0.2/30"]
    delete(lab, document, "c2")


def test_networks_and_interfaces_are_apart(lab: Lab) -> None:
    one, two = conf(name="one", subnet="10.64.0.0/24"), conf(name="two", subnet="10.64.0.0/24")
    assert add(lab, one) == add(lab, two) == ["10.64.0.2/24"]
    assert add(lab, one, ifname="eth1") == ["10.64.0.3/24"]
    delete(lab, one)
    assert len(lab.host.allocations()) == 2
    delete(lab, two)
    delete(lab, one, ifname="eth1")


def test_a_request_id_is_in_both_logs(lab: Lab) -> None:
    error = refused(lab, conf(name="logged", pool="missing"))
    request_id = error["details"].removeprefix("request ")
    assert len(request_id) == 16
    assert request_id in lab.ipamd.log()


def test_a_result_that_is_not_what_ipamd_gave(lab: Lab) -> None:
    document = conf(subnet=FOUR)
    result = lab.cni("ADD", "ipamd", document, netns="/proc/self/ns/net").result()
    lab.cni("CHECK", "ipamd", {**document, "prevResult": result}, netns="/proc/self/ns/net").ok()
    for ips in ([{"address": "10.1.99.99/16"}], [*result["ips"], {"address": "10.1.99.99/16"}]):
        answer = lab.cni(
            "CHECK", "ipamd", {**document, "prevResult": {**result, "ips": ips}}, netns="/proc/self/ns/net"
        )
        assert answer.code() > 0
        assert "10.1.99.99" in answer.json["msg"]
    delete(lab, document)
    assert lab.cni("CHECK", "ipamd", {**document, "prevResult": result}, netns="/proc/self/ns/net").code() > 0


# Days on which the daemon is away


@pytest.fixture
def durable() -> Iterator[Lab]:
    """A host of its own, whose ipamd is stopped, killed and started, with its state on disk."""
    with Host() as host:
        host.start_ipamd(pools={"cooldown_s": 0}, reclaim={"interval_s": 1, "grace_s": 0})
        assert host._ipamd is not None
        lab = Lab(host, host._ipamd)
        lab.warm_up()
        yield lab


def releases(lab: Lab) -> list[str]:
    directory = lab.host.path("/run/netloom/releases")
    return sorted(os.listdir(directory)) if directory.exists() else []


def attach(lab: Lab, document: dict[str, Any], netns: Netns, container_id: str = "c1") -> dict[str, Any]:
    return lab.cni("ADD", "bridge", document, netns=netns, container_id=container_id).result()


def test_del_while_ipamd_is_down_is_replayed(durable: Lab) -> None:
    lab, document = durable, net(isGateway=True, ipMasq=True, ipam=pool())
    with lab.space() as netns:
        before = lab.host.snapshot()
        attach(lab, document, netns)
        lab.ipamd.kill()
        answer = lab.host.cni("DEL", "bridge", document, netns=netns)
        answer.ok()
        assert "ipamd cannot be reached" in answer.stderr
        assert set(netns.links()) == {"lo"}
        (name,) = releases(lab)
        written = json.loads(lab.host.path(f"/run/netloom/releases/{name}").read_bytes())
        assert name.endswith(".json")
        assert written["version"] == 1
        assert written["key"] == {
            "node": "",
            "client": "cni",
            "network": "net",
            "container_id": "c1",
            "ifname": "eth0",
        }
        # Again, as a runtime may.
        lab.cni("DEL", "bridge", document, netns=netns).ok()
        lab.ipamd.start()
        assert lab.host.allocations() == []
        wait_until(lambda: releases(lab) == [], "the records' end")
        lab.host.assert_clean(before, keep=["br0"])


def test_a_replay_does_not_free_what_came_later(durable: Lab) -> None:
    lab, document = durable, net(isGateway=True, ipam=pool())
    with lab.space() as netns:
        attach(lab, document, netns)
        lab.ipamd.stop()
        lab.cni("DEL", "bridge", document, netns=netns).ok()
        (name,) = releases(lab)
        record = lab.host.path(f"/run/netloom/releases/{name}")
        content = record.read_bytes()
        lab.ipamd.start()
        assert lab.host.allocations() == []
        # The same key once more; then the old record appears again, as after a crash between release and removal.
        result = attach(lab, document, netns)
        lab.ipamd.stop()
        record.parent.mkdir(exist_ok=True)
        record.write_bytes(content)
        lab.ipamd.start()
        wait_until(lambda: releases(lab) == [], "the records' end")
        assert len(lab.host.allocations()) == 1
        lab.cni("CHECK", "bridge", {**document, "prevResult": result}, netns=netns, container_id="c1").ok()
        lab.cni("DEL", "bridge", document, netns=netns).ok()


def test_add_and_status_while_ipamd_is_down(durable: Lab) -> None:
    lab, document = durable, net(isGateway=True, ipMasq=True, ipam=pool())
    lab.ipamd.stop()
    before = lab.host.snapshot()
    with lab.space() as netns:
        for _ in range(2):
            answer = lab.host.cni("ADD", "bridge", document, netns=netns)
            assert answer.code() == 11
            assert "ipamd" in answer.json["msg"]
        assert set(netns.links()) == {"lo"}
        # The runtime cleans up after an ADD that failed.
        lab.host.cni("DEL", "bridge", document, netns=netns).ok()
        assert lab.host.cni("STATUS", "bridge", document).code() == 50
        assert lab.host.cni("CHECK", "bridge", {**document, "prevResult": {}}, netns=netns).code() > 0
    lab.ipamd.start()
    wait_until(lambda: releases(lab) == [], "the records' end")
    lab.host.assert_clean(before)


def test_a_daemon_that_hangs_is_given_up_in_time(durable: Lab) -> None:
    import signal  # noqa: PLC0415

    lab, document = durable, net(isGateway=True, ipam=pool(timeout=0.5))
    with lab.space() as netns:
        os.kill(lab.ipamd.pid, signal.SIGSTOP)
        try:
            assert lab.cni("ADD", "bridge", document, netns=netns).code() == 11
            assert set(netns.links()) == {"lo"}
            lab.cni("DEL", "bridge", document, netns=netns).ok()
            assert len(releases(lab)) == 1
        finally:
            os.kill(lab.ipamd.pid, signal.SIGCONT)
        # What it took up while it slept is released by the record.
        wait_until(lambda: releases(lab) == [], "the records' end")
        wait_until(lambda: lab.host.allocations() == [], "the release")


def test_no_release_record_can_be_written(durable: Lab) -> None:
    lab, document = durable, net(isGateway=True, ipMasq=True, ipam=pool())
    with lab.space() as netns:
        attach(lab, document, netns)
        lab.ipamd.stop()
        directory = lab.host.path("/run/netloom/releases")
        if directory.exists():
            directory.rmdir()
        directory.write_text("in the way")
        answer = lab.cni("DEL", "bridge", document, netns=netns)
        assert answer.code() == 11
        assert set(netns.links()) == {"lo"}  # everything else is done
        directory.unlink()
        lab.cni("DEL", "bridge", document, netns=netns).ok()
        assert len(releases(lab)) == 1


def test_a_first_record_belongs_to_the_run_directorys_owner(durable: Lab) -> None:
    lab, document = durable, net(ipam=pool())
    lab.ipamd.stop()
    directory = lab.host.path("/run/netloom/releases")
    if directory.exists():
        directory.rmdir()
    os.chown(lab.host.path("/run/netloom"), 4711, 4712)
    lab.cni("DEL", "ipamd", document).ok()
    (name,) = releases(lab)
    for path in (directory, directory / name):
        assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)
    assert directory.stat().st_mode & 0o777 == 0o770
    os.chown(lab.host.path("/run/netloom"), 0, 0)


def test_a_deep_socket_path(lab: Lab) -> None:
    # unix(7): a path ends after 107 bytes.
    deep = "/run/" + "/".join(["d" * 50] * 4)
    lab.host.path(deep).mkdir(parents=True)
    target = lab.host.path(f"{deep}/ipamd.sock")
    os.symlink("/run/netloom/ipamd.sock", target)
    document = conf(subnet=FOUR, socket=f"{deep}/ipamd.sock")
    add(lab, document)
    delete(lab, document)
    add(lab, conf(subnet=FOUR), env={"NETLOOM_IPAMD_SOCKET": f"{deep}/ipamd.sock"})
    delete(lab, conf(subnet=FOUR))


# Many at once; the day after


def test_fifty_at_once(durable: Lab) -> None:
    lab = durable
    document = net(isGateway=True, ipMasq=True, macspoofchk=True, ipam=pool())
    spaces = [lab.host.netns(f"p{number}") for number in range(50)]
    before = lab.host.snapshot()
    added = at_once(lab, "ADD", document, spaces)
    results = [json.loads(stdout) for status, stdout in added if status == 0]
    assert len(results) == 50, [stdout for status, stdout in added if status][:3]
    addresses = {result["ips"][0]["address"] for result in results}
    assert len(addresses) == 50
    assert {netns.addresses()["eth0"][0] for netns in spaces} == addresses
    for result, netns in zip(results, spaces, strict=True):
        lab.cni("CHECK", "bridge", {**document, "prevResult": result}, netns=netns, container_id=netns.name).ok()
    assert [stdout for status, stdout in at_once(lab, "DEL", document, spaces) if status] == []
    lab.host.assert_clean(before, keep=["br0"])
    for netns in spaces:
        netns.delete()


def at_once(lab: Lab, verb: str, document: dict[str, Any], spaces: list[Netns]) -> list[tuple[int, str]]:
    """A process for each container, all running before the first is waited for."""
    import subprocess  # noqa: PLC0415

    running = []
    for netns in spaces:
        process = subprocess.Popen(
            lab.host.command(["/opt/cni/bin/bridge"], cwd="/"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": netns.name,
                "CNI_NETNS": netns.path,
                "CNI_IFNAME": "eth0",
                "CNI_PATH": "/opt/cni/bin",
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            },
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(document))
        process.stdin.close()
        process.stdin = None
        running.append(process)
    answers = []
    for process in running:
        stdout, stderr = process.communicate()
        answers.append((process.returncode, stdout if process.returncode == 0 else stdout + stderr))
    return answers


def test_after_a_reboot(durable: Lab) -> None:
    lab, document = durable, net(isGateway=True, ipMasq=True, ipam=pool())
    host = lab.host
    for number in range(3):
        attach(lab, document, host.netns(), f"c{number}")
    assert len(host.allocations()) == 3
    lab.ipamd.stop()
    host.reboot()
    lab = Lab(host, host._ipamd)
    lab.ipamd.start()
    with lab.space() as netns:
        # Nobody gets an address of those who died before they are released.
        (fresh,) = attach(lab, document, netns, "new")["ips"]
        assert ip_address(fresh["address"].split("/")[0]) not in [ip_address(f"10.1.0.{n}") for n in (2, 3, 4)]
        wait_until(lambda: len(host.allocations()) == 1, "two observations", lambda: lab.ipamd.log()[-3000:])
        assert '"new"' in host.allocations()[0]
        lab.cni("DEL", "bridge", document, netns=netns, container_id="new").ok()
    assert host.allocations() == []
