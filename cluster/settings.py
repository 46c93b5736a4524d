"""The table `[etcd]` of netloom.toml, for every daemon that reads it."""

import dataclasses
import os
import stat

from cluster.config import DEFAULT_PREFIX, DEFAULT_TIMEOUT_S, EtcdConfig, EtcdConfigError
from kernel import settings
from kernel.settings import Settings, WrongValueError

ETCD_KEYS = ("endpoints", "prefix", "ca", "cert", "key", "user", "password_file", "timeout_s")


def etcd_config(found: Settings) -> EtcdConfig | None:
    """The table, checked, files too; None where it names no endpoint. Raises ConfigError."""
    endpoints = found.take("etcd.endpoints", settings.strings)
    if not endpoints:
        return None
    timeout_s = found.take("etcd.timeout_s", settings.seconds)
    prefix = found.take("etcd.prefix", settings.string)
    try:
        return EtcdConfig(
            endpoints,
            prefix=DEFAULT_PREFIX if prefix is None else prefix,
            ca=found.take("etcd.ca", _readable) or "",
            cert=found.take("etcd.cert", _readable) or "",
            key=found.take("etcd.key", _secret) or "",
            user=found.take("etcd.user", settings.string) or "",
            password_file=found.take("etcd.password_file", _secret) or "",
            timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        )
    except EtcdConfigError as error:
        field, _, what = str(error).partition(": ")
        known = {entry.name for entry in dataclasses.fields(EtcdConfig)}
        found.refuse(f"etcd.{field}" if field in known else "etcd", what)


def _readable(value: object) -> str:
    path = settings.absolute_path(value)
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise WrongValueError(f"this file cannot be read by this user: {error.strerror}") from None
    return path


def _secret(value: object) -> str:
    path = _readable(value)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077 and not _is_for_our_group(path, mode):
        raise WrongValueError(f"others may read this file (mode {mode:04o}), and it is a secret; chmod 0600 it")
    return path


def _is_for_our_group(path: str, mode: int) -> bool:
    """root's file that one group may read: how a daemon that is not root gets a secret."""
    return not mode & 0o037 and os.stat(path).st_uid == 0 and os.geteuid() != 0
