"""A system bus with a firewalld on it, for tests: `python -m tests.kernel.bus LOG` is that firewalld.

The bus is Debian's dbus-daemon. The firewalld knows the zones "trusted" and "public", keeps their sources, answers as
the real one does (firewall/core/fw_zone.py, firewall/errors.py), and writes down each call.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kernel import firewalld
from kernel.firewalld import DESTINATION, ERROR, ERROR_NAME, MEMBER, METHOD_RETURN, REPLY_SERIAL, SENDER, Bus, Value
from tests.hosts import Host

PYTHON = sys.executable
_LOG = "/run/firewalld.log"
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


@contextlib.contextmanager
def running(host: Host) -> Iterator[None]:
    """A system bus in a host for the duration of the block."""
    host.path("/run/dbus").mkdir()
    host.path("/run/dbus.conf").write_text(_CONFIG.format(path=firewalld.BUS), encoding="ascii")
    argv = ["dbus-daemon", "--config-file=/run/dbus.conf", "--nofork", "--nopidfile", "--print-address"]
    with _started(host, argv):
        yield
    for name in ("/run/dbus.conf", firewalld.BUS):
        host.path(name).unlink(missing_ok=True)
    host.path("/run/dbus").rmdir()


@contextlib.contextmanager
def firewalld_running(host: Host) -> Iterator[Callable[[], list[str]]]:
    """A firewalld on the bus for the duration of the block. Gives what lists the calls so far."""
    log = host.path(_LOG)
    log.touch()
    with _started(host, [PYTHON, "-m", "tests.kernel.bus", _LOG]):
        yield lambda: log.read_text(encoding="utf-8").splitlines()
    log.unlink()


@contextlib.contextmanager
def _started(host: Host, argv: list[str]) -> Iterator[None]:
    """A program that says with its first line that it is ready."""
    process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Zones:
    """What a firewalld keeps while it runs."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}

    def answer(self, method: str, zone: str, source: str) -> Value:
        """Raises ValueError with firewalld's words."""
        if zone not in ("trusted", "public"):
            raise ValueError(f"INVALID_ZONE: {zone}")
        held = self.sources.get(source)
        match method:
            case "addSource":
                if held == zone:
                    raise ValueError(f"ZONE_ALREADY_SET: '{source}' already bound to '{zone}'")
                if held is not None:
                    raise ValueError(f"ZONE_CONFLICT: '{source}' already bound to '{held}'")
                self.sources[source] = zone
                return zone
            case "removeSource":
                if held is None:
                    raise ValueError(f"UNKNOWN_SOURCE: '{source}' is not in any zone")
                del self.sources[source]
                return held
            case "querySource":
                return held == zone
        raise ValueError(f"there is no method {method}")


def main(log: str) -> None:
    """Serve until the bus ends."""
    bus = Bus(firewalld.BUS)
    bus.call(
        "take the name",
        "org.freedesktop.DBus",
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        "RequestName",
        "org.fedoraproject.FirewallD1",
        4,
    )
    zones = Zones()
    print("ready", flush=True)
    while True:
        call = bus.receive()
        if call.kind != firewalld.METHOD_CALL:
            continue
        method = str(call.fields[MEMBER])
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(" ".join([method, *map(str, call.arguments)]) + "\n")
        fields: dict[int, Value] = {REPLY_SERIAL: call.serial, DESTINATION: call.fields[SENDER]}
        try:
            zone, source = (str(one) for one in call.arguments)
            bus.send(METHOD_RETURN, fields, zones.answer(method, zone, source))
        except ValueError as error:
            bus.send(ERROR, {**fields, ERROR_NAME: "org.fedoraproject.FirewallD1.Exception"}, str(error))


if __name__ == "__main__":
    main(sys.argv[1])
