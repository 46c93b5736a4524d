"""Foreign IPAM plugins under our bridge, whatever they do; our IPAM plugin under the reference bridge."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from cni.versions import SUPPORTED
from tests.cni.lab import REFERENCE, WITH_CHECK, Lab, net, pool
from tests.hosts import CNI_BIN

pytestmark = pytest.mark.kernel
needs_reference = pytest.mark.skipif(
    not os.path.exists(f"{REFERENCE}/host-local"), reason="no containernetworking-plugins on this machine"
)
CONF = net(isGateway=True, ipam={"type": "scripted", "extra": {"kept": [1, 2]}}, unknown="kept")


@pytest.fixture
def host_local(lab: Lab) -> Iterator[None]:
    """Debian's host-local among our plugins, under a name that is not ours."""
    foreign = lab.host.path(f"{CNI_BIN}/foreign")
    shutil.copy(f"{REFERENCE}/host-local", foreign)
    yield
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"), ignore_errors=True)
    foreign.unlink()


def refused(lab: Lab, conf: dict[str, Any] = CONF, **more: Any) -> dict[str, Any]:
    """An ADD that must fail and leave nothing; its error object."""
    with lab.space() as netns:
        before = lab.host.snapshot()
        answer = lab.cni("ADD", "bridge", conf, netns=netns, **more)
        assert answer.code() > 0
        lab.host.assert_clean(before, keep=["br0"])
        assert set(netns.links()) == {"lo"}
    error: dict[str, Any] = answer.json
    return error


@needs_reference
@pytest.mark.parametrize("version", SUPPORTED)
def test_host_local_in_every_version(lab: Lab, host_local: None, version: str) -> None:
    # 1.1.0, which this host-local does not know, is negotiated down.
    conf = net(version, isGateway=True, ipam={"type": "foreign", "subnet": "10.8.0.0/24"})
    with lab.attached(conf) as one:
        assert one.netns.addresses()["eth0"] == ["10.8.0.2/24"]
        assert one.netns.ping("10.8.0.1") > 0
        assert sorted(os.listdir(lab.host.path("/var/lib/cni/networks/net"))) == [
            "10.8.0.2",
            "last_reserved_ip.0",
            "lock",
        ]
        assert one.result["cniVersion"] == version
        if version in WITH_CHECK:
            one.check()
            lab.host.path("/var/lib/cni/networks/net/10.8.0.2").rename(lab.host.path("/var/lib/cni/networks/kept"))
            assert one.broken()
            lab.host.path("/var/lib/cni/networks/kept").rename(lab.host.path("/var/lib/cni/networks/net/10.8.0.2"))
    assert not lab.host.path("/var/lib/cni/networks/net/10.8.0.2").exists()
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"))


@needs_reference
def test_a_second_add_keeps_the_firsts_address_in_host_local(lab: Lab, host_local: None) -> None:
    conf = net(isGateway=True, ipam={"type": "foreign", "subnet": "10.8.0.0/24"})
    with lab.attached(conf) as one:
        assert one.call("ADD").code() == 4
        assert lab.host.path("/var/lib/cni/networks/net/10.8.0.2").exists()
        one.check()
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"))


@needs_reference
def test_host_locals_own_error(lab: Lab, host_local: None) -> None:
    conf = net(ipam={"type": "foreign", "subnet": "10.8.0.0/30"})
    with lab.attached(conf):
        error = refused(lab, conf, container_id="late")
        assert "no IP addresses available" in error["msg"]
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"))


