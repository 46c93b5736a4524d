"""The way in: Makefile, build/ and .ci/run, in folders whose names are not kind to shells."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.hosts import ROOT, Host, wait_until

UNKIND = 'a folder, it\'s "so" $HOME & co'
PROJECT = '[project]\nname = "p"\nversion = "1"\ndependencies = [{}]\n[dependency-groups]\ndev = []\n'

# These tests are run by make themselves, mostly; the make that they start is not to know.
OUTSIDE_MAKE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def run(
    argv: list[str], cwd: Path, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        cwd=cwd,
        env={**OUTSIDE_MAKE, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Our scripts with a project that depends on nothing."""
    root = tmp_path / UNKIND
    root.mkdir()
    shutil.copytree(ROOT / "build", root / "build", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".ci", root / ".ci")
    shutil.copy(ROOT / "Makefile", root)
    (root / "pyproject.toml").write_text(PROJECT.format(""))
    return root


def test_make_alone_lists_every_target_that_is_for_people(clone: Path) -> None:
    listed = [line.split()[0] for line in run(["make"], clone, check=True).stdout.splitlines()]
    rules = re.findall(r"^([a-z][a-z-]*):", (clone / "Makefile").read_text(), re.MULTILINE)
    assert set(listed) == set(rules) - {"venv"}
    assert len(listed) == len(set(listed))


def test_a_group_without_tests_says_so_and_is_no_failure(clone: Path) -> None:
    done = run(["make", "test-docker"], clone, check=True)
    assert done.stdout == "test-docker: there are no tests in tests/docker yet\n"


def test_requirements_are_those_of_pyproject() -> None:
    printed = run([sys.executable, "-I", "build/requirements.py", "list"], ROOT, check=True).stdout.splitlines()
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert printed == document["project"]["dependencies"] + document["dependency-groups"]["dev"]


def test_every_requirement_is_pinned() -> None:
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "build/constraints.txt").open()}
    names = run([sys.executable, "-I", "build/requirements.py", "list"], ROOT, check=True).stdout.splitlines()
    assert {name.partition(">=")[0] for name in names} <= pins


def test_the_virtual_environment_is_made_once_and_again_when_it_is_not_what_it_should_be(clone: Path) -> None:
    def made() -> bool:
        done = run(["make", "venv"], clone, check=True)
        assert run([".venv/bin/python", "-I", "-c", "import pip"], clone).returncode == 0
        return "making .venv" in done.stderr

    assert made()
    assert not made()
    (clone / ".venv/netloom.stamp").unlink()  # killed before it was complete
    assert made()
    moved = clone.with_name("moved")
    clone.rename(moved)
    assert "making .venv" in run(["make", "venv"], moved, check=True).stderr


def test_the_stamp_changes_with_what_the_environment_holds_and_where_it_is(clone: Path) -> None:
    def stamp(root: Path) -> str:
        return run([sys.executable, "-I", "build/requirements.py", "stamp"], root, check=True).stdout

    stamps = [stamp(clone)]
    (clone / "pyproject.toml").write_text(PROJECT.format("") + "[tool.other]\n")
    assert stamp(clone) == stamps[0], "of no meaning to the environment"
    (clone / "pyproject.toml").write_text(PROJECT.format('"x"'))
    stamps.append(stamp(clone))
    (clone / "build/constraints.txt").write_text("x==1\n")
    stamps.append(stamp(clone))
    clone.rename(clone.with_name("moved"))
    stamps.append(stamp(clone.with_name("moved")))
    assert len(set(stamps)) == 4


