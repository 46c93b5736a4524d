"""make install and make uninstall, below a DESTDIR: no right is needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from cni.registry import PLUGINS
from tests.build.places import Tree

PROGRAMS = ("ipamd", "netd", "netloom", "netloom-cni", "netloom-docker", "netloom-warm")
UNKIND = 'a folder, it\'s "so" $HOME & co'


def state(root: Path) -> dict[str, str]:
    """Each path: type, mode, and content or target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = f"{path.lstat().st_mode:o}"
        if path.is_symlink():
            found[str(path.relative_to(root))] = f"{mode} {os.readlink(path)}"
        elif path.is_dir():
            found[str(path.relative_to(root))] = mode
        else:
            found[str(path.relative_to(root))] = f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    return found


def files(root: Path) -> dict[str, str]:
    return {path: what for path, what in state(root).items() if not (root / path).is_dir()}


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    path = tmp_path / UNKIND
    path.mkdir()
    return path


def install(tree: Tree, destination: Path, **environment: str) -> None:
    done = tree.run("install", destination, **environment)
    assert done.returncode == 0, done.stderr


def uninstall(tree: Tree, destination: Path) -> str:
    done = tree.run("uninstall", destination)
    assert done.returncode == 0, done.stderr
    return done.stderr


def foreign(destination: Path, plugin: str, text: str) -> Path:
    path = destination / "opt/cni/bin" / plugin
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o751)
    return path