@needs_reference
@pytest.mark.parametrize("version", SUPPORTED[:-1])
def test_our_ipam_under_the_reference_bridge(lab: Lab, version: str) -> None:
    conf = net(version, isGateway=True, ipam=pool(routes=[{"dst": "0.0.0.0/0"}]))
    with lab.space() as netns:
        before = lab.host.snapshot()
        env = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "ref",
            "CNI_NETNS": netns.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": CNI_BIN,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }

        def call(verb: str, document: dict[str, Any]) -> Any:
            stdin = json.dumps(document)
            return lab.host.run([f"{REFERENCE}/bridge"], input=stdin, env={**env, "CNI_COMMAND": verb}, check=False)

        added = call("ADD", conf)
        assert added.returncode == 0, added.stdout
        result = json.loads(added.stdout)
        (address,) = netns.addresses()["eth0"]
        assert address in json.dumps(result)
        assert [route["gateway"] for route in netns.routes() if route["dst"] == "default"] == ["10.1.0.1"]
        assert netns.ping("10.1.0.1") > 0
        assert len(lab.host.allocations()) == 1
        if version in WITH_CHECK:
            checked = call("CHECK", {**conf, "prevResult": result})
            assert checked.returncode == 0, checked.stdout
        assert call("DEL", conf).returncode == 0
        lab.host.assert_clean(before, keep=["br0"])


def test_what_a_delegate_is_given(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16 10.1.0.1")
    args = "IgnoreUnknown=1;K8S_POD_NAME=x"
    with lab.attached(CONF, args=args, env={"CUSTOM": "kept", "CNI_NETNS_OVERRIDE": "0"}) as one:
        one.check()
    assert script.log() == ["ADD", "CHECK", "DEL"]
    assert script.stdin("ADD") == CONF
    assert script.stdin("DEL") == script.stdin("CHECK") == {**CONF, "prevResult": one.result}
    for verb in script.log():
        env = script.env(verb)
        assert env["CNI_COMMAND"] == verb
        assert env["CNI_CONTAINERID"] == one.container_id
        assert env["CNI_NETNS"] == one.netns.path
        assert (env["CNI_IFNAME"], env["CNI_PATH"], env["CNI_ARGS"]) == ("eth0", CNI_BIN, args)
        assert env["CUSTOM"] == "kept"
        assert not [name for name in env if name.startswith(("_PYI", "LD_", "PYTHON"))]


@pytest.mark.parametrize("version", SUPPORTED)
def test_its_result_is_read_in_its_own_version(lab: Lab, version: str) -> None:
    script = lab.scripted()
    if version in ("0.1.0", "0.2.0"):
        answer: dict[str, Any] = {"ip4": {"ip": "10.1.0.2/16", "gateway": "10.1.0.1"}, "dns": {"domain": "example"}}
    else:
        answer = {"ips": [{"version": "4", "address": "10.1.0.2/16", "gateway": "10.1.0.1"}]}
        answer["dns"] = {"domain": "example"}
    script.does("ADD", answer={"cniVersion": version, **answer})
    with lab.attached(CONF) as one:
        assert one.result["ips"] == [{"address": "10.1.0.2/16", "gateway": "10.1.0.1", "interface": 2}]
        assert one.result["dns"] == {"domain": "example"}


def test_one_that_is_older_is_asked_for_its_versions(lab: Lab) -> None:
    script = lab.scripted()
    only = {"cniVersion": "0.4.0", "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "9.9.9"]}
    script.does("VERSION", answer=only)
    answer = json.dumps({"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.1.0.2/16"}]})
    new = json.dumps({"code": 1, "msg": "incompatible CNI versions"})
    choose = f"""
        if grep -q '"cniVersion": *"0.4.0"' $dir/stdin.$CNI_COMMAND; then printf %s '{answer}'
        else printf %s '{new}'; exit 1; fi"""
    for verb in ("ADD", "DEL", "CHECK"):
        script.does(verb, choose)
    with lab.attached(CONF) as one:
        assert one.addresses == ["10.1.0.2/16"]
        one.check()
        assert script.stdin("CHECK")["prevResult"]["ips"][0]["version"] == "4"
    assert script.log() == ["ADD", "VERSION", "ADD", "CHECK", "VERSION", "CHECK", "DEL", "VERSION", "DEL"]
    assert script.stdin("ADD")["ipam"] == CONF["ipam"]
    script.does("VERSION", answer={"cniVersion": "9.9.9", "supportedVersions": ["9.9.9"]})
    assert refused(lab)["code"] == 1


