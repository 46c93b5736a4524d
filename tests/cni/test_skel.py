"""cni.skel: every verb at every version through fakes; what goes wrong, and what is undone then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cni import registry, skel, versions
from cni.errors import CniError, Code
from cni.request import Request
from cni.result import Interface, IPConfig, Result, Route
from cni.skel import Outcome, Plugin
from cni.undo import Undo
from kernel.session import Session
from kernel.version import VERSION
from tests.cni.test_config import HOSTILE

RESULT = Result(
    (Interface("eth0", "02:00:00:00:00:01", "/run/netns/x"),),
    (IPConfig("10.0.0.5/24", "10.0.0.1", 0),),
    (Route("0.0.0.0/0"),),
)
OWN_NETNS = "/proc/self/ns/net"
VERBS = ("ADD", "DEL", "CHECK", "GC", "STATUS")


class Host:
    """Stands for a Session: fakes do not touch it."""


class Fake:
    """A plugin that records how it was called, and fails where it is told to."""

    def __init__(self, result: Result = RESULT, fail: BaseException | None = None) -> None:
        self.result = result
        self.fail = fail
        self.calls: list[str] = []
        self.requests: list[Request] = []

    def _called(self, verb: str, request: Request) -> None:
        self.calls.append(verb)
        self.requests.append(request)
        if self.fail is not None:
            raise self.fail

    def add(self, request: Request, host: Session, undo: Undo) -> Result:
        undo.push("take the first step back", lambda: self.calls.append("undo 1"))
        undo.push("take the second step back", lambda: self.calls.append("undo 2"))
        self._called("ADD", request)
        return self.result

    def delete(self, request: Request, host: Session) -> None:
        self._called("DEL", request)

    def check(self, request: Request, host: Session) -> None:
        self._called("CHECK", request)

    def gc(self, request: Request, host: Session) -> None:
        self._called("GC", request)

    def status(self, request: Request, host: Session) -> None:
        self._called("STATUS", request)


class Runner:
    """skel.run with the surroundings of a test."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.opened = 0
        self.read = 0

    def open_host(self) -> Session:
        self.opened += 1
        return cast("Session", Host())

    def __call__(
        self,
        verb: str | None,
        fake: Fake,
        *,
        plugin: str = "bridge",
        stdin: bytes | Callable[[], bytes] | None = None,
        env: dict[str, str] | None = None,
        deliver: skel.Deliver | None = None,
        **conf: Any,
    ) -> Outcome:
        environment = {
            "CNI_COMMAND": verb or "",
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": OWN_NETNS,
            # The namespace of the tests is the only one at hand without privilege.
            "CNI_NETNS_OVERRIDE": "1",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/nowhere",
            "NETLOOM_RUN_DIR": str(self.run_dir),
            **(env or {}),
        }
        document = {"cniVersion": "1.1.0", "name": "net", "cni.dev/valid-attachments": [], **conf}

        def read_stdin() -> bytes:
            self.read += 1
            if callable(stdin):
                return stdin()
            return json.dumps(document).encode() if stdin is None else stdin

        def load(_plugin: str) -> Plugin:
            return fake

        return skel.run(plugin, environment, read_stdin, self.open_host, load, deliver)

    @property
    def locks(self) -> list[str]:
        directory = self.run_dir / "locks"
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def error(outcome: Outcome) -> dict[str, Any]:
    """The error object of an outcome that is one."""
    assert outcome.status == 1
    document = json.loads(outcome.stdout)
    assert set(document) <= {"cniVersion", "code", "msg", "details"}
    assert document["cniVersion"] in versions.SUPPORTED
    return cast("dict[str, Any]", document)


# --- what is printed ---


