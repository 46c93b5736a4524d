"""ADD fails at each step, before and after the step did its work: nothing is left, and the first cause is told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from cni.undo import Undo
from tests.cni.lab import Lab, Served, both, net, pool
from tests.hosts import Netns

FULL: dict[str, Any] = {
    "isDefaultGateway": True,
    "ipMasq": True,
    "macspoofchk": True,
    "hairpinMode": True,
    "promiscMode": False,
    "mtu": 1400,
}


def test_inverses_run_in_reverse() -> None:
    done: list[str] = []
    undo = Undo()
    for what in ("one", "two", "three"):
        undo.push(what, partial(done.append, what))
    assert undo.unwind() == []
    assert done == ["three", "two", "one"]
    assert undo.unwind() == []
    assert done == ["three", "two", "one"]


def test_a_failing_inverse_does_not_stop_those_before_it() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("no")

    undo = Undo()
    undo.push("one", lambda: done.append("one"))
    undo.push("two", fail)
    undo.push("three", lambda: done.append("three"))
    assert undo.unwind() == ["two: no"]
    assert done == ["three", "one"]


def test_what_is_committed_stays(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    with Undo() as undo:
        undo.push("one", lambda: done.append("one"))
        undo.commit()
    assert done == []
    with pytest.raises(KeyError), Undo() as undo:
        undo.push("one", lambda: done.append("one"))
        undo.push("two", partial(done.remove, "x"))
        raise KeyError("the cause")
    assert done == ["one"]
    assert "undoing a failed ADD: two: list.remove(x): x not in list" in capsys.readouterr().err


def add(lab: Lab, conf: Mapping[str, Any], netns: Netns, *faults: Mapping[str, Any]) -> Served:
    return lab.cni("ADD", "bridge", conf, netns=netns, container_id="undo", faults=faults)


def steps(lab: Lab, conf: Mapping[str, Any]) -> tuple[str, ...]:
    """What a whole ADD calls, in order, once everything that all containers share is there."""
    with lab.space() as netns:
        for _ in range(2):
            answer = add(lab, conf, netns)
            answer.ok()
            lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
    return answer.calls


def assert_nothing_left(lab: Lab, netns: Netns, before: Any, what: str) -> None:
    try:
        lab.host.assert_clean(before, keep=["br0"])
    except AssertionError as error:
        raise AssertionError(f"after {what}: {error}") from error
    assert set(netns.links()) == {"lo"}, what


@pytest.mark.kernel
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["error", "signal"])
def test_a_fault_at_each_step_leaves_nothing(lab: Lab, when: str, kind: str) -> None:
    conf = net(**FULL, ipam=both())
    called = steps(lab, conf)
    assert len(called) > 20
    with lab.space() as netns:
        before = lab.host.snapshot()
        survived = []
        for number, label in enumerate(called, 1):
            if label in ("allocate", "read the namespace's cookie") and when == "after" and kind == "signal":
                # Between ipamd's answer and our noting it: the runtime's DEL, or GC, gives the address back.
                continue
            answer = add(lab, conf, netns, {"at": number, "when": when, "kind": kind})
            if answer.status == 0:
                survived.append(label)
                lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
            else:
                assert answer.code() > 0
                # By its own word: names are drawn anew each time.
                told = f"INJECTED {answer.calls[number - 1]}" if kind == "error" else "interrupted by a signal: SIGTERM"
                assert told in answer.json["msg"] + answer.json.get("details", ""), (label, answer)
            if label == "allocate" and when == "after":
                lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
            assert_nothing_left(lab, netns, before, f"{kind} {when} step {number}, {label}")
        # Only what an ADD can do without may fail unnoticed.
        assert survived == []
        add(lab, conf, netns).ok()
        assert netns.ping("10.1.0.1") > 0
        lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()


@pytest.mark.kernel
def test_a_fault_while_the_shared_things_are_made_leaves_only_those(lab: Lab) -> None:
    conf = net(**FULL, ipam=both())
    with lab.space() as netns:
        before = lab.host.snapshot()
        number = 0
        while True:
            number += 1
            if "br0" in lab.bridges():
                lab.host.run(["ip", "link", "delete", "br0"])
            answer = add(lab, conf, netns, {"at": number, "when": "after", "kind": "error"})
            if answer.status == 0:
                break
            if answer.calls[-1] == "allocate":
                lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
            assert_nothing_left(lab, netns, before, f"step {number}, {answer.calls[-1]}")
        assert number > 20
        lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()


@pytest.mark.kernel
def test_a_failing_undo_step_does_not_stop_the_others(lab: Lab) -> None:
    conf = net(**FULL, ipam=pool())
    called = steps(lab, conf)
    last = {"at": len(called), "when": "before", "kind": "error"}
    with lab.space() as netns:
        before = lab.host.snapshot()
        whole = add(lab, conf, netns, last)
        assert_nothing_left(lab, netns, before, "the plain undo")
        assert len(whole.undo_calls) >= 4
        for number, label in enumerate(whole.undo_calls, 1):
            answer = add(lab, conf, netns, last, {"at": number, "when": "before", "kind": "error", "undo": True})
            # The first cause, not what went wrong while undoing.
            assert f"INJECTED {called[-1]}" in answer.json["msg"]
            assert f"INJECTED {answer.undo_calls[number - 1]}" in answer.stderr
            assert answer.undo_calls[-1] == "release", label
            # What the undo could not do, the runtime's DEL does.
            lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
            assert_nothing_left(lab, netns, before, f"a fault in undo step {number}, {label}, and a DEL")


@pytest.mark.kernel
def test_an_undo_frees_only_what_this_add_got(lab: Lab) -> None:
    # ipamd answers an ADD that was made before with what it gave then: that is the other ADD's, and not to be freed.
    conf = net(ipam=pool())
    with lab.space() as netns:
        lab.cni("ADD", "ipamd", conf, netns=netns, container_id="undo").ok()
        held = lab.host.allocations()
        called = steps_of_one(lab, conf, netns)
        answer = add(lab, conf, netns, {"at": len(called), "when": "before", "kind": "error"})
        assert answer.code() == 999
        assert [line.partition("netns")[0] for line in lab.host.allocations()] == [
            line.partition("netns")[0] for line in held
        ]
        lab.cni("DEL", "bridge", conf, netns=netns, container_id="undo").ok()
        assert lab.host.allocations() == []


def steps_of_one(lab: Lab, conf: Mapping[str, Any], netns: Netns) -> tuple[str, ...]:
    """What an ADD calls, found out with one that fails in delivery."""
    number = 1
    while True:
        answer = add(lab, conf, netns, {"at": number, "when": "before", "kind": "error"})
        if answer.calls[-1] == "encode the result":
            return answer.calls
        number += 1


@pytest.mark.kernel
def test_a_result_that_nobody_reads_is_taken_back(lab: Lab) -> None:
    # Standard output is closed before the plugin writes to it.
    import json  # noqa: PLC0415

    conf = net(**FULL, ipam=pool())
    with lab.space() as netns:
        steps(lab, conf)
        before = lab.host.snapshot()
        script = "exec 3>&1; /opt/cni/bin/bridge >&- ; echo status $? >&3"
        env = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": "undo",
            "CNI_NETNS": netns.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/opt/cni/bin",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        done = lab.host.run(["sh", "-c", script], input=json.dumps(conf), env=env)
        assert done.stdout == "status 1\n"
        assert "could not be delivered" in done.stderr
        assert_nothing_left(lab, netns, before, "an undelivered result")
