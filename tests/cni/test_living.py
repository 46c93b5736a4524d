"""GC removes what is dead, spares what lives, and keeps to its own network; STATUS says what an ADD would meet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cni.living import Observer, boot_id
from kernel import link
from kernel.netns import cookie_at, opened
from kernel.session import Session
from tests.cni.lab import REFERENCE, Attached, Lab, elements, net, pool
from tests.hosts import CNI_BIN, Host, wait_until
from tests.kernel.conftest import container, home, session  # noqa: F401 - fixtures
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel
FULL: dict[str, Any] = {"isGateway": True, "ipMasq": True, "macspoofchk": True}
CONF = net(**FULL, ipam=pool())
OTHER = net(name="other", bridge="br1", **FULL, ipam=pool("10.2.0.0/16"))


def gc(lab: Lab, conf: dict[str, Any], *valid: Attached, **more: Any) -> Any:
    listed = [{"containerID": one.container_id, "ifname": "eth0"} for one in valid]
    return lab.cni("GC", conf["type"], {**conf, "cni.dev/valid-attachments": listed}, **more)


def test_an_attachment_lives_while_its_interface_is_there(session: Session, container: Space) -> None:  # noqa: F811
    with opened(container.path) as where:
        inode, cookie = where.identity.inode, cookie_at(where, session.home_fd)
        observer = Observer(session)
        assert not observer.attached(container.path, inode, cookie, "eth0")
        link.add_veth(session, link.VethSpec("v0", "eth0", where.fd))
        assert observer.attached(container.path, inode, cookie, "eth0")
        assert observer.attached(container.path, 0, 0, "eth0")
        assert not observer.attached(container.path, inode, cookie, "eth1")
        # The path is gone or leads elsewhere: whoever cannot be looked at counts as attached while he lives.
        for path in ("", "/run/netns/nothing", "/etc/passwd", "/proc/self/ns/net"):
            assert observer.attached(path, inode, cookie, "eth0")
        assert not observer.attached("/run/netns/nothing", 1, 2**62, "eth0")
        assert not observer.attached("", 0, 0, "eth0")
        # An inode is given out again, a cookie is not.
        assert not observer.attached("", inode, 2**62, "eth0")


def test_the_boot_has_a_name() -> None:
    assert len(boot_id()) == 36


def test_what_is_gone_is_removed_and_what_lives_is_spared(lab: Lab) -> None:
    before = lab.host.snapshot()
    with lab.attached(OTHER) as other, lab.attached(CONF) as valid, lab.attached(CONF) as living:
        with lab.attached(CONF) as dead:
            dead.netns.delete()
            answer = gc(lab, CONF, valid)
            answer.ok()
            assert answer.stdout == ""
            assert living.container_id in answer.stderr
            assert dead.container_id not in answer.stderr
            assert valid.container_id not in answer.stderr
            assert set(elements(lab.host, "masq4")) == {other.ip(), valid.ip(), living.ip()}
            assert len(lab.host.allocations()) == 3
        for one in (other, valid, living):
            one.check()
        gc(lab, OTHER).ok()
        gc(lab, net(name="third", ipam=pool())).ok()
        for one in (other, valid, living):
            one.check()
        # Its interface is gone, though its namespace is there: a DEL that never came.
        living.netns.run(["ip", "link", "delete", "eth0"])
        gc(lab, CONF, valid).ok()
        assert set(elements(lab.host, "masq4")) == {other.ip(), valid.ip()}
        assert len(lab.host.allocations()) == 2
        valid.check()
    gc(lab, CONF).ok()
    gc(lab, OTHER).ok()
    assert lab.bridges() == []
    lab.host.assert_clean(before)


def test_a_process_keeps_a_namespace_alive(lab: Lab) -> None:
    with lab.attached(CONF) as one:
        sleeper = one.netns.popen(["sleep", "1000"])
        wait_until(lambda: Path(f"/proc/{sleeper.pid}/comm").read_text() == "sleep\n", "a process in there")
        one.netns.delete()  # the name; the process still is inside
        answer = gc(lab, CONF)
        answer.ok()
        assert one.container_id in answer.stderr
        assert elements(lab.host, "masq4") == [one.ip()]
        sleeper.kill()
        sleeper.wait()
        gc(lab, CONF).ok()
        assert elements(lab.host, "masq4") == []
        assert lab.host.allocations() == []


def test_gc_without_a_list_frees_nothing(lab: Lab) -> None:
    lists: tuple[object, ...] = (5, [5], [{"containerID": "x"}], [{}], "all")
    with lab.attached(CONF) as one:
        one.netns.run(["ip", "link", "delete", "eth0"])
        for listed in lists:
            answer = lab.cni("GC", "bridge", {**CONF, "cni.dev/valid-attachments": listed})
            assert answer.code() == 7
        assert lab.cni("GC", "bridge", CONF).code() == 7
        assert elements(lab.host, "masq4") == [one.ip()]
        assert len(lab.host.allocations()) == 1


def test_gc_of_ipamd_alone(lab: Lab) -> None:
    conf = {**net(ipam=pool()), "type": "ipamd"}
    with lab.space() as alive, lab.space() as dying:
        for number, netns in enumerate((alive, dying)):
            lab.cni("ADD", "ipamd", conf, netns=netns, container_id=f"c{number}").ok()
        alive.run(["ip", "link", "add", "eth0", "type", "bridge"])
        answer = gc(lab, conf)
        answer.ok()
        assert "c0 eth0" in answer.stderr
        assert [line.split('container_id: "')[1][:2] for line in lab.host.allocations()] == ["c0"]
        alive.delete()
        gc(lab, conf).ok()
        assert lab.host.allocations() == []


@pytest.mark.skipif(not os.path.exists(f"{REFERENCE}/host-local"), reason="no containernetworking-plugins here")
def test_a_foreign_ipam_that_knows_neither_gc_nor_status(lab: Lab) -> None:
    # Under a name that is not ours.
    foreign = lab.host.path(f"{CNI_BIN}/foreign")
    shutil.copy(f"{REFERENCE}/host-local", foreign)
    conf = net(ipam={"type": "foreign", "subnet": "10.8.0.0/24"})
    with lab.attached(conf) as one:
        gc(lab, conf, one).ok()
        lab.cni("STATUS", "bridge", conf).ok()
        one.check()
    shutil.rmtree(lab.host.path("/var/lib/cni/networks"))
    foreign.unlink()


def test_gc_and_status_reach_a_foreign_ipam(lab: Lab) -> None:
    script = lab.scripted()
    conf = net(ipam={"type": "scripted"})
    gc(lab, conf).ok()
    lab.cni("STATUS", "bridge", conf).ok()
    assert script.log() == ["GC", "STATUS"]
    assert script.stdin("GC")["cni.dev/valid-attachments"] == []
    script.does("GC", "exit 1", {"code": 120, "msg": "no"})
    script.does("STATUS", "exit 1", {"code": 50, "msg": "not now"})
    assert gc(lab, conf).code() == 120
    assert lab.cni("STATUS", "bridge", conf).json["msg"] == "not now"


def test_gc_goes_on_after_a_failure(lab: Lab) -> None:
    script = lab.scripted()
    script.gives("10.1.0.2/16")
    script.does("GC", "exit 1", {"code": 120, "msg": "no"})
    conf = net(**FULL, ipam={"type": "scripted"})
    with lab.attached(conf) as one:
        one.netns.delete()
        assert gc(lab, conf).code() == 120
        assert elements(lab.host, "masq4") == []
        assert lab.bridges() == []


def test_a_restart_of_ipamd_is_not_noticed(lab: Lab) -> None:
    lab.cni("STATUS", "bridge", CONF).ok()
    lab.ipamd.restart()
    lab.cni("STATUS", "bridge", CONF).ok()


def test_status() -> None:
    with Host() as host:
        lab = Lab(host)
        before = host.snapshot()
        for _ in range(2):
            answer = lab.cni("STATUS", "bridge", CONF)
            assert answer.code() == 50
            assert "ipamd" in answer.json["msg"] + answer.json["details"]
        host.assert_clean(before)
        assert lab.ipamd.pid
        lab.cni("STATUS", "bridge", CONF).ok()
        lab.cni("STATUS", "loopback", {**CONF, "type": "loopback"}).ok()
        tiny = net(ipam=pool("10.9.0.0/30"), isGateway=True)
        lab.cni("STATUS", "bridge", tiny).ok()
        with lab.attached(tiny) as one:
            answer = lab.cni("STATUS", "bridge", tiny)
            assert answer.code() == 50
            assert "10.9.0" in answer.json["msg"] + answer.json["details"] or "net" in answer.json["details"]
            lab.ipamd.stop()
            assert lab.cni("STATUS", "bridge", tiny).code() == 50
            lab.ipamd.start()
            one.netns.ping("10.9.0.1")