@pytest.mark.parametrize("plugin", registry.PLUGINS)
@pytest.mark.parametrize("version", versions.SUPPORTED)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_at_every_version(run: Runner, plugin: str, verb: str, version: str) -> None:
    fake = Fake()
    outcome = run(verb, fake, plugin=plugin, cniVersion=version)
    since = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(verb, "0.1.0")
    if not versions.at_least(version, since):
        document = error(outcome)
        assert (document["code"], document["msg"]) == (1, f"config version does not allow {verb}")
        assert document["cniVersion"] == version
        assert fake.calls == []
        return
    supported = versions.supported_from(registry.PLUGINS[plugin].oldest)
    if version not in supported:
        document = error(outcome)
        assert (document["code"], document["msg"]) == (1, "incompatible CNI versions")
        assert all(one in document["details"] for one in supported)
        assert fake.calls == []
        return
    assert (outcome.status, outcome.stderr) == (0, b"")
    assert fake.calls == [verb]
    assert fake.requests[0].command == verb
    assert fake.requests[0].plugin == plugin
    assert fake.requests[0].cni_version == version
    if verb == "ADD":
        assert json.loads(outcome.stdout) == versions.encode(RESULT, version)
    else:
        assert outcome.stdout == b""
    assert run.locks == []


def test_a_result_is_printed_as_the_reference_prints_it(run: Runner) -> None:
    assert (
        run("ADD", Fake(), cniVersion="0.4.0").stdout
        == b"""{
    "cniVersion": "0.4.0",
    "interfaces": [
        {
            "name": "eth0",
            "mac": "02:00:00:00:00:01",
            "sandbox": "/run/netns/x"
        }
    ],
    "ips": [
        {
            "version": "4",
            "interface": 0,
            "address": "10.0.0.5/24",
            "gateway": "10.0.0.1"
        }
    ],
    "routes": [
        {
            "dst": "0.0.0.0/0"
        }
    ],
    "dns": {}
}"""
    )


def test_an_error_is_printed_as_the_reference_prints_it(run: Runner) -> None:
    outcome = run("ADD", Fake(fail=CniError(Code.TRY_AGAIN_LATER, "no", "later")), cniVersion="0.3.1")
    assert (
        outcome.stdout
        == b"""{
    "cniVersion": "0.3.1",
    "code": 11,
    "msg": "no",
    "details": "later"
}"""
    )
    assert outcome.status == 1


@pytest.mark.parametrize("plugin", registry.PLUGINS)
def test_version(run: Runner, plugin: str) -> None:
    outcome = run("VERSION", Fake(), plugin=plugin, env={"CNI_PATH": "", "CNI_IFNAME": "../.."})
    first = {"bandwidth": "0.3.0", "firewall": "0.4.0"}.get(plugin, "0.1.0")  # as the reference plugins
    every = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    listed = ",".join(f'"{version}"' for version in every[every.index(first) :])
    assert outcome == Outcome(f'{{"cniVersion":"1.1.0","supportedVersions":[{listed}]}}\n'.encode())
    assert (run.read, run.opened) == (0, 0)


def test_a_plugin_lists_what_it_supports(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PLUGINS", {"late": registry.Entry("late", "none", "chained", "0.4.0")})
    listed = json.loads(run("VERSION", Fake(), plugin="late").stdout)["supportedVersions"]
    assert listed == ["0.4.0", "1.0.0", "1.1.0"]
    document = error(run("ADD", Fake(), plugin="late", cniVersion="0.3.1"))
    assert document["details"] == 'config is "0.3.1", plugin supports ["0.4.0" "1.0.0" "1.1.0"]'


def test_without_a_verb_it_says_who_it_is(run: Runner) -> None:
    outcome = run(None, Fake(), stdin=b"junk")
    assert (outcome.stdout, outcome.status) == (b"", 0)
    assert (
        outcome.stderr
        == (
            f"CNI bridge plugin v{VERSION} (netloom)\n"
            "CNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
        ).encode()
    )
    assert run.read == 0


def test_each_request_has_an_id_and_a_moment(run: Runner) -> None:
    fake = Fake()
    run("ADD", fake)
    run("DEL", fake)
    ids = {request.request_id for request in fake.requests}
    assert len(ids) == 2
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in ids)
    assert 0 < fake.requests[0].began_ns < fake.requests[1].began_ns


