"""Where the processes of one host meet: the run directory, the state directory, the configuration, ipamd's socket.

Each function is pure: it takes the environment and touches no file. An empty variable counts as unset. A path must be
absolute, because a plugin inherits whatever working directory its runtime has; a relative one would name another place
in each process.
"""

import os
from collections.abc import Mapping

RUN_DIR = "/run/netloom"
STATE_DIR = "/var/lib/netloom"
CONFIG_FILE = "/etc/netloom/netloom.toml"


class PathError(ValueError):
    """A variable of the environment does not hold a usable path; the text names the variable and what it holds."""


def run_dir(environment: Mapping[str, str]) -> str:
    """The directory of sockets, locks and release records: NETLOOM_RUN_DIR, else /run/netloom. Gone after a reboot."""
    return _absolute(environment, "NETLOOM_RUN_DIR") or RUN_DIR


def state_dir(environment: Mapping[str, str]) -> str:
    """The directory of what survives a reboot: NETLOOM_STATE_DIR, else /var/lib/netloom."""
    return _absolute(environment, "NETLOOM_STATE_DIR") or STATE_DIR


def config_file(environment: Mapping[str, str]) -> str:
    """The configuration of every daemon of the host: NETLOOM_CONFIG, else /etc/netloom/netloom.toml."""
    return _absolute(environment, "NETLOOM_CONFIG") or CONFIG_FILE


def ipamd_socket(environment: Mapping[str, str]) -> str:
    """ipamd's socket where no configuration names one: NETLOOM_IPAMD_SOCKET, else ipamd.sock in the run directory."""
    return _absolute(environment, "NETLOOM_IPAMD_SOCKET") or f"{run_dir(environment)}/ipamd.sock"


def releases_dir(environment: Mapping[str, str]) -> str:
    """Where a DEL leaves its release record while ipamd is away, for ipamd to replay."""
    return f"{run_dir(environment)}/releases"


def _absolute(environment: Mapping[str, str], variable: str) -> str:
    """The variable's path without a trailing slash, or "" where it is unset or empty.

    Raises PathError for a relative path and for one that no file can have.
    """
    value = environment.get(variable, "")
    if not value:
        return ""
    if not value.startswith("/") or "\0" in value:
        raise PathError(f"{variable}: wanted an absolute path, found {value!r}; set it to one that starts with /")
    return os.path.normpath(value).replace("//", "/")