def test_everything_is_in_its_place(tree: Tree, destination: Path, launcher: Path) -> None:
    install(tree, destination)
    library = destination / "usr/lib/netloom"
    for program in PROGRAMS:
        assert os.readlink(library / program) == f"current/{program}"
        assert os.access(library / program, os.X_OK)
    assert {path.name for path in (destination / "opt/cni/bin").iterdir()} == set(PLUGINS)
    for plugin in PLUGINS:
        path = destination / "opt/cni/bin" / plugin
        assert (path.stat().st_nlink, path.stat().st_mode & 0o777) == (1, 0o755)
    done = subprocess.run([destination / "usr/bin/netloom", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("netloom ")
    units = {path.name for path in (destination / "lib/systemd/system").iterdir()}
    assert units == {
        "netloom-cni.service",
        "netloom-cni.socket",
        "netloom-docker.service",
        "netloom-docker.socket",
        "netloom-ipamd.service",
        "netloom-netd.service",
    }
    for name in ("usr/lib/sysusers.d", "usr/lib/tmpfiles.d"):
        assert (destination / name / "netloom.conf").exists()
    assert "[ipamd]" in (destination / "etc/netloom/netloom.toml").read_text()
    assert not [path for path in destination.rglob("*") if path.name.endswith(".new")]
    assert not [path for path in destination.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]


def test_the_configurations_that_are_shipped_are_valid(tree: Tree, destination: Path) -> None:
    install(tree, destination)
    etc = destination / "etc/netloom"
    check = [str(destination / "usr/lib/netloom/ipamd"), "--check", "--config", str(etc / "netloom.toml")]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout == "the configuration is valid\n"
    # Every key that is commented out exists, with a value of the right kind.
    full = (etc / "netloom.toml").read_text().replace("\n# ", "\n")
    full = "\n".join(line for line in full.splitlines() if "=" in line or line.startswith("["))
    full = full.replace('socket_group = "netloom"', 'socket_group = "root"')
    (destination / "full.toml").write_text(full)
    check[-1] = str(destination / "full.toml")
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_twice_is_as_once(tree: Tree, destination: Path) -> None:
    install(tree, destination)
    once = state(destination)
    install(tree, destination)
    assert state(destination) == once


def test_uninstall_leaves_what_was_there(tree: Tree, destination: Path) -> None:
    foreign(destination, "bridge", "theirs")
    (destination / "opt/cni/bin/loopback").symlink_to("bridge")
    (destination / "etc").mkdir()
    before = state(destination)
    install(tree, destination)
    install(tree, destination)
    assert (destination / "opt/cni/bin/bridge.before-netloom").read_text() == "theirs"
    assert uninstall(tree, destination) == ""
    assert state(destination) == before


def test_a_plugin_that_others_installed_over_ours_is_the_one_that_comes_back(tree: Tree, destination: Path) -> None:
    foreign(destination, "bridge", "old")
    install(tree, destination)
    foreign(destination, "bridge", "new")
    install(tree, destination)
    uninstall(tree, destination)
    assert (destination / "opt/cni/bin/bridge").read_text() == "new"


def test_a_plugin_that_others_installed_over_ours_stays_at_uninstall(tree: Tree, destination: Path) -> None:
    foreign(destination, "bridge", "old")
    install(tree, destination)
    foreign(destination, "bridge", "new")
    assert "bridge is somebody else's by now" in uninstall(tree, destination)
    assert {path.name for path in (destination / "opt/cni/bin").iterdir()} == {"bridge"}
    assert (destination / "opt/cni/bin/bridge").read_text() == "new"


def test_a_changed_configuration_stays(tree: Tree, destination: Path) -> None:
    install(tree, destination)
    config = destination / "etc/netloom/netloom.toml"
    config.write_text("[pools]\ncooldown_s = 1\n")
    install(tree, destination)
    assert "cooldown_s = 1" in config.read_text()
    assert "/etc/netloom/netloom.toml was changed and stays" in uninstall(tree, destination)
    assert set(files(destination)) == {"etc/netloom/netloom.toml"}


def test_over_a_version_that_runs(tree: Tree, destination: Path) -> None:
    """A program that was started before goes on with the files that it was started with."""
    install(tree, destination)
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/opt/cni/bin"}
    running = subprocess.Popen(
        ["bridge"],
        executable=destination / "usr/lib/netloom/netloom-cni",
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    old = (destination / "usr/lib/netloom/current").resolve()
    tree.rename_build("9.9.9-000000000000")
    install(tree, destination)
    assert os.readlink(destination / "usr/lib/netloom/current") == "9.9.9-000000000000"
    assert old.is_dir()
    # Whatever it imports from now on is of its own build.
    printed, _ = running.communicate('{"cniVersion": "1.1.0", "name": "n", "type": "bridge", "bridge": 7}')
    assert '"code": 7' in printed
    tree.rename_build("9.9.9-111111111111")
    install(tree, destination)
    assert not old.exists(), "only the one before is kept"
    builds = sorted(path.parent.name for path in (destination / "usr/lib/netloom").glob("*/BUILD"))
    assert set(builds) - {"current"} == {"9.9.9-000000000000", "9.9.9-111111111111"}


def test_a_damaged_build_is_replaced_by_installing_again(tree: Tree, destination: Path) -> None:
    install(tree, destination)
    broken = (destination / "usr/lib/netloom/current").resolve() / "_internal/cni/skel.pyc"
    broken.write_bytes(b"")
    install(tree, destination)
    version = [str(destination / "usr/lib/netloom/netloom-cni"), "bridge"]
    subprocess.run(version, env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True)


FAILING = """#!/bin/sh
count=$(cat "$COUNTER")
count=$((count + 1))
echo $count >"$COUNTER"
if [ $count = "$FAIL_AT" ]; then
    [ -z "$KILL" ] || kill -9 $PPID
    exit 1
fi
exec /bin/mv "$@"
"""


@pytest.mark.parametrize("way", ["fails", "is killed"])
def test_what_fails_on_the_way_leaves_each_file_whole_and_the_next_run_completes_it(
    tree: Tree, destination: Path, tmp_path: Path, way: str
) -> None:
    foreign(destination, "bridge", "theirs")
    install(tree, destination)
    old = files(destination)
    tree.rename_build("9.9.9-000000000000")
    (tree.root / "docs/errors.md").write_text("of the new version\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "mv").write_text(FAILING)
    (tools / "mv").chmod(0o755)
    counter = tmp_path / "counter"
    moves = 0
    for fail_at in (1, 2, 3, 8, 14, 20, 1000):
        counter.write_text("0")
        broken = tree.run(
            "install",
            destination,
            PATH=f"{tools}:{os.environ['PATH']}",
            COUNTER=str(counter),
            FAIL_AT=str(fail_at),
            KILL="1" if way == "is killed" else "",
        )
        moves = int(counter.read_text())
        assert (broken.returncode == 0) == (moves < fail_at), broken.stderr
        link = os.readlink(destination / "usr/lib/netloom/current")
        version = [str(destination / "usr/lib/netloom/netloom-cni"), "bridge"]
        subprocess.run(version, env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True)
        assert (
            link == "9.9.9-000000000000"
            or files(destination).items()
            >= {path: what for path, what in old.items() if not path.startswith("usr/lib/netloom/.")}.items()
        )
        for name in ("usr/share/doc/netloom/errors.md", *(f"opt/cni/bin/{plugin}" for plugin in PLUGINS)):
            now = files(destination)[name]
            assert now == old[name] or "errors" in name
        assert (destination / "opt/cni/bin/bridge.before-netloom").read_text() == "theirs"
    assert moves > 20
    assert (destination / "usr/share/doc/netloom/errors.md").read_text() == "of the new version\n"
    assert not [path for path in destination.rglob("*") if path.name.endswith(".new")]


def test_what_cannot_be_prepared_changes_nothing(tree: Tree, destination: Path) -> None:
    install(tree, destination)
    tree.rename_build("9.9.9-000000000000")
    for path in (destination / "usr/lib/tmpfiles.d").iterdir():
        path.unlink()
    (destination / "usr/lib/tmpfiles.d").rmdir()
    (destination / "usr/lib/tmpfiles.d").write_text("in the way")
    before = state(destination)
    assert tree.run("install", destination).returncode != 0
    assert state(destination) == before


def test_another_prefix(tree: Tree, destination: Path) -> None:
    install(tree, destination, PREFIX="/opt/net.loom")
    cold = b"/opt/net.loom/lib/netloom/netloom-cni\0"
    assert cold in (destination / "opt/cni/bin/bridge").read_bytes()
    unit = (destination / "lib/systemd/system/netloom-cni.service").read_text()
    assert "ExecStart=/opt/net.loom/lib/netloom/netloom-warm\n" in unit
    assert "@" not in unit
    link = destination / "opt/net.loom/bin/netloom"
    assert subprocess.run([link, "--version"], capture_output=True, check=True).returncode == 0
    done = tree.run("uninstall", destination, PREFIX="/opt/net.loom")
    assert done.returncode == 0, done.stderr
    assert state(destination) == {}


def test_the_launcher_leads_to_the_bundle(launcher: Path) -> None:
    assert b"/usr/lib/netloom/netloom-cni\0" in launcher.read_bytes()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PREFIX": "usr"}, "PREFIX: wanted an absolute path, found: usr"),
        ({"PREFIX": "/with space"}, "PREFIX: wanted a path of letters"),
    ],
)
def test_refusals(tree: Tree, destination: Path, environment: dict[str, str], said: str) -> None:
    done = tree.run("install", destination, **environment)
    assert done.returncode == 1
    assert said in done.stderr
    assert state(destination) == {}


def test_uninstall_of_nothing(tree: Tree, destination: Path) -> None:
    done = tree.run("uninstall", destination)
    assert done.returncode == 1
    assert "nothing was installed below" in done.stderr


def test_make_install_and_uninstall_pass_their_variables_on(tree: Tree, destination: Path) -> None:
    """The targets themselves; their prerequisite is made already."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (tree.root / "Makefile").write_text(makefile.replace("\ninstall: binaries ##", "\ninstall: ##"))
    for target in ("install", "uninstall"):
        subprocess.run(
            ["make", "-s", target, f"DESTDIR={destination.parent / 'plain folder'}", "PREFIX=/usr"],
            cwd=tree.root,
            capture_output=True,
            check=True,
        )
        present = (destination.parent / "plain folder/usr/bin/netloom").is_symlink()
        assert present == (target == "install")
