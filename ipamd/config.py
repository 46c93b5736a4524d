"""ipamd's configuration: the host's TOML file, and command-line flags that override it.

    [ipamd]
    socket = "/run/netloom/ipamd.sock"
    socket_mode = "0660"              # no rights for others: whoever opens the socket may take and free addresses
    socket_owner = "root"             # a name or a number; absent: as it comes
    socket_group = "netloom"
    node = "host-1"                   # default: the host's name
    http_listen = "127.0.0.1:9464"    # /metrics and /healthz; absent or "": off
    http_allow_remote = false
    overlay_subnets = "10.0.0.0/8,24" # where overlay networks get subnets from that name none: parts of that length

    [store]
    kind = "sqlite"                   # "etcd": one of a cluster; "memory": forgets everything at a stop, for trials
    path = "/var/lib/netloom/ipamd.db"  # with "etcd", too: what is this node's own

    [etcd]                            # where the store's kind is "etcd"
    endpoints = ["10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"]
    prefix = "/netloom/"              # of all keys
    ca = "/etc/netloom/etcd-ca.pem"   # TLS
    cert = "/etc/netloom/etcd.pem"    # this client's own, where etcd wants one
    key = "/etc/netloom/etcd-key.pem"  # not to be read by others, nor is the password
    user = "netloom"
    password_file = "/etc/netloom/etcd-password"
    timeout_s = 3                     # of a call, all endpoints together

    [cluster]
    lease_s = 15                      # a node that is silent for so long counts as not alive
    reclaim_nodes_after_s = 0         # a node that is not alive for so long loses all it has; 0: never

    [pools]
    cooldown_s = 30                   # a freed address is not handed out again before

    [reclaim]
    interval_s = 60                   # how often ipamd itself looks for allocations of an earlier boot; 0: never
    grace_s = 60                      # between the two observations that something is gone

    [log]
    level = "info"
    format = "text"                   # or "json"

The file serves every daemon of the host: tables of the others are left to them, all other names are refused. A wrong
key or value raises ConfigError, which names file and line, the key, what was found and what to do. Flags win over the
file, the file wins over the environment, and that over the defaults.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import EtcdConfig
from cluster.settings import ETCD_KEYS, etcd_config
from ipamd.overlay import DEFAULT_PARTS, Parts, parts_of
from kernel import paths, settings
from kernel.settings import ConfigError, Schema, Settings
from telemetry.health import parse_listen
from telemetry.log import FORMATS, LEVELS

StoreKind = Literal["sqlite", "memory", "etcd"]

_STORE_KINDS: tuple[StoreKind, ...] = ("sqlite", "memory", "etcd")
_OTHER_DAEMONS = ("netd", "peer", "network", "docker", "cni")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "ipamd": (
        *("socket", "socket_mode", "socket_owner", "socket_group", "node", "http_listen", "http_allow_remote"),
        "overlay_subnets",
    ),
    "store": ("kind", "path"),
    "etcd": ETCD_KEYS,
    "cluster": ("lease_s", "reclaim_nodes_after_s"),
    "pools": ("cooldown_s",),
    "reclaim": ("interval_s", "grace_s"),
    "log": ("level", "format"),
}
# What a flag sets, under the name that `load` takes it by.
_OVERRIDES: Mapping[str, tuple[str, str]] = {
    "socket": ("ipamd.socket", "--socket"),
    "node": ("ipamd.node", "--node"),
    "http_listen": ("ipamd.http_listen", "--http-listen"),
    "store_kind": ("store.kind", "--store"),
    "store_path": ("store.path", "--store"),
    "log_level": ("log.level", "--log-level"),
    "log_format": ("log.format", "--log-format"),
}
_LEAST_RECLAIM_S = 60.0
_SCHEMA = Schema(tables=_KEYS, lists={}, others=_OTHER_DAEMONS, flags=_OVERRIDES)
_socket_mode = settings.socket_mode("whoever opens the socket may take and free addresses")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What a member of a cluster runs with."""

    etcd: EtcdConfig
    lease_s: int
    reclaim_nodes_after_s: float  # 0: never


@dataclass(frozen=True, slots=True)
class Config:
    """What ipamd runs with. Paths are absolute, times are in seconds."""

    socket: str
    socket_mode: int  # permission bits, 0o660
    socket_owner: int | None  # user id; None: not changed
    socket_group: int | None  # group id; None: not changed
    node: str
    http_listen: str | None  # "127.0.0.1:9464"; None: no HTTP
    http_allow_remote: bool
    store_kind: StoreKind
    store_path: str  # of no meaning where store_kind is "memory"
    cooldown_s: float
    reclaim_interval_s: float  # 0: never by itself
    reclaim_grace_s: float
    release_dir: str  # where a DEL leaves its record while ipamd is away
    log_level: str
    log_format: str
    overlay_subnets: Parts = DEFAULT_PARTS
    cluster: ClusterConfig | None = None  # there where store_kind is "etcd"


