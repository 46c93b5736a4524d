"""The flannel plugin: makes the configuration of another plugin out of what flannel, or netd, wrote about this host.

`subnet.env` says which part of the network this host has. The delegate, bridge unless told otherwise, gets it as
host-local's range, with the MTU of the path to other hosts. What it got is kept beside the containers, so that a DEL
works after `subnet.env` changed or went; in the place and form of flannel's own plugin, so that each ends what the
other began.

Keys, files and the delegate's configuration are those of flannel's own plugin.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cni import config, delegate, registry
from cni.config import decode_object
from cni.errors import CniError, Code, shown
from cni.failures import Failures, note
from cni.request import Command, Request
from cni.result import Result
from cni.undo import Undo
from cni.versions import encode
from kernel.session import Session

SUBNET_FILE = "/run/flannel/subnet.env"
DATA_DIR = "/var/lib/cni/flannel"
_LARGEST = 1 << 20
_FAMILIES = (("FLANNEL_NETWORK", "FLANNEL_SUBNET"), ("FLANNEL_IPV6_NETWORK", "FLANNEL_IPV6_SUBNET"))
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", re.ASCII)


class FlannelConf(msgspec.Struct, frozen=True, rename="camel"):
    """The plugin's keys. `delegate`: keys of the delegate, which win; `ipam`: of its IPAM plugin."""

    subnet_file: str = SUBNET_FILE
    data_dir: str = DATA_DIR
    delegate: dict[str, Any] = {}
    ipam: dict[str, Any] = {}


class Subnet(msgspec.Struct, frozen=True):
    """What `subnet.env` says, by family: the network and this host's part of it."""

    parts: tuple[tuple[str, str], ...]
    mtu: int
    masquerades: bool  # flannel itself does


def parse(request: Request) -> FlannelConf:
    """The configuration, checked.

    Raises:
        CniError: 7, naming key and value.
    """
    conf = config.convert(request.config, FlannelConf)
    for key in ("name", "ipam"):
        if key in conf.delegate:
            raise config.refused(f"delegate.{key}", conf.delegate[key], "the plugin sets it itself; leave it out")
    kind = conf.delegate.get("type", "bridge")
    if not isinstance(kind, str) or not _PLAIN.fullmatch(kind) or kind == "flannel":
        raise config.refused("delegate.type", kind, "want the type of an interface plugin, such as bridge")
    for key, path in (("subnetFile", conf.subnet_file), ("dataDir", conf.data_dir)):
        if not path.startswith("/") or "\0" in path:
            raise config.refused(key, path, "want an absolute path")
    return conf


def read_subnet(path: str) -> Subnet:
    """Reads `subnet.env`.

    Raises:
        CniError: 11, it is not there yet; 7, it says nothing that can be used.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            text = stream.read(_LARGEST)
    except OSError as error:
        raise CniError(
            Code.TRY_AGAIN_LATER,
            f"subnetFile {shown(path)} cannot be read: {error.strerror}",
            "netd or flanneld writes it once this host has its part of the network; is it running?",
        ) from error
    values = dict(line.strip().partition("=")[::2] for line in text.splitlines() if "=" in line)
    parts = []
    for network_key, subnet_key in _FAMILIES:
        subnet = values.get(subnet_key, "")
        if subnet:
            parts.append((_network(path, network_key, values.get(network_key, "")), _network(path, subnet_key, subnet)))
    if not parts:
        raise CniError(Code.INVALID_CONFIG, f"subnetFile {shown(path)} names no FLANNEL_SUBNET", "see flannel's log")
    mtu = values.get("FLANNEL_MTU", "0")
    if not mtu.isdecimal():
        raise CniError(Code.INVALID_CONFIG, f"subnetFile {shown(path)}: FLANNEL_MTU: want a number, found {shown(mtu)}")
    return Subnet(tuple(parts), int(mtu), values.get("FLANNEL_IPMASQ", "") == "true")


def _network(path: str, key: str, text: str) -> str:
    """Without host bits: FLANNEL_SUBNET is written as the gateway's address."""
    try:
        return str(ipaddress.ip_interface(text).network) if text else ""
    except ValueError:
        raise CniError(
            Code.INVALID_CONFIG, f"subnetFile {shown(path)}: {key}: want a network, found {shown(text)}"
        ) from None


def delegated(request: Request, conf: FlannelConf, subnet: Subnet) -> dict[str, Any]:
    """The delegate's configuration. Pure."""
    made: dict[str, Any] = {"type": "bridge", "ipMasq": not subnet.masquerades, **conf.delegate}
    if subnet.mtu:
        made.setdefault("mtu", subnet.mtu)
    if made["type"] == "bridge":
        made.setdefault("isGateway", True)
    routes = conf.ipam.get("routes")
    made["ipam"] = {
        "type": "host-local",
        **conf.ipam,
        "ranges": [[{"subnet": part}] for _, part in subnet.parts],
        "routes": [*(routes if isinstance(routes, list) else []), *({"dst": one} for one, _ in subnet.parts if one)],
    }
    made |= {"name": request.network, "cniVersion": request.cni_version}
    for key in ("runtimeConfig", "args"):
        if key in request.config:
            made[key] = request.config[key]
    return made


def _as(request: Request, made: Mapping[str, Any]) -> Request:
    """The request as the delegate gets it."""
    whole = dict(made)
    if request.prev_result is not None:
        whole["prevResult"] = encode(request.prev_result, request.cni_version)
    return msgspec.structs.replace(
        request, plugin=str(made["type"]), config=dict(made), stdin=msgspec.json.encode(whole)
    )


