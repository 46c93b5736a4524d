"""How etcd is reached: the values of `[etcd]`, checked."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

DEFAULT_PORT = 2379
DEFAULT_PREFIX = "/netloom/"
DEFAULT_TIMEOUT_S = 3.0
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


class EtcdConfigError(ValueError):
    """A value cannot be used; the text says what was found and what to write instead."""


@dataclass(frozen=True, slots=True)
class Address:
    """One endpoint: where gRPC finds it, and how it is shown."""

    target: str  # "ipv4:10.0.0.1:2379"
    shown: str  # "10.0.0.1:2379"
    tls: bool


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """`endpoints`: "10.0.0.1:2379", "[fd00::1]:2379", "etcd.example", "unix:/run/etcd.sock"; with http:// or https://.

    Without a port it is DEFAULT_PORT, as for etcdctl.
    """

    endpoints: tuple[str, ...]
    prefix: str = DEFAULT_PREFIX
    ca: str = ""  # files in PEM
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""
    password_file: str = ""  # read for each log-in, so a new password needs no restart
    timeout_s: float = DEFAULT_TIMEOUT_S  # of a call, all endpoints together

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise EtcdConfigError("endpoints: wanted at least one, such as 10.0.0.1:2379")
        if not self.prefix or len(self.prefix.encode()) > 256:
            raise EtcdConfigError("prefix: wanted 1 to 256 bytes, such as /netloom/")
        if bool(self.cert) != bool(self.key):
            raise EtcdConfigError("cert and key: wanted both or none of the two")
        if (self.password or self.password_file) and not self.user:
            raise EtcdConfigError("user: wanted one where there is a password")
        if not 0.1 <= self.timeout_s <= 600:
            raise EtcdConfigError(f"timeout_s: wanted 0.1 to 600 seconds, found {self.timeout_s}")
        self.addresses()

    def addresses(self) -> tuple[Address, ...]:
        return tuple(_address(endpoint, bool(self.ca or self.cert), bool(self.ca)) for endpoint in self.endpoints)

    def read_password(self) -> str:
        """Raises EtcdConfigError where the file cannot be read."""
        if not self.password_file:
            return self.password
        try:
            with open(self.password_file, encoding="utf-8") as file:
                return file.read(4096).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EtcdConfigError(f"password_file {self.password_file}: cannot be read: {error}") from None


def _address(endpoint: str, tls: bool, ca: bool) -> Address:
    rest = endpoint
    for scheme in ("http", "https"):
        if endpoint.startswith(f"{scheme}://"):
            rest, tls = endpoint.removeprefix(f"{scheme}://").removesuffix("/"), scheme == "https"
    if tls and not ca:
        raise EtcdConfigError(f"ca: wanted the file with the certificate authority of {endpoint}, found none")
    if rest.startswith("unix:/"):
        return Address(rest, rest, tls)
    host, port = _split(rest, endpoint)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host) or host.rpartition(".")[2].isdigit():  # 10.0.0.300 is no name
            raise EtcdConfigError(_wanted(endpoint)) from None
        return Address(f"dns:///{host}:{port}", f"{host}:{port}", tls)
    written = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    return Address(f"ipv{address.version}:{written}", written, tls)


def _split(text: str, endpoint: str) -> tuple[str, int]:
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, bracket, after = text[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise EtcdConfigError(_wanted(endpoint))
        port = after[1:] or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    elif ":" in text:
        # Nobody can say whether the end of fd00::1:2379 is a port.
        raise EtcdConfigError(_wanted(endpoint))
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise EtcdConfigError(_wanted(endpoint))
    return host, int(port)


def _wanted(endpoint: str) -> str:
    return f"endpoints: wanted such as 10.0.0.1:2379, [fd00::1]:2379 or https://etcd.example:2379, found {endpoint!r}"