@dataclass(frozen=True, slots=True)
class Arguments:
    """ipamd's command line, read."""

    config: str | None  # the file that was named; None: the default one
    overrides: Mapping[str, object]  # as `load` takes them
    check: bool  # only validate


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Reads the command line; prints usage and raises SystemExit(2) where it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog="ipamd", description="Netloom's address daemon: who has which address.")
    parser.add_argument("--config", metavar="FILE", help=f"default: $NETLOOM_CONFIG, else {paths.CONFIG_FILE}")
    parser.add_argument("--socket", metavar="PATH", help="listen here instead of the configured socket")
    parser.add_argument("--store", metavar="PATH|memory", help="SQLite file, or the word memory")
    parser.add_argument("--node", metavar="NAME", help="this node's name; default: the host's name")
    parser.add_argument("--log-level", metavar="LEVEL", help=", ".join(LEVELS))
    parser.add_argument("--log-format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--http-listen", metavar="ADDRESS:PORT", help="/metrics and /healthz; an empty word: off")
    parser.add_argument("--check", action="store_true", help="validate the configuration, say so, and stop")
    given = parser.parse_args(argv)
    overrides: dict[str, object] = {
        name: value
        for name in ("socket", "node", "log_level", "log_format", "http_listen")
        if (value := getattr(given, name)) is not None
    }
    if given.store == "memory":
        overrides["store_kind"] = "memory"
    elif given.store is not None:
        # A flag is typed in a directory, so a relative path means what it means to a shell.
        overrides["store_kind"], overrides["store_path"] = "sqlite", given.store and os.path.abspath(given.store)
    if given.socket:
        overrides["socket"] = os.path.abspath(given.socket)
    return Arguments(given.config, overrides, given.check)


def load(path: str | None, overrides: Mapping[str, object], environment: Mapping[str, str]) -> Config:
    """Reads and validates the configuration.

    `path` is a file that the operator named and that must exist; None means the default file, which need not. A file
    named by NETLOOM_CONFIG must exist too. `overrides` holds values that win over the file's, by the names of Config's
    fields (those of the flags). Raises ConfigError.
    """
    try:
        file = path or paths.config_file(environment)
        required = path is not None or bool(environment.get("NETLOOM_CONFIG"))
        found = Settings(file, settings.read(file, required), _SCHEMA, overrides)
        socket_path = found.take("ipamd.socket", settings.absolute_path) or paths.ipamd_socket(environment)
        store_path = found.take("store.path", settings.absolute_path) or f"{paths.state_dir(environment)}/ipamd.db"
        release_dir = paths.releases_dir(environment)
    except paths.PathError as error:
        raise ConfigError(str(error)) from None
    return _build(found, socket_path, store_path, release_dir)


def _build(found: Settings, socket_path: str, store_path: str, release_dir: str) -> Config:
    allow_remote = found.take("ipamd.http_allow_remote", settings.boolean) or False
    mode = found.take("ipamd.socket_mode", _socket_mode)
    cooldown_s = found.take("pools.cooldown_s", settings.seconds)
    interval_s = found.take("reclaim.interval_s", settings.seconds)
    grace_s = found.take("reclaim.grace_s", settings.seconds)
    kind = found.take("store.kind", settings.one_of(_STORE_KINDS)) or "sqlite"
    return Config(
        socket=socket_path,
        socket_mode=0o660 if mode is None else mode,
        socket_owner=found.take("ipamd.socket_owner", settings.user),
        socket_group=found.take("ipamd.socket_group", settings.group),
        node=found.take("ipamd.node", settings.node) or settings.default_node("ipamd"),
        http_listen=found.take("ipamd.http_listen", settings.listen(parse_listen, allow_remote)) or None,
        http_allow_remote=allow_remote,
        store_kind=kind,
        store_path=store_path,
        cooldown_s=30.0 if cooldown_s is None else cooldown_s,
        reclaim_interval_s=60.0 if interval_s is None else interval_s,
        reclaim_grace_s=60.0 if grace_s is None else grace_s,
        release_dir=release_dir,
        overlay_subnets=found.take("ipamd.overlay_subnets", _parts) or DEFAULT_PARTS,
        log_level=found.take("log.level", settings.one_of(LEVELS)) or "info",
        log_format=found.take("log.format", settings.one_of(FORMATS)) or "text",
        cluster=_cluster(found, kind),
    )


def _parts(value: object) -> Parts:
    try:
        return parts_of(settings.string(value))
    except ValueError as error:
        raise settings.WrongValueError(str(error)) from None


def _cluster(found: Settings, kind: StoreKind) -> ClusterConfig | None:
    """Checked also where the store is another, as netd may use it."""
    etcd = etcd_config(found)
    lease_s = found.take("cluster.lease_s", settings.whole(5, 3600)) or 15
    reclaim_s = found.take("cluster.reclaim_nodes_after_s", settings.seconds) or 0.0
    if reclaim_s and reclaim_s < max(_LEAST_RECLAIM_S, 4.0 * lease_s):
        found.refuse(
            "cluster.reclaim_nodes_after_s",
            f"found {reclaim_s:g}; wanted 0 (never), or at least {_LEAST_RECLAIM_S:g} seconds and four times lease_s",
        )
    if kind != "etcd":
        return None
    if etcd is None:
        found.refuse("store.kind", 'found "etcd"; name its endpoints: endpoints = ["10.0.0.1:2379"] under [etcd]')
    return ClusterConfig(etcd, lease_s, reclaim_s)