# --- refusals ---


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("stdin", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_stdin_touches_nothing(run: Runner, verb: str, stdin: bytes) -> None:
    fake = Fake()
    document = error(run(verb, fake, stdin=stdin))
    assert document["code"] == 6
    assert document["cniVersion"] == "1.1.0"
    assert fake.calls == []
    assert run.opened == 0
    assert run.locks == []


@pytest.mark.parametrize(
    ("conf", "code", "text"),
    [
        ({"name": None}, 7, "missing network name"),
        ({"name": "../x"}, 7, "invalid characters found in network name"),
        ({"cniVersion": "9.9.9"}, 1, "incompatible CNI versions"),
        ({"type": "../bridge"}, 7, "$.type"),
        ({"prevResult": {"ips": 5}}, 7, "$.prevResult.ips"),
    ],
)
def test_refused_configurations_touch_nothing(run: Runner, conf: dict[str, Any], code: int, text: str) -> None:
    fake = Fake()
    document = error(run("ADD", fake, **conf))
    assert document["code"] == code
    assert text in document["msg"]
    assert fake.calls == []
    assert run.opened == 0


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"CNI_COMMAND": "UPDATE"}, "unknown CNI_COMMAND: UPDATE"),
        ({"CNI_PATH": "", "CNI_NETNS": ""}, "required env variables [CNI_NETNS,CNI_PATH] missing"),
        ({"CNI_CONTAINERID": "../x"}, "invalid characters in containerID"),
        ({"CNI_IFNAME": "a" * 16}, "interface name is too long"),
    ],
)
def test_the_environment_is_checked_before_stdin_is_read(run: Runner, env: dict[str, str], text: str) -> None:
    document = error(run("ADD", Fake(), env=env))
    assert (document["code"], document["msg"]) == (4, text)
    assert run.read == 0


def test_stdin_that_cannot_be_read_is_code_5(run: Runner) -> None:
    def broken() -> bytes:
        raise OSError(5, "Input/output error")

    document = error(run("ADD", Fake(), stdin=broken))
    assert (document["code"], document["msg"]) == (5, "error reading from stdin: Input/output error")


def test_a_relative_run_directory_is_refused(run: Runner) -> None:
    document = error(run("ADD", Fake(), env={"NETLOOM_RUN_DIR": "run"}))
    assert document["code"] == 4
    assert "NETLOOM_RUN_DIR" in document["msg"]


# --- what a plugin raises ---


@pytest.mark.parametrize("verb", VERBS)
def test_any_exception_is_an_error_object(run: Runner, verb: str) -> None:
    outcome = run(verb, Fake(fail=RuntimeError("the disk is on fire")))
    document = error(outcome)
    assert (document["code"], document["msg"]) == (999, "the disk is on fire")
    assert b"Traceback" in outcome.stderr
    assert b"RuntimeError: the disk is on fire" in outcome.stderr
    assert b"Traceback" not in outcome.stdout


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        (ValueError(), "ValueError"),
        (KeyError("x"), "'x'"),
        (AssertionError(), "AssertionError"),
        (KeyboardInterrupt("SIGTERM"), "interrupted by a signal: SIGTERM"),
        (KeyboardInterrupt(), "interrupted by a signal"),
        (SystemExit(3), "the plugin ended with exit status 3"),
        (RecursionError("deep"), "deep"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("\udcff\n"), "\\udcff\n"),
    ],
)
def test_unusual_exceptions(run: Runner, fail: BaseException, text: str) -> None:
    document = error(run("ADD", Fake(fail=fail)))
    assert (document["code"], document["msg"]) == (999, text)