def _is_ours(request: Request) -> bool:
    entry = registry.PLUGINS.get(request.plugin)
    return entry is not None and entry.kind == "interface"


# The verbs


def add(request: Request, host: Session, undo: Undo) -> Result:
    """Attach the container as the delegate does.

    Raises:
        CniError, KernelError: and `undo` holds the inverse of everything that was done.
    """
    conf = parse(request)
    made = delegated(request, conf, read_subnet(conf.subnet_file))
    path = _write(conf, request, made)
    undo.push("forget the delegate's configuration", lambda: _unlink(path))
    other = _as(request, made)
    if _is_ours(other):
        result: Result = registry.load(other.plugin).add(other, host, undo)
        return result
    undo.push(f"{other.plugin} DEL", lambda: delegate.execute(other, other.plugin, Command.DEL))
    return delegate.result_of(other, other.plugin, delegate.execute(other, other.plugin, Command.ADD))


def delete(request: Request, host: Session) -> None:
    """Detach the container; success where there is nothing left to do."""
    try:
        conf = parse(request)
    except CniError as error:
        note(f"DEL: {error}")
        conf = FlannelConf()  # an ADD with it was refused
    path, made = _read(conf, request)
    if made is None:
        try:
            made = delegated(request, conf, read_subnet(conf.subnet_file))
        except CniError as error:
            note(f"DEL: {error}; what the delegate was told is not there either, so nothing is known to undo")
            return
    other = _as(request, made)
    if _is_ours(other):
        registry.load(other.plugin).delete(other, host)
    else:
        delegate.execute(other, other.plugin, Command.DEL)
    _unlink(path)


def check(request: Request, host: Session) -> None:
    """Have the delegate verify what it made."""
    conf = parse(request)
    _, made = _read(conf, request)
    other = _as(request, made if made is not None else delegated(request, conf, read_subnet(conf.subnet_file)))
    if _is_ours(other):
        registry.load(other.plugin).check(other, host)
    else:
        delegate.execute(other, other.plugin, Command.CHECK)


def gc(request: Request, host: Session) -> None:
    """Have the delegate remove what the runtime does not know any more, and forget what it was told for that."""
    conf = parse(request)
    other = _as(request, delegated(request, conf, read_subnet(conf.subnet_file)))
    with Failures() as failures:
        if _is_ours(other):
            failures.attempt(registry.load(other.plugin).gc, other, host)
        else:
            failures.attempt(delegate.execute, other, other.plugin, Command.GC)
        valid = {(one.container_id, one.ifname) for one in request.valid_attachments}
        known = {container_id for container_id, _ in valid}
        for path, made in _all(conf):
            container_id, _, ifname = os.path.basename(path).partition("@")
            mine = made.get("name") == request.network
            if mine and (((container_id, ifname) not in valid) if ifname else (container_id not in known)):
                _unlink(path)


def status(request: Request, host: Session) -> None:
    """Whether an ADD could be served now.

    Raises:
        CniError: 50, with what is missing.
    """
    conf = parse(request)
    try:
        subnet = read_subnet(conf.subnet_file)
    except CniError as error:
        raise CniError(Code.NOT_AVAILABLE, error.msg, error.details) from error
    other = _as(request, delegated(request, conf, subnet))
    if _is_ours(other):
        registry.load(other.plugin).status(other, host)


# What the delegate was told: <dataDir>/<container id>, and for further interfaces <container id>@<interface>. flannel's
# own plugin has the first alone; ours says there whose it is, in a key that delegates pass over, so that a DEL of
# another interface, which may have nothing, does not take it.

_IFNAME = "netloomIfname"


def _paths(conf: FlannelConf, request: Request) -> tuple[str, str]:
    plain = os.path.join(conf.data_dir, request.container_id)
    return plain, f"{plain}@{request.ifname}"


def _write(conf: FlannelConf, request: Request, made: Mapping[str, Any]) -> str:
    plain, own = _paths(conf, request)
    try:
        os.makedirs(conf.data_dir, 0o700, exist_ok=True)
        path = own if os.path.exists(plain) and not _is_of(request, _load(plain)) else plain
        # No container id begins with a dot, so that this is nobody's file, nor taken for one by GC.
        new = os.path.join(conf.data_dir, f".{os.path.basename(path)}")
        with open(new, "wb", opener=_private) as stream:
            stream.write(msgspec.json.encode({**made, _IFNAME: request.ifname}))
        os.rename(new, path)
    except OSError as error:
        raise CniError(
            Code.IO_FAILURE, f"dataDir {shown(conf.data_dir)} cannot be written: {error.strerror}", "name another"
        ) from error
    return path


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _read(conf: FlannelConf, request: Request) -> tuple[str, dict[str, Any] | None]:
    plain, own = _paths(conf, request)
    if os.path.exists(own):
        return own, _told(_load(own))
    made = _load(plain)
    if made is not None and made.get(_IFNAME, request.ifname) != request.ifname:
        return own, None
    return plain, _told(made)


def _told(made: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without what is for us alone."""
    return None if made is None else {key: value for key, value in made.items() if key != _IFNAME}


def _is_of(request: Request, made: Mapping[str, Any] | None) -> bool:
    return made is not None and made.get(_IFNAME) == request.ifname


def _load(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as stream:
            made = decode_object(stream.read(_LARGEST), "the delegate's configuration")
    except (OSError, CniError):
        return None
    return dict(made) if isinstance(made.get("type"), str) else None


def _all(conf: FlannelConf) -> Iterator[tuple[str, dict[str, Any]]]:
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(conf.data_dir):
            path = os.path.join(conf.data_dir, name)
            made = None if name.startswith(".") else _load(path)
            if made is not None:
                yield path, made


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
