"""The places that every process agrees on."""

from collections.abc import Callable, Mapping

import pytest

from kernel import paths

Lookup = Callable[[Mapping[str, str]], str]


@pytest.mark.parametrize(
    ("lookup", "default"),
    [
        (paths.run_dir, "/run/netloom"),
        (paths.state_dir, "/var/lib/netloom"),
        (paths.config_file, "/etc/netloom/netloom.toml"),
        (paths.ipamd_socket, "/run/netloom/ipamd.sock"),
        (paths.releases_dir, "/run/netloom/releases"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_defaults(lookup: Lookup, default: str, empty: bool) -> None:
    names = ("NETLOOM_RUN_DIR", "NETLOOM_STATE_DIR", "NETLOOM_CONFIG", "NETLOOM_IPAMD_SOCKET")
    assert lookup(dict.fromkeys(names, "") if empty else {}) == default


def test_each_variable_moves_its_place() -> None:
    environment = {"NETLOOM_RUN_DIR": "/a b/run/", "NETLOOM_STATE_DIR": "/s", "NETLOOM_CONFIG": "/c/x.toml"}
    assert paths.run_dir(environment) == "/a b/run"
    assert paths.state_dir(environment) == "/s"
    assert paths.config_file(environment) == "/c/x.toml"
    assert paths.ipamd_socket(environment) == "/a b/run/ipamd.sock"
    assert paths.releases_dir(environment) == "/a b/run/releases"


def test_the_sockets_own_variable_wins_over_the_run_directory() -> None:
    environment = {"NETLOOM_RUN_DIR": "/r", "NETLOOM_IPAMD_SOCKET": "/elsewhere/i.sock"}
    assert paths.ipamd_socket(environment) == "/elsewhere/i.sock"


def test_slashes_and_dots_are_folded() -> None:
    assert paths.run_dir({"NETLOOM_RUN_DIR": "//a/./b/../c"}) == "/a/c"


@pytest.mark.parametrize("value", ["run", "./run", "~/run", "/a\0b"])
def test_a_path_that_is_not_absolute_is_refused_by_name(value: str) -> None:
    with pytest.raises(paths.PathError, match=r"NETLOOM_RUN_DIR.*absolute"):
        paths.ipamd_socket({"NETLOOM_RUN_DIR": value})