def test_a_host_that_cannot_be_opened_is_an_error_object(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Session:
        raise RuntimeError("no socket")

    monkeypatch.setattr(run, "open_host", broken)
    fake = Fake()
    assert error(run("ADD", fake))["msg"] == "no socket"
    assert fake.calls == []
    assert run.locks == []


def test_a_plugin_outside_the_registry_is_an_error_object(run: Runner) -> None:
    assert error(run("ADD", Fake(), plugin="../bridge"))["code"] == 999


# --- commit and undo ---


def test_a_failed_add_is_undone_in_reverse(run: Runner) -> None:
    fake = Fake(fail=CniError(Code.POOL_EXHAUSTED, "full"))
    assert error(run("ADD", fake))["code"] == 100
    assert fake.calls == ["ADD", "undo 2", "undo 1"]
    assert run.locks == []


def test_a_successful_add_is_not_undone(run: Runner) -> None:
    fake = Fake()
    run("ADD", fake)
    assert fake.calls == ["ADD"]


@pytest.mark.parametrize("version", ["", "0.1.0", "0.2.0"])
def test_a_result_that_the_version_cannot_express_is_undone(run: Runner, version: str) -> None:
    fake = Fake(Result(RESULT.interfaces))
    document = error(run("ADD", fake, cniVersion=version))
    assert (document["code"], document["msg"]) == (7, "cannot convert: no valid IP addresses")
    assert fake.calls == ["ADD", "undo 2", "undo 1"]


def test_a_result_that_is_none_is_undone(run: Runner) -> None:
    fake = Fake(cast("Result", None))
    assert error(run("ADD", fake))["code"] == 999
    assert fake.calls == ["ADD", "undo 2", "undo 1"]


def test_an_inverse_that_fails_is_logged_and_the_first_cause_answered(run: Runner) -> None:
    class Stubborn(Fake):
        def add(self, request: Request, host: Session, undo: Undo) -> Result:
            undo.push("first", lambda: self.calls.append("first"))
            undo.push("second", lambda: 1 // 0)
            raise CniError(5, "cause")

    fake = Stubborn()
    outcome = run("ADD", fake)
    assert error(outcome)["msg"] == "cause"
    assert fake.calls == ["first"]
    assert b"undoing the ADD: second: " in outcome.stderr


@pytest.mark.parametrize("verb", [*VERBS, "VERSION", None, "UPDATE"])
def test_everything_is_delivered_exactly_once(run: Runner, verb: str | None) -> None:
    delivered: list[Outcome] = []
    outcome = run(verb, Fake(), deliver=delivered.append)
    assert delivered == [outcome]


def test_a_failure_is_delivered_exactly_once(run: Runner) -> None:
    delivered: list[Outcome] = []
    outcome = run("ADD", Fake(fail=RuntimeError("no")), deliver=delivered.append)
    assert delivered == [outcome]
    assert error(outcome)["code"] == 999


def test_an_add_is_delivered_under_its_lock_and_before_it_is_committed(run: Runner) -> None:
    fake = Fake()
    seen: list[object] = []

    def deliver(outcome: Outcome) -> None:
        seen.append((outcome.status, run.locks, list(fake.calls)))

    run("ADD", fake, deliver=deliver)
    assert seen == [(0, ["c1@eth0"], ["ADD"])]
    assert run.locks == []


@pytest.mark.parametrize("failure", [BrokenPipeError(32, "Broken pipe"), KeyboardInterrupt("SIGTERM"), ValueError()])
def test_an_add_that_cannot_be_delivered_is_undone_under_its_lock(run: Runner, failure: BaseException) -> None:
    locks: list[list[str]] = []

    class Watching(Fake):
        def add(self, request: Request, host: Session, undo: Undo) -> Result:
            undo.push("look", lambda: locks.append(run.locks))
            return super().add(request, host, undo)

    fake = Watching()
    attempts: list[Outcome] = []

    def deliver(outcome: Outcome) -> None:
        attempts.append(outcome)
        raise failure

    outcome = run("ADD", fake, deliver=deliver)
    assert len(attempts) == 1
    assert attempts[0].status == 0
    assert fake.calls == ["ADD", "undo 2", "undo 1"]
    assert locks == [["c1@eth0"]]
    assert (outcome.stdout, outcome.status) == (b"", 1)
    assert b"could not be delivered" in outcome.stderr
    assert run.locks == []


@pytest.mark.parametrize("verb", ["DEL", "CHECK", "GC", "STATUS", "VERSION", "UPDATE"])
def test_other_answers_that_cannot_be_delivered_are_failures(run: Runner, verb: str) -> None:
    def deliver(outcome: Outcome) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    outcome = run(verb, Fake(), deliver=deliver)
    assert (outcome.stdout, outcome.status) == (b"", 1)


# --- locks ---


@pytest.mark.parametrize(
    ("plugin", "verb", "expected"),
    [
        *[("bridge", verb, ["c1@eth0"]) for verb in ("ADD", "DEL", "CHECK")],
        *[("bridge", verb, []) for verb in ("GC", "STATUS")],
        *[("ipamd", verb, []) for verb in VERBS],
    ],
)
def test_who_holds_the_lock(run: Runner, plugin: str, verb: str, expected: list[str]) -> None:
    seen: list[list[str]] = []

    class Watching(Fake):
        def _called(self, verb: str, request: Request) -> None:
            seen.append(run.locks)

    run(verb, Watching(), plugin=plugin)
    assert seen == [expected]
    assert run.locks == []


# --- namespaces ---


@pytest.mark.parametrize("verb", ["ADD", "CHECK"])
def test_a_namespace_that_is_none_is_code_8(run: Runner, verb: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in (str(tmp_path / "absent"), str(plain), str(tmp_path), "/dev/null", "/proc/self/ns/mnt", "x\0y", "rel"):
        fake = Fake()
        document = error(run(verb, fake, env={"CNI_NETNS": path}))
        assert document["code"] == 8
        assert document["msg"] == f"failed to open netns {path!a}"
        assert fake.calls == []
        assert run.opened == 0


def test_del_goes_on_without_a_namespace_that_is_none(run: Runner, tmp_path: Path) -> None:
    gone = ("", str(tmp_path / "absent"))
    for path in (*gone, "/dev/null", "/proc/self/ns/mnt", "x\0y"):
        fake = Fake()
        outcome = run("DEL", fake, env={"CNI_NETNS": path})
        assert (outcome.stdout, outcome.status) == (b"", 0)
        assert fake.requests[0].netns == ""
        assert bool(outcome.stderr) is (path not in gone)


def test_adding_to_the_plugins_own_namespace_is_refused_before_the_work(run: Runner) -> None:
    fake = Fake()
    document = error(run("ADD", fake, env={"CNI_NETNS_OVERRIDE": ""}))
    assert document["code"] == 8
    assert document["msg"] == "plugin's netns and netns from CNI_NETNS should not be the same"
    assert fake.calls == []


@pytest.mark.parametrize("override", ["1", "true", "TRUE"])
def test_the_override_allows_it(run: Runner, override: str) -> None:
    fake = Fake()
    assert run("ADD", fake, env={"CNI_NETNS_OVERRIDE": override}).status == 0
    assert fake.requests[0].netns == OWN_NETNS


def test_del_never_touches_the_plugins_own_namespace(run: Runner) -> None:
    fake = Fake()
    outcome = run("DEL", fake, env={"CNI_NETNS_OVERRIDE": ""})
    assert outcome.status == 0
    assert fake.requests[0].netns == ""
    assert b"own" in outcome.stderr


def test_check_does_not_compare_namespaces(run: Runner) -> None:
    assert run("CHECK", Fake(), env={"CNI_NETNS_OVERRIDE": ""}).status == 0


def test_ipam_plugins_take_any_namespace(run: Runner) -> None:
    fake = Fake()
    assert run("ADD", fake, plugin="ipamd", env={"CNI_NETNS": "/absent", "CNI_NETNS_OVERRIDE": ""}).status == 0
    assert fake.requests[0].netns == "/absent"


# --- the registry ---


def test_registry_names_itself_right() -> None:
    assert set(registry.PLUGINS) >= {"bridge", "loopback", "ipamd"}
    for name, entry in registry.PLUGINS.items():
        assert entry.type == name
        assert entry.oldest in versions.SUPPORTED
        folder = {"interface": "cni.interface.", "chained": "cni.chained.", "ipam": "cni.ipam."}.get(entry.kind, "cni.")
        assert entry.module.startswith(folder)


@pytest.mark.parametrize("name", ["os", "../bridge", "", "cni.skel", "bridge\n"])
def test_only_what_is_in_the_registry_is_imported(name: str) -> None:
    with pytest.raises(KeyError):
        registry.load(name)
