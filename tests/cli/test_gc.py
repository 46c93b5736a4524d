"""`netloom gc`: containers die without a DEL, and what they left is taken back."""

import json
import os
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROOT, Ipamd, Netloom
from tests.hosts import Host, Netns, wait_until

BRIDGE = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "bridge",
    "bridge": "nl0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "ipamd", "ranges": [[{"subnet": "10.1.0.0/24"}]]},
}
_ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C"}


def _netloom(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    return host.run([sys.executable, "-m", "cli", *words], env=_ENVIRONMENT, check=False)


def _gc(host: Host, *words: str) -> dict[str, Any]:
    done = _netloom(host, "gc", "--json", *words)
    assert (done.returncode, done.stderr) == (0, ""), done
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _containers(allocations: list[dict[str, Any]]) -> list[str]:
    return [entry["container_id"] for entry in allocations]


def _add(host: Host, container: str) -> Netns:
    netns = host.netns(container)
    host.cni("ADD", "bridge", BRIDGE, container_id=container, netns=netns).ok()
    return netns


def _masqueraded(host: Host) -> list[object]:
    sets = [entry["set"] for entry in host.nft() if "set" in entry and entry["set"]["name"] == "masq4"]
    return [element for one in sets for element in one.get("elem", [])]


def _attachments(host: Host) -> list[Path]:
    return [path for path in host.path("/run/netloom/attachments").rglob("*") if path.is_file()]


@pytest.mark.kernel
def test_what_the_dead_left_goes_after_two_looks(host: Host) -> None:
    host.start_ipamd(reclaim={"grace_s": 0, "interval_s": 0})
    _add(host, "alive")
    dead = _add(host, "dead")
    assert _gc(host)["suspected"] == []
    dead.delete()
    wait_until(lambda: len(_gc(host, "--dry-run")["leftovers"]) == 1, "the end of the namespace")

    # A dry run says what would be, and changes nothing: neither in the kernel nor in ipamd's memory.
    for _ in range(2):
        document = _gc(host, "--dry-run")
        assert document["dry_run"] is True
        assert [entry["container_id"] for entry in document["leftovers"]] == ["dead"]
        assert document["released"] == []
        assert _containers(document["suspected"]) == ["dead"]
    assert len(_attachments(host)) == 2
    assert len(_masqueraded(host)) == 2

    first = _gc(host)
    assert first["namespaces"] >= 2
    assert [(entry["container_id"], entry["plugin"]) for entry in first["leftovers"]] == [("dead", "bridge")]
    assert first["released"] == []
    assert _containers(first["suspected"]) == ["dead"]
    assert first["suspected"][0]["reason"]
    assert len(_attachments(host)) == 1
    assert len(_masqueraded(host)) == 1

    people = _netloom(host, "gc")
    assert people.returncode == 0
    assert "released:" in people.stdout
    assert "10.1.0.3" in people.stdout
    assert "suspected: nothing" in people.stdout
    assert _containers(json.loads(_netloom(host, "ip", "list", "--json").stdout)["allocations"]) == ["alive"]
    assert _gc(host)["released"] == []
    assert len(host.links()) == 3, "loopback, the bridge and the living container's veth"


@pytest.mark.kernel
def test_rebuild_restores_what_somebody_flushed(host: Host) -> None:
    host.start_ipamd()
    _add(host, "one")
    before = host.nft()
    host.run([sys.executable, "-c", "from kernel import nft; nft.delete_tables()"])
    assert not _masqueraded(host)
    document = _gc(host, "--rebuild")
    assert document["rebuilt"]["added"] >= 1
    assert document["leftovers"] == []
    assert len(_masqueraded(host)) == 1
    assert len(host.nft()) == len(before)
    assert _gc(host, "--rebuild")["rebuilt"] == {"added": 0, "removed": 0}


@pytest.mark.kernel
def test_the_kernel_is_put_right_also_while_ipamd_is_away(host: Host) -> None:
    daemon = host.start_ipamd()
    dead = _add(host, "dead")
    daemon.stop()
    dead.delete()
    wait_until(lambda: "dead" in _netloom(host, "gc", "--dry-run").stdout, "the end of the namespace")
    done = _netloom(host, "gc", "--json")
    assert done.returncode == 3
    assert "ipamd is not running" in done.stderr
    document = json.loads(done.stdout)
    assert [entry["container_id"] for entry in document["leftovers"]] == ["dead"]
    assert document["released"] is None
    assert _attachments(host) == []


@pytest.mark.kernel
def test_status_counts_what_the_kernel_holds(host: Host) -> None:
    host.start_ipamd()
    _add(host, "one")
    done = _netloom(host, "status", "--json")
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    assert document["kernel"] == {"attachments": 1, "releases_waiting": 0, "releases_bad": 0}
    assert document["ipamd"]["allocations"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to stop being root")
def test_only_root_may(ipamd: Ipamd, netloom: Netloom) -> None:
    os.seteuid(65534)
    try:
        ran = netloom("gc")
    finally:
        os.seteuid(0)
    assert (ran.status, ran.out) == (4, "")
    assert "sudo" in ran.err


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "--version"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("netloom ")


# Docker's driver


class Driver:
    """Docker's driver, played: one answer to every call on its socket, and the calls that came."""

    def __init__(self, path: Path, status: int, answer: str) -> None:
        calls: list[tuple[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                calls.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: object) -> None:
                pass

        self.calls = calls
        self._server = socketserver.UnixStreamServer(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "Driver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


FOUND = {
    "Removed": [{"Kind": "endpoint", "Name": "e1"}],
    "Suspected": [{"Kind": "address", "Name": "docker-10.1.0.0_24 10.1.0.2", "MissingS": 12.5}],
    "GraceS": 60.0,
}


@pytest.fixture
def plugin_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:  # a short path
        monkeypatch.setattr("cli.shim.SOCKET", f"{directory}/netloom.sock")
        yield Path(directory, "netloom.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_dockers_driver_compares_at_once(ipamd: Ipamd, netloom: Netloom, plugin_socket: Path) -> None:
    with Driver(plugin_socket, 200, json.dumps(FOUND)) as driver:
        told = netloom("gc")
        document = json.loads(netloom("gc", "--dry-run", "--json").out)["docker"]
        would = netloom("gc", "--dry-run").out
    assert driver.calls[:2] == [
        ("/Netloom.Collect", '{"DryRun": false}'),
        ("/Netloom.Collect", '{"DryRun": true}'),
    ]
    assert told.status == 0, told
    lines = [" ".join(line.split()) for line in told.out.splitlines()]
    where = lines.index("removed, as Docker does not have it:")
    assert lines[where : where + 6] == [
        "removed, as Docker does not have it:",
        "KIND NAME",
        "endpoint e1",
        "Docker does not have it, and after 60 s it goes:",
        "KIND NAME MISSING S",
        "address docker-10.1.0.0_24 10.1.0.2 12.5",
    ]
    assert "would be removed, as Docker does not have it:" in would
    assert document["error"] == ""
    assert document["removed"] == [{"kind": "endpoint", "name": "e1"}]
    assert document["suspected"][0]["missing_s"] == 12.5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (200, '{"Err": "nothing was compared: Docker at /x: refused"}', "nothing was compared: Docker at /x: refused"),
        (404, '{"Err": "netloom-docker knows no call Netloom.Collect"}', "knows no call Netloom.Collect"),
        (500, "{}", "status 500"),
        (200, "no JSON", "the driver's answer makes no sense: JSONDecodeError"),
        (200, "[]", "the driver's answer makes no sense: AttributeError"),
        (200, '{"Removed": []}', "the driver's answer makes no sense: KeyError"),
    ],
)
def test_a_driver_that_cannot_compare_keeps_nothing_else_from_being_done(
    ipamd: Ipamd, netloom: Netloom, plugin_socket: Path, status: int, answer: str, words: str
) -> None:
    with Driver(plugin_socket, status, answer):
        ran = netloom("gc")
        document = json.loads(netloom("gc", "--json").out)
    assert ran.status == 0
    assert words in ran.out
    assert "released: nothing" in ran.out
    assert words in document["docker"]["error"]
    assert document["released"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_driver_that_is_away_is_told(ipamd: Ipamd, netloom: Netloom, plugin_socket: Path) -> None:
    assert json.loads(netloom("gc", "--json").out)["docker"] is None
    with Driver(plugin_socket, 200, "{}"):
        pass
    ran = netloom("gc")  # the socket is there, and nobody listens
    assert ran.status == 0
    assert "the driver does not answer: Connection refused" in ran.out
    assert "released: nothing" in ran.out