def test_its_error_is_passed_on(lab: Lab) -> None:
    script = lab.scripted()
    script.does("ADD", "echo log line >&2; exit 1", {"cniVersion": "1.1.0", "code": 142, "msg": "no", "details": "why"})
    error = refused(lab)
    assert (error["code"], error["msg"], error["details"]) == (142, "no", "why")
    assert script.log() == ["ADD"]


def test_its_log_is_passed_on(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16")
    script.does("DEL", "echo one line >&2")
    with lab.attached(CONF) as one:
        assert "one line" in one.call("DEL").stderr


@pytest.mark.parametrize(
    ("shell", "answer", "words"),
    [
        ("exit 1", "", "exit status 1"),
        ("exit 3", "garbage", "exit status 3"),
        ("exit 1", "[1, 2]", "exit status 1"),
        ("exit 1", '{"code": "text"}', "exit status 1"),
        ("kill -9 $$", "", "signal 9"),
        ("kill -TERM $$", '{"cniVersion": "1.1.0"', "signal 15"),
    ],
)
def test_one_that_dies(lab: Lab, shell: str, answer: str, words: str) -> None:
    script = lab.scripted()
    script.does("ADD", shell, answer)
    error = refused(lab)
    assert error["code"] == 999
    assert words in error["msg"]
    assert "scripted" in error["msg"]


NO_RESULTS = (
    *("", "garbage", "[]", "5", '"text"', "{", "null", "\\377", '{"cniVersion": "1.1.0"}'),
    *('{"cniVersion": "1.1.0", "ips": 5}', '{"ips": [{"address": "nonsense"}]}', '{"ips": [null]}'),
    *('{"ips": [{"address": "10.1.0.2/99"}]}', '{"ips": [{"address": "10.1.0.2"}]}', '{"routes": [{"dst": "x"}]}'),
    '{"cniVersion": "9.9.9", "ips": [{"address": "10.1.0.2/16"}]}',
    '{"ips": [{"address": "10.1.0.2/16", "gateway": "x"}]}',
)


@pytest.mark.parametrize("answer", NO_RESULTS)
def test_one_that_prints_what_is_no_result(lab: Lab, answer: str) -> None:
    script = lab.scripted()
    script.does("ADD", answer=answer)
    error = refused(lab)
    assert error["code"] in (6, 7, 999)
    assert error["msg"]
    # It said that it succeeded, so it may hold something.
    assert script.log() == ["ADD", "DEL"]


@pytest.mark.parametrize(
    "route",
    [
        {"dst": "192.0.2.0/24", "mtu": -1},
        {"dst": "192.0.2.0/24", "mtu": 2**40},
        {"dst": "192.0.2.0/24", "advmss": 2**32},
        {"dst": "192.0.2.0/24", "priority": -5},
        {"dst": "192.0.2.0/24", "table": 2**32},
        {"dst": "192.0.2.0/24", "table": -1},
        {"dst": "192.0.2.0/24", "scope": 256},
        {"dst": "192.0.2.0/24", "scope": -1},
        {"dst": "192.0.2.0/24", "gw": "fd00::1"},
        {"dst": "2001:db8::/32", "gw": "10.1.0.1"},
    ],
    ids=json.dumps,
)
def test_routes_that_no_kernel_takes(lab: Lab, route: dict[str, Any]) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16 10.1.0.1", routes=[route])
    error = refused(lab)
    assert error["code"] == 7
    assert "192.0.2.0/24" in error["msg"] or "2001:db8::/32" in error["msg"]


def test_one_that_hangs(lab: Lab) -> None:
    script = lab.scripted()
    script.does("ADD", "exec sleep 1000")
    error = refused(lab, env={"NETLOOM_DELEGATE_TIMEOUT": "0.3"})
    assert error["code"] == 11
    assert "scripted did not finish ADD within 0.3 s" in error["msg"]
    assert not [command for command in lab.host.processes().values() if command == "sleep 1000"]


def test_one_that_leaves_its_helper_hanging(lab: Lab) -> None:
    script = lab.scripted()
    script.does("ADD", "sleep 1001 & wait")
    assert refused(lab, env={"NETLOOM_DELEGATE_TIMEOUT": "0.3"})["code"] == 11
    assert not [command for command in lab.host.processes().values() if command == "sleep 1001"]


@pytest.mark.parametrize("limit", ["soon", "-1", "0", "nan", "inf", "99999"])
def test_a_limit_that_is_none(lab: Lab, limit: str) -> None:
    lab.scripted().gives("10.1.0.2/16")
    error = refused(lab, env={"NETLOOM_DELEGATE_TIMEOUT": limit})
    assert error["code"] == 4
    assert "NETLOOM_DELEGATE_TIMEOUT" in error["msg"]


def test_one_that_does_not_read_its_input(lab: Lab) -> None:
    silent = lab.host.path(f"{CNI_BIN}/silent")
    silent.write_text('#!/bin/sh\nexec <&-\necho \'{"ips": [{"address": "10.1.0.2/16"}]}\'\n')
    silent.chmod(0o755)
    conf = net(ipam={"type": "silent", "ballast": "x" * 500_000})
    with lab.attached(conf) as one:
        assert one.addresses == ["10.1.0.2/16"]
    silent.unlink()


def test_one_that_prints_much(lab: Lab) -> None:
    script = lab.scripted()
    script.does("ADD", "head -c 3000000 /dev/zero")
    assert refused(lab)["code"] == 6


def test_one_that_cannot_be_executed(lab: Lab) -> None:
    for name, content, mode in (("noexec", "#!/bin/sh\n", 0o644), ("nointerpreter", "#!/nowhere\n", 0o755)):
        file = lab.host.path(f"{CNI_BIN}/{name}")
        file.write_text(content)
        file.chmod(mode)
        error = refused(lab, net(ipam={"type": name}))
        assert error["code"] in (5, 7)
        assert name in error["msg"]
        file.unlink()


@pytest.mark.parametrize(
    "kind", ["../../bin/sh", "/bin/sh", "a/b", "..", ".", "$(reboot)", "a;b", "ipamd\n", "x" * 5000]
)
def test_types_that_are_no_names(lab: Lab, kind: str) -> None:
    error = refused(lab, net(ipam={"type": kind}))
    assert error["code"] == 7
    assert "type" in error["msg"] or "failed to find plugin" in error["msg"]


def test_one_that_is_not_there(lab: Lab) -> None:
    error = refused(lab, net(ipam={"type": "nowhere"}))
    assert error["code"] == 7
    assert 'failed to find plugin "nowhere"' in error["msg"]
    assert CNI_BIN in error["msg"]


def test_the_first_directory_that_has_it(lab: Lab) -> None:
    other = lab.host.path("/run/otherbin")
    other.mkdir()
    (other / "scripted").write_text('#!/bin/sh\necho \'{"ips": [{"address": "10.7.0.2/16"}]}\'\n')
    (other / "scripted").chmod(0o755)
    lab.scripted().gives("10.1.0.2/16")
    for path, expected in (
        (f"/nowhere::/run/otherbin:{CNI_BIN}", "10.7.0.2/16"),
        (f"{CNI_BIN}:/run/otherbin", "10.1.0.2/16"),
    ):
        with lab.attached(CONF, path=path) as one:
            assert one.addresses == [expected]
        lab.host.run(["ip", "link", "delete", "br0"])
    shutil.rmtree(other)


def test_a_delegate_of_our_own_type_that_is_no_ipam(lab: Lab) -> None:
    for kind in ("bridge", "loopback"):
        conf = net(ipam={"type": kind})
        error = refused(lab, conf)
        assert error["code"] == 7
        assert "is no IPAM plugin" in error["msg"]
        lab.cni("DEL", "bridge", conf).ok()


def test_addresses_are_given_back_when_the_rest_fails(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16 10.1.0.1", routes=[{"dst": "192.0.2.0/24", "gw": "172.16.0.1"}])
    assert "Nexthop" in refused(lab)["msg"]
    assert script.log() == ["ADD", "DEL"]
    script.does("DEL", "exit 1", {"code": 99, "msg": "cannot"})
    assert "Nexthop" in refused(lab)["msg"]
