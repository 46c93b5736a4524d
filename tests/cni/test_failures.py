"""DEL does what can be done, whatever is missing; and does nothing to anybody else."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from cni.failures import Failures
from tests.cni.lab import Attached, Lab, both, elements, net, pool
from tests.hosts import Snapshot

FULL: dict[str, Any] = {"isDefaultGateway": True, "ipMasq": True, "macspoofchk": True}
CONF = net(**FULL, ipam=both())


def test_all_steps_run_and_the_first_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def fail(what: str) -> None:
        done.append(what)
        raise OSError(what)

    with pytest.raises(OSError, match="first"), Failures() as failures:
        failures.attempt(fail, "first")
        failures.attempt(done.append, "between")
        failures.attempt(fail, "second")
    assert done == ["first", "between", "second"]
    assert capsys.readouterr().err == "netloom: also: second\n"


def test_no_failure_is_none() -> None:
    with Failures() as failures:
        failures.attempt(int, "5")


def test_an_error_of_the_block_itself_wins() -> None:
    with pytest.raises(KeyError), Failures() as failures:
        failures.attempt(int, "x")
        raise KeyError


def delete(lab: Lab, one: Attached, conf: dict[str, Any] | bytes = CONF, **more: Any) -> None:
    lab.cni("DEL", "bridge", conf, **{"netns": one.netns, "container_id": one.container_id, **more}).ok()


def gone(lab: Lab, before: Snapshot) -> None:
    lab.host.assert_clean(before, keep=["br0"])


@pytest.mark.kernel
class TestDel:
    """Each in a host with another container that must not notice."""

    def test_twice(self, lab: Lab) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                delete(lab, one)
                delete(lab, one)
                delete(lab, one, netns="")
            gone(lab, before)
            other.check()

    def test_without_netns(self, lab: Lab) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                delete(lab, one, netns="")
                assert set(one.netns.links()) == {"lo"}
                one.netns.delete()
                gone(lab, before)
            other.check()

    @pytest.mark.parametrize(
        "netns", ["/run/netns/nothing", "/run/netns", "/etc/passwd", "/dev/null", "/proc/1/ns/uts", "/proc/self/ns/net"]
    )
    def test_with_a_path_that_is_no_container(self, lab: Lab, netns: str) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                delete(lab, one, netns=netns)
                assert set(one.netns.links()) == {"lo"}
                one.netns.delete()
                gone(lab, before)
            other.check()

    def test_with_the_namespace_gone(self, lab: Lab) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                one.netns.delete()
                delete(lab, one)
                gone(lab, before)
            other.check()

    def test_with_the_bridge_gone(self, lab: Lab) -> None:
        before = lab.host.snapshot()
        with lab.attached(CONF) as one:
            lab.host.run(["ip", "link", "delete", "br0"])
            delete(lab, one)
            one.netns.delete()
            gone(lab, before)

    def test_with_the_port_gone(self, lab: Lab) -> None:
        with lab.attached(CONF) as one:
            lab.host.run(["ip", "link", "delete", one.port])
            delete(lab, one)

    def test_with_the_record_lost(self, lab: Lab) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                record = lab.host.path(f"/run/netloom/attachments/net/{one.container_id}@eth0.bridge")
                record.unlink()
                delete(lab, one)
                assert set(one.netns.links()) == {"lo"}
                one.netns.delete()
                # The elements have nobody left who knows of them; a rebuild finds them.
                lab.host.run(["sh", "-c", _REBUILD])
                gone(lab, before)
            other.check()

    def test_with_the_tables_flushed(self, lab: Lab) -> None:
        with lab.attached(CONF) as one:
            lab.host.run(["nft", "flush", "ruleset"])
            delete(lab, one)
        lab.warm_up()

    @pytest.mark.parametrize(
        "keys",
        [
            {"ipMasq": "yes"},
            {"mtu": "big"},
            {"bridge": 5},
            {"bridge": "../.."},
            {"vlan": 5},
            {"dns": []},
            {"prevResult": {"ips": "nonsense"}},
            {"prevResult": 5},
            {"runtimeConfig": []},
            {"args": 5},
            {"ipam": {"type": "ipamd", "ranges": 5}},
            {"ipam": {"type": "ipamd"}},
            {"ipam": {"type": "ipamd", "pool": "a", "pools": ["b"]}},
            {"ipam": {"type": "ipamd", "timeout": "soon"}},
        ],
        ids=json.dumps,
    )
    def test_with_a_configuration_that_is_beyond_repair(self, lab: Lab, keys: dict[str, Any]) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.attached(CONF) as one:
                delete(lab, one, {**CONF, **keys})
                one.netns.delete()
                gone(lab, before)
            other.check()

    def test_of_an_attachment_that_never_was(self, lab: Lab) -> None:
        with lab.attached(CONF) as other:
            before = lab.host.snapshot()
            with lab.space() as netns:
                lab.cni("DEL", "bridge", CONF, netns=netns, container_id="never").ok()
                lab.cni("DEL", "bridge", net(name="never", ipam=pool()), container_id="never").ok()
            gone(lab, before)
            other.check()

    def test_of_an_id_that_no_add_takes(self, lab: Lab) -> None:
        # The runtime sends it after the ADD that was refused; a failure would be repeated for ever.
        long = "c" * 400
        with lab.space() as netns:
            assert lab.cni("ADD", "bridge", CONF, netns=netns, container_id=long).code() > 0
            lab.cni("DEL", "bridge", CONF, netns=netns, container_id=long).ok()

    def test_of_anothers_name(self, lab: Lab) -> None:
        # Same container id in another network, same network and another container, another interface.
        with lab.attached(CONF) as one:
            before = lab.host.snapshot()
            with lab.space() as empty:
                for conf, container, ifname in (
                    (net(name="other", **FULL, ipam=pool()), one.container_id, "eth0"),
                    (CONF, "somebody", "eth0"),
                    (CONF, one.container_id, "eth1"),
                ):
                    lab.cni("DEL", "bridge", conf, netns=empty, container_id=container, ifname=ifname).ok()
                    lab.cni("DEL", "bridge", conf, container_id=container, ifname=ifname).ok()
                empty.delete()
            gone(lab, before)
            one.check()

    def test_a_foreign_link_of_the_recorded_name_stays(self, lab: Lab) -> None:
        with lab.attached(CONF) as one:
            lab.host.run(["ip", "link", "delete", one.port])
            lab.host.run(["ip", "link", "add", one.port, "type", "bridge"])
            delete(lab, one)
            assert one.port in lab.host.links()

    def test_a_host_interface_of_the_same_name_stays(self, lab: Lab) -> None:
        lab.host.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "peer0"])
        try:
            with lab.attached(CONF) as one:
                delete(lab, one, netns="/proc/self/ns/net")
                delete(lab, one, netns="")
                assert "eth0" in lab.host.links()
        finally:
            lab.host.run(["ip", "link", "delete", "eth0"])

    def test_a_failing_ipam_does_not_keep_the_interface(self, lab: Lab) -> None:
        script = lab.scripted()
        script.gives("10.1.0.2/16")
        script.does("DEL", "exit 1", {"cniVersion": "1.1.0", "code": 123, "msg": "not today"})
        conf = net(**FULL, ipam={"type": "scripted"})
        with lab.attached(conf) as one:
            answer = one.call("DEL")
            assert (answer.code(), answer.json["msg"]) == (123, "not today")
            assert set(one.netns.links()) == {"lo"}
            assert elements(lab.host, "masq4") == []
            script.does("DEL")
            one.call("DEL").ok()


_REBUILD = f"""exec {sys.executable} -c '
from kernel.record import Records
from kernel.session import Session
with Session() as session:
    Records("/run/netloom").rebuild(session)
'"""
