"""Whatever stands in the environment and on standard input: a proper error, and a host as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cni.lab import Lab, net, pool
from tests.hosts import CniCall, Netns

pytestmark = pytest.mark.kernel

CONF = net(isGateway=True, ipMasq=True, ipam=pool())
CODES = {1, 2, 4, 5, 6, 7, 8, 11, 50, 100, 101, 102}
WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "text", "\u0000", [], [[]], {}, {"a": [1, {"b": None}]})


def proper(answer: CniCall, *, internal: bool = False) -> None:
    """An error object with a code that says whose fault it was, and no traceback."""
    code = answer.code()
    assert code in CODES or internal, answer
    assert isinstance(answer.json["msg"], str)
    assert answer.json["msg"]
    assert len(answer.stdout) < 20_000
    assert "Traceback" not in answer.stderr, answer.stderr
    assert answer.json["cniVersion"]


@pytest.fixture(scope="module")
def space(module_lab: Lab) -> Iterator[Netns]:
    """One container's namespace for all that is refused anyhow."""
    with module_lab.space() as netns:
        yield netns


INPUTS = {
    "empty": b"",
    "blank": b" \n",
    "truncated": json.dumps(CONF).encode()[:-7],
    "two documents": json.dumps(CONF).encode() * 2,
    "trailing": json.dumps(CONF).encode() + b"x",
    "array": b"[1]",
    "number": b"5",
    "null": b"null",
    "10 MB": json.dumps({**CONF, "x": "y" * 10_000_000}).encode(),
    "10 MB of blanks": b" " * 10_000_000,
    "deep arrays": json.dumps(CONF).encode()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and cut": b"[" * 300_000,
    "bad UTF-8": json.dumps(CONF).encode().replace(b"br0", b"br\xff"),
    "lone surrogate": json.dumps(CONF).encode().replace(b"br0", b"\\ud800"),
    "NUL bytes": json.dumps(CONF).encode() + b"\0",
    "UTF-16": json.dumps(CONF).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(CONF).encode(),
    "NaN": json.dumps({**CONF, "mtu": float("nan")}).encode(),
    "huge integer": json.dumps({**CONF, "mtu": 10**400}).encode(),
    "huge exponent": json.dumps(CONF).encode()[:-1] + b', "mtu": 1e999}',
    "binary": random.Random(1).randbytes(5000),
    "an ELF file": b"\x7fELF" + bytes(2000),
}


@pytest.mark.parametrize("what", INPUTS)
def test_standard_input(lab: Lab, space: Netns, what: str) -> None:
    before = lab.host.snapshot()
    for plugin in ("bridge", "loopback", "ipamd"):
        for verb in ("ADD", "CHECK", "DEL", "GC", "STATUS"):
            answer = lab.cni(verb, plugin, INPUTS[what], netns=space)
            if answer.status:
                proper(answer, internal=verb == "CHECK")
                continue
            # DEL of what never was; or a key that is wrong for bridge alone, which others do not know.
            assert verb == "DEL" or (plugin != "bridge" and b'"mtu"' in INPUTS[what])
            if verb == "ADD":
                lab.cni("DEL", plugin, INPUTS[what], netns=space).ok()
    space.run(["ip", "link", "set", "lo", "down"])
    lab.host.assert_clean(before)
    assert set(space.links()) == {"lo"}


def test_standard_input_of_real_processes(lab: Lab, space: Netns) -> None:
    before = lab.host.snapshot()
    for what in ("empty", "truncated", "10 MB", "deep arrays", "deep and cut", "bad UTF-8", "binary"):
        answer = lab.host.cni("ADD", "bridge", INPUTS[what], netns=space)
        proper(answer)
        assert answer.code() in (6, 7)
        assert answer.status == 1
    lab.host.assert_clean(before)


BRIDGE_KEYS = (
    *("cniVersion", "name", "type", "bridge", "isGateway", "isDefaultGateway", "forceAddress", "ipMasq"),
    *("ipMasqBackend", "mtu", "hairpinMode", "promiscMode", "vlan", "vlanTrunk", "preserveDefaultVlan", "macspoofchk"),
    *("enabledad", "disableContainerInterface", "portIsolation", "dns", "ipam", "args", "runtimeConfig", "prevResult"),
    *("dns.nameservers", "dns.domain", "dns.search", "args.cni", "args.cni.mac", "runtimeConfig.mac"),
)
IPAM_KEYS = (
    *("ipam.type", "ipam.pool", "ipam.pools", "ipam.exclude", "ipam.socket", "ipam.timeout", "ipam.ranges"),
    *("ipam.subnet", "ipam.rangeStart", "ipam.rangeEnd", "ipam.gateway", "ipam.routes", "ipam.resolvConf"),
    *("ipam.ranges.0", "ipam.ranges.0.0", "ipam.ranges.0.0.subnet", "ipam.ranges.0.0.gateway", "ipam.routes.0"),
    *("ipam.routes.0.dst", "ipam.routes.0.gw", "ipam.routes.0.mtu", "ipam.routes.0.table", "ipam.routes.0.scope"),
    *("runtimeConfig.ips", "runtimeConfig.ips.0", "runtimeConfig.ipRanges", "runtimeConfig.ipRanges.0", "args.cni.ips"),
)


def with_value(path: str, value: Any) -> dict[str, Any]:
    """CONF with a value at a path of keys and indices."""
    document: Any = json.loads(json.dumps({**CONF, "ipam": {**pool(), "routes": [{"dst": "192.0.2.0/24"}]}}))
    here: Any = document
    *parents, last = path.split(".")
    for number, step in enumerate(parents):
        after = [*parents, last][number + 1]
        empty: Any = [None] if after.isdigit() else {}
        here = here[int(step)] if isinstance(here, list) else here.setdefault(step, empty)
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return dict(document)


@pytest.mark.parametrize("path", [*BRIDGE_KEYS, *IPAM_KEYS])
def test_every_kind_of_value_at_every_key(lab: Lab, space: Netns, path: str) -> None:
    before = lab.host.snapshot()
    for value in WRONG:
        document = with_value(path, value)
        answer = lab.cni("ADD", "bridge", document, netns=space)
        if answer.status == 0:
            # Right after all: null is absent, true is one for a switch. Then it is taken back.
            lab.cni("DEL", "bridge", document, netns=space).ok()
        else:
            proper(answer)
            for verb in ("CHECK", "GC", "STATUS"):
                more = lab.cni(verb, "bridge", {**document, "cni.dev/valid-attachments": []}, netns=space)
                if more.status:
                    proper(more, internal=verb == "CHECK")
            gone = lab.cni("DEL", "bridge", document, netns=space)
            if gone.status:
                proper(gone)
        for name in lab.bridges():
            lab.host.run(["ip", "link", "delete", "dev", name])
        assert set(space.links()) == {"lo"}, (path, value)
    lab.host.assert_clean(before)


NAMES = (
    *("../../etc/passwd", "/etc/passwd", "..", ".", "", " ", "a b", "a/b", "$(reboot)", "`reboot`", "a;reboot", "a|b"),
    *("a\nb", "a\tb", "-rf", "--help", "%s%n", "a\u00e9", "\u202e", "a@b", "a'b", 'a"b', "a\\b", "x" * 5000, "*", "~"),
)


@pytest.mark.parametrize("where", ["container", "ifname", "network"])
def test_names(lab: Lab, space: Netns, where: str) -> None:
    before = lab.host.snapshot()
    for name in NAMES:
        more: dict[str, Any] = {"netns": space}
        document = dict(CONF)
        if where == "network":
            document["name"] = name
        else:
            more["container_id" if where == "container" else "ifname"] = name
        for verb in ("ADD", "CHECK", "DEL"):
            answer = lab.cni(verb, "bridge", document, **more)
            if answer.status == 0:
                assert name in ("x" * 5000, "~", "a@b", "-rf", "--help"), (verb, name)
                continue
            proper(answer, internal=verb == "CHECK")
        lab.cni("DEL", "bridge", CONF, netns=space)
    for name in lab.bridges():
        lab.host.run(["ip", "link", "delete", "dev", name])
    lab.host.assert_clean(before)
    assert set(space.links()) == {"lo"}


def test_environments_of_real_processes(lab: Lab, space: Netns) -> None:
    before = lab.host.snapshot()
    environments: tuple[dict[str, str | None], ...] = (
        {"CNI_COMMAND": "add"},
        {"CNI_COMMAND": "ADD "},
        {"CNI_COMMAND": "\udcff"},
        {"CNI_CONTAINERID": None},
        {"CNI_CONTAINERID": "\udcff\udcfe"},
        {"CNI_IFNAME": None},
        {"CNI_IFNAME": "x" * 16},
        {"CNI_NETNS": None},
        {"CNI_NETNS": "\udcff"},
        {"CNI_PATH": None},
        {"CNI_ARGS": "a"},
        {"CNI_ARGS": "a=b=c"},
        {"CNI_ARGS": "\udcff=1"},
        {"CNI_ARGS": "IgnoreUnknown=perhaps"},
        {"NETLOOM_RUN_DIR": "relative"},
        {"NETLOOM_RUN_DIR": "/proc/nowhere"},
        {"NETLOOM_IPAMD_SOCKET": "relative"},
    )
    for environment in environments:
        answer = lab.host.cni("ADD", "bridge", CONF, netns=space, env=environment)
        proper(answer)
        assert answer.code() in (4, 5, 8), environment
    lab.host.assert_clean(before)


def test_without_a_place_for_records(lab: Lab, space: Netns) -> None:
    # A read-only or full run directory: refused before anything is done.
    lab.host.path("/run/readonly").mkdir()
    lab.host.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/run/readonly"])
    socket = {"NETLOOM_RUN_DIR": "/run/readonly", "NETLOOM_IPAMD_SOCKET": "/run/netloom/ipamd.sock"}
    before = lab.host.snapshot()
    answer = lab.host.cni("ADD", "bridge", CONF, netns=space, env=socket)
    proper(answer)
    assert answer.code() == 5
    lab.host.assert_clean(before)
    lab.host.run(["umount", "/run/readonly"])


def test_a_variable_does_not_reach_the_interpreter(lab: Lab, space: Netns) -> None:
    evil = lab.host.path("/run/evil")
    evil.mkdir()
    (evil / "sitecustomize.py").write_text("open('/run/evil/executed', 'w')")
    (evil / "cni.py").write_text("open('/run/evil/executed', 'w')")
    for environment in (
        {"PYTHONPATH": "/run/evil"},
        {"PYTHONSTARTUP": "/run/evil/cni.py"},
        {"PYTHONHOME": "/run/evil"},
    ):
        answer = lab.host.cni("VERSION", "bridge", b"", env=environment)
        answer.ok()
    assert not (evil / "executed").exists()


def test_random_bytes_in_place_of_bytes(lab: Lab, space: Netns) -> None:
    chance = random.Random(7)
    before = lab.host.snapshot()
    plain = json.dumps({**CONF, "ipam": {**pool(), "routes": [{"dst": "192.0.2.0/24"}]}}).encode()
    for _ in range(300):
        mangled = bytearray(plain)
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(len(mangled))
            match chance.randrange(3):
                case 0:
                    mangled[place] = chance.randrange(256)
                case 1:
                    del mangled[place : place + chance.randrange(1, 9)]
                case _:
                    mangled[place:place] = chance.randbytes(chance.randrange(1, 5))
        answer = lab.cni("ADD", "bridge", bytes(mangled), netns=space)
        if answer.status == 0:
            lab.cni("DEL", "bridge", bytes(mangled), netns=space).ok()
        else:
            # The kernel's own refusals (an unreachable gateway, say) have no code of their own.
            proper(answer, internal=True)
        assert set(space.links()) == {"lo"}
    for name in lab.bridges():
        lab.host.run(["ip", "link", "delete", "dev", name])
    lab.host.assert_clean(before)