def test_two_at_once_make_one_environment(clone: Path) -> None:
    both = [
        subprocess.Popen(
            ["make", "venv"], cwd=clone, env=OUTSIDE_MAKE, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("making .venv" in text for text in said) == 1


def test_what_pip_could_not_do_is_shown_and_leaves_no_stamp(clone: Path) -> None:
    (clone / "pyproject.toml").write_text(PROJECT.format('"netloom-has-no-such-package"'))
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}
    done = run(["make", "venv"], clone, nowhere)
    assert done.returncode == 2
    assert "netloom-has-no-such-package" in done.stderr
    assert "netloom: pip could not install what pyproject.toml names" in done.stderr
    assert not (clone / ".venv/netloom.stamp").exists()


def test_a_python_that_is_too_old_is_said_in_one_line(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\necho Python 3.9.2\n')
    (tmp_path / "python3").chmod(0o755)
    script = (clone / "build/python").read_text().replace("/usr/bin/python3", str(tmp_path / "python3"))
    (clone / "build/python").write_text(script)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname"):
        (tools / tool).symlink_to(f"/bin/{tool}" if tool == "sh" else "/usr/bin/dirname")
    done = run(["/bin/sh", "build/python"], clone, {"PATH": f"{tmp_path}:{tools}"})
    assert done.returncode == 2
    assert done.stderr.startswith("netloom: Python 3.11 or newer is needed, found: Python 3.9.2;")
    assert done.stderr.count("\n") == 1


def test_the_plugins_for_work_in_the_repository_run_from_any_path(tmp_path: Path) -> None:
    root = tmp_path / UNKIND
    for package in ("build", "cni", "kernel", "telemetry"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-I", str(root / "build/devbin.py"), "bin"], root, check=True)
    env = {"CNI_COMMAND": "VERSION", "PYTHONPATH": "/nonsense", "PYTHONHOME": "/nonsense"}
    done = run([str(root / "bin/bridge")], tmp_path, env, check=True)
    assert json.loads(done.stdout)["supportedVersions"][-1] == "1.1.0"


def fake_make(directory: Path, failing: str) -> None:
    directory.mkdir()
    (directory / "make").write_text(f'#!/bin/sh\necho "make $*" >>made\n[ "$1" != {failing} ]\n')
    (directory / "make").chmod(0o755)


@pytest.mark.parametrize(("failing", "status"), [("lint", 1), ("demo", 1), ("bench-check", 0), ("nothing", 0)])
def test_the_ci_runs_everything_also_when_something_failed(
    clone: Path, tmp_path: Path, failing: str, status: int
) -> None:
    for directory in ("tests/peers", "tests/vm", "bench"):
        (clone / directory).mkdir(parents=True)
    fake_make(tmp_path / "fake", failing)
    done = run([".ci/run"], clone, {"PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}"})
    assert done.returncode == status
    groups = ["test", "test-peers", "test-vm"]
    targets = ["lint", "binaries", *groups, "demo", "bench-check ARGS=--quick --rounds 1 --run"]
    made = (clone / "made").read_text().splitlines()
    assert made == [f"make {target}" for target in targets]
    assert ("FAILED: " + failing in done.stdout) == bool(status)


AGAIN = "WORKERS=0 ARGS=--last-failed --last-failed-no-failures=none"
# As make and pytest end: some of the group's tests failed (1), or the run broke off (2).
FAILING_MAKE = """#!/bin/sh
echo "make $*" >>made
case "$*" in {pattern}) ;; *) exit 0 ;; esac
echo "=== short test summary info ==="
echo "SKIPPED [1] tests/other.py:1: why"
echo "FAILED tests/x.py::test_x - AssertionError: three"
echo "lines of"
echo "reason"
echo "=== 1 failed in 1 s ==="
echo "make: *** [Makefile:40: $1] Error {status}" >&2
exit 2
"""


@pytest.mark.parametrize(
    ("pattern", "status", "last", "named"),
    [
        ("test", 0, f"test {AGAIN}", "=== test: failed at first, and then passed; to be mended"),
        ("test-vm", 0, f"test-vm {AGAIN}", "=== test-vm: failed at first, and then passed; to be mended"),
        ("test-vm*", 1, f"test-vm {AGAIN}", "FAILED: test-vm (second try) (exit 2)"),
    ],
)
def test_the_ci_tries_failed_tests_once_more(
    clone: Path, tmp_path: Path, pattern: str, status: int, last: str, named: str
) -> None:
    (clone / "tests/vm").mkdir(parents=True)
    fake_make(tmp_path / "fake", "")
    (tmp_path / "fake/make").write_text(FAILING_MAKE.format(pattern=pattern, status=1))
    done = run([".ci/run"], clone, {"PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}"})
    assert done.returncode == status
    made = (clone / "made").read_text().splitlines()
    assert made.count(f"make {last}") == 1
    assert len(made) == 6  # lint, the bundle, two groups, one of them again, demo
    assert done.stdout.splitlines().count(named) == 1
    # What failed and why is at the end, where a log that was cut still has it.
    end = done.stdout[done.stdout.index("\npassed:") :]
    assert "    FAILED tests/x.py::test_x - AssertionError: three\n    lines of\n    reason\n" in end
    assert "SKIPPED" not in end
    assert "1 failed in" not in end


def test_the_ci_has_no_second_try_for_a_run_that_broke_off(clone: Path, tmp_path: Path) -> None:
    fake_make(tmp_path / "fake", "")
    (tmp_path / "fake/make").write_text(FAILING_MAKE.format(pattern="test", status=2))
    done = run([".ci/run"], clone, {"PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert set((clone / "made").read_text().splitlines()) == {"make lint", "make binaries", "make test", "make demo"}
    assert "FAILED: test (exit 2)" in done.stdout


@pytest.mark.kernel
class TestPreflight:
    """Who may not, and what the kernel cannot, is told in one line with exit 2."""

    SCRIPT = str(ROOT / "build/preflight.py")

    def preflight(self, what: str, prefix: tuple[str, ...] = (), path: str = "") -> subprocess.CompletedProcess[str]:
        # Debian's Python: that of the virtual environment may be out of reach for another user.
        python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
        with open(self.SCRIPT, encoding="utf-8") as script:
            return subprocess.run(
                [*prefix, python, "-I", "-", what],
                stdin=script,
                capture_output=True,
                text=True,
                env={"PATH": f"{path}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
                cwd="/",
                check=False,
            )

    @pytest.mark.parametrize(
        ("prefix", "reason"),
        [
            (("setpriv", "--reuid=65534", "--clear-groups"), "needs root"),
            (("setpriv", "--bounding-set=-net_admin"), "CAP_NET_ADMIN missing"),
            (("setpriv", "--bounding-set=-sys_admin"), "CAP_SYS_ADMIN missing"),
        ],
    )
    def test_without_the_right(self, prefix: tuple[str, ...], reason: str) -> None:
        done = self.preflight("rights", prefix)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert reason in done.stderr
        assert done.stderr.startswith("netloom: ")

    def test_this_machine_will_do(self) -> None:
        assert self.preflight("rights").returncode == 0
        assert self.preflight("kernel").returncode == 0

    @pytest.mark.parametrize(
        ("pattern", "status", "said", "printed"),
        [
            ("*type*veth*", 2, "this kernel lacks veth (Unknown device type.)", ""),
            ("*type*bridge*", 2, "this kernel lacks bridge (Unknown device type.)", ""),
            ("-6*", 0, "no IPv6 here (Unknown device type.): that part is left out", "no-ipv6\n"),
        ],
    )
    def test_a_kernel_that_lacks_something(
        self, tmp_path: Path, pattern: str, status: int, said: str, printed: str
    ) -> None:
        ip = tmp_path / "ip"
        real = shutil.which("ip", path="/usr/sbin:/usr/bin:/sbin:/bin")
        ip.write_text(
            f'#!/bin/sh\ncase "$*" in {pattern}) echo "Unknown device type." >&2; exit 2;; esac\nexec {real} "$@"\n'
        )
        ip.chmod(0o755)
        done = self.preflight("kernel", path=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, printed, 1)
        assert done.stderr.startswith(f"netloom: {said}")


POLICY = "/usr/sbin/policy-rc.d"
OURS = "#!/bin/sh\n# made by netloom build/setup, and removed by it\nexit 101\n"
APT = """#!/bin/sh
echo "$*" >>"$APT_SEEN"
case $* in *install*) ;; *) exit 0;; esac
cat /usr/sbin/policy-rc.d >>"$APT_SEEN"
[ -z "$APT_WAITS" ] || sleep 1000
ln -s /bin/true /usr/sbin/ip
"""


@pytest.mark.kernel
class TestPackages:
    """build/setup and apt-get, with a /usr/sbin of its own that lacks ip."""

    @pytest.fixture
    def bare(self, host: Host, clone: Path, tmp_path: Path) -> Host:
        (clone / ".venv/bin").mkdir(parents=True)
        (clone / ".venv/bin/python").symlink_to(sys.executable)
        stamp = run([sys.executable, "-I", "build/requirements.py", "stamp"], clone, check=True).stdout
        (clone / ".venv/netloom.stamp").write_text(stamp)
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake/apt-get").write_text(APT)
        (tmp_path / "fake/apt-get").chmod(0o755)
        layers = "t=$1; mount -t tmpfs t /mnt; mkdir /mnt/upper /mnt/work; chmod 755 /mnt/upper; "
        layers += "mount -t overlay -o lowerdir=/usr/sbin,upperdir=/mnt/upper,workdir=/mnt/work o /usr/sbin; "
        layers += f"rm -f /usr/sbin/ip {POLICY}; mkdir -p /var/lib/apt"
        host.run(["sh", "-ec", layers, "sh", str(tmp_path)])
        return host

    def environment(self, tmp_path: Path, waits: str = "") -> dict[str, str]:
        # Not /sbin and /bin: where they are directories of their own, an ip may lie there.
        tools = tmp_path / "tools"
        if not tools.exists():
            tools.mkdir()
            for program in Path("/usr/bin").iterdir():
                if program.name != "ip":
                    (tools / program.name).symlink_to(program)
        return {
            **os.environ,
            "PATH": f"{tmp_path}/fake:/usr/sbin:{tools}",
            "APT_SEEN": f"{tmp_path}/seen",
            "APT_WAITS": waits,
            "NETLOOM_PYTHON": sys.executable,
        }

    def set_up(self, bare: Host, clone: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
        return bare.run(["sh", "build/setup", "demo"], cwd=clone, env=self.environment(tmp_path))

    def test_only_what_is_missing_is_installed_and_no_service_may_start(
        self, bare: Host, clone: Path, tmp_path: Path
    ) -> None:
        done = self.set_up(bare, clone, tmp_path)
        assert "setup: installing with apt: iproute2\n" in done.stderr
        update, install, *policy = (tmp_path / "seen").read_text().splitlines(keepends=True)
        assert update.split()[-1] == "update"
        assert install.split()[-3:] == ["install", "--no-install-recommends", "iproute2"]
        assert "".join(policy) == OURS
        assert bare.run(["test", "-e", POLICY], check=False).returncode == 1
        assert self.set_up(bare, clone, tmp_path).stderr == ""

    def test_a_policy_of_the_machines_owner_stays(self, bare: Host, clone: Path, tmp_path: Path) -> None:
        bare.run(["sh", "-c", f"echo 'exit 104' >{POLICY}"])
        self.set_up(bare, clone, tmp_path)
        assert bare.run(["cat", POLICY]).stdout == "exit 104\n"
        assert (tmp_path / "seen").read_text().endswith("exit 104\n")

    def test_the_policy_of_a_killed_run_is_removed_by_the_next(self, bare: Host, clone: Path, tmp_path: Path) -> None:
        killed = bare.popen(["setsid", "sh", "build/setup", "demo"], cwd=clone, env=self.environment(tmp_path, "1"))
        wait_until(lambda: (tmp_path / "seen").exists() and OURS in (tmp_path / "seen").read_text(), "apt-get")
        for pid in bare.processes():
            os.kill(pid, 9)
        killed.wait()
        assert bare.run(["cat", POLICY]).stdout == OURS
        bare.run(["ln", "-s", "/bin/true", "/usr/sbin/ip"])
        self.set_up(bare, clone, tmp_path)
        assert bare.run(["test", "-e", POLICY], check=False).returncode == 1

    def test_without_root_the_command_to_run_is_named(self, bare: Host, clone: Path, tmp_path: Path) -> None:
        fake_id = tmp_path / "fake/id"
        fake_id.write_text("#!/bin/sh\necho 1000\n")
        fake_id.chmod(0o755)
        done = bare.run(["sh", "build/setup", "demo"], cwd=clone, env=self.environment(tmp_path), check=False)
        assert done.returncode == 1
        assert "missing: iproute2; install as root: apt-get install -y --no-install-recommends iproute2" in done.stderr
        assert not (tmp_path / "seen").exists()
