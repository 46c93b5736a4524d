"""`netloom attach` and `netloom detach`: one more interface for what runs already.

The same calls that a runtime makes: the plugins of a conflist of this host, executed in order, in the namespace of a
container, a process or a path. What was attached is written to `<run dir>/attached`, for detach; addresses and records
are reclaimed as any other's when the namespace goes.
"""

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from typing import Any, TypedDict

import click
import msgspec

from cli import output
from cli.failure import EPILOG, Failure, Status
from cli.options import Choices, common, pass_choices
from kernel import link, netns, paths
from kernel.errors import KernelError, NotFound
from kernel.session import Session
from libnetwork import conflist, docker
from libnetwork.chain import Chain
from libnetwork.errors import DriverError

CNI_PATH = "/opt/cni/bin:/usr/lib/cni"
_PODMAN_TIMEOUT_S = 20.0
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*", re.ASCII)


class Attached(msgspec.Struct, frozen=True):
    """One attachment, as it is on disk."""

    container_id: str
    target: str
    netns: str
    inode: int
    ifname: str
    network: str
    plugins: tuple[dict[str, Any], ...]
    version: str
    args: str
    runtime: dict[str, Any]
    result: dict[str, Any]


class AttachedDocument(TypedDict):
    network: str
    target: str
    container_id: str
    netns: str
    interface: str
    mac: str
    addresses: list[str]


@dataclass(frozen=True, slots=True)
class Target:
    """Whose namespace; `container_id` is what plugins get to know it by."""

    container_id: str
    netns: str


@click.command("attach", epilog=EPILOG, short_help="Give a running container one more interface.")
@click.argument("target", metavar="CONTAINER|PID|PATH")
@click.option("--network", required=True, metavar="NAME", help="The name of a conflist of this host.")
@click.option("--ifname", metavar="NAME", default="", help="The interface's name.  [default: the first free ethN]")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="This address, with prefix for ipam type static.")
@click.option("--gateway", metavar="ADDRESS", default="", help="The gateway, for ipam type static.")
@click.option("--mac", metavar="MAC", default="", help="This MAC.")
@click.option("--conf-dir", default=conflist.CONF_DIR, show_default=True, metavar="PATH", help="Where conflists are.")
@click.option("--cni-path", default=CNI_PATH, show_default=True, metavar="PATHS", help="Where the plugins are.")
@common
@pass_choices
def attach(
    choices: Choices,
    /,
    target: str,
    network: str,
    ifname: str,
    ips: tuple[str, ...],
    gateway: str,
    mac: str,
    **where: str,
) -> None:
    """Give a running container, process or namespace one more interface, of a network of this host.

    CONTAINER is a name or an id of Docker's or podman's; PID a process; PATH a network namespace. The network is named
    by its conflist in /etc/cni/net.d. The interface goes with the container, or by `netloom detach`.
    """
    _require_root()
    prune()
    args = _arguments(ips, gateway, mac)
    runtime: dict[str, Any] = {"ips": list(ips)} if ips else {}
    if mac:
        runtime["mac"] = mac
    found = _resolve(target)
    try:
        with Session() as host, netns.opened(found.netns) as sandbox, host.visit(sandbox) as inside:
            inode = sandbox.identity.inode
            names = {one.name for one in link.all_links(inside)}
    except KernelError as error:
        raise Failure(f"{target}: {error}") from None
    ifname = ifname or next(f"eth{n}" for n in range(len(names) + 1) if f"eth{n}" not in names)
    if ifname in names:
        raise Failure(f"--ifname {ifname}: {target} has an interface of that name; choose another")
    try:
        document = conflist.read(network, where["conf_dir"])
        chain = _chain(network, document["plugins"], str(document.get("cniVersion", "1.0.0")), where["cni_path"])
        result = chain.add(found.container_id, found.netns, ifname, runtime, args=args)
    except DriverError as error:
        raise Failure(str(error)) from None
    one = Attached(
        found.container_id,
        target,
        found.netns,
        inode,
        ifname,
        network,
        tuple(document["plugins"]),
        chain.version,
        args,
        runtime,
        result,
    )
    try:
        _write(one)
    except OSError as error:
        with contextlib.suppress(DriverError):
            chain.delete(found.container_id, found.netns, ifname, runtime, result, args)
        raise Failure(f"cannot write down the attachment, so it was undone: {error}") from None
    _print(choices, [one])


@click.command("detach", epilog=EPILOG, short_help="Take an interface away that attach gave.")
@click.argument("target", metavar="CONTAINER|PID|PATH")
@click.option("--network", default="", metavar="NAME", help="Only of this network.")
@click.option("--ifname", default="", metavar="NAME", help="Only this interface.")
@click.option("--cni-path", default=CNI_PATH, show_default=True, metavar="PATHS", help="Where the plugins are.")
@common
@pass_choices
def detach(choices: Choices, target: str, network: str, ifname: str, cni_path: str) -> None:
    """Take away what `netloom attach` gave to a container, process or namespace: all of it, or what the options say."""
    _require_root()
    wanted = [
        one
        for one in _all()
        if target in (one.target, one.container_id, one.netns)
        and network in ("", one.network)
        and ifname in ("", one.ifname)
    ]
    if not wanted:
        raise Failure(f"nothing that attach made for {target} is there; was it named differently then?")
    for one in wanted:
        # The path may lead elsewhere by now: a process id comes again.
        path = one.netns if _is_still(one) else ""
        try:
            chain = _chain(one.network, one.plugins, one.version, cni_path)
            chain.delete(one.container_id, path, one.ifname, one.runtime, one.result, one.args)
        except DriverError as error:
            raise Failure(str(error)) from None
        _forget(one)
    _print(choices, wanted)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Failure("only root may enter a container's namespace: run this with sudo", Status.NOT_PERMITTED)


def _chain(network: str, plugins: Any, version: str, cni_path: str) -> Chain:
    return Chain(network, tuple(plugins), tuple(filter(None, cni_path.split(os.pathsep))), version)


def _arguments(ips: tuple[str, ...], gateway: str, mac: str) -> str:
    """CNI_ARGS, which every IPAM plugin reads."""
    pairs = ["IgnoreUnknown=1"]
    for text in ips:
        try:
            ip_interface(text)
        except ValueError as error:
            raise Failure(f"--ip {text}: {error}", Status.USAGE) from None
    if ips:
        pairs.append(f"IP={','.join(ips)}")
    if gateway:
        try:
            ip_address(gateway)
        except ValueError as error:
            raise Failure(f"--gateway {gateway}: {error}", Status.USAGE) from None
        pairs.append(f"GATEWAY={gateway}")
    if mac:
        if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}", mac):
            raise Failure(f"--mac {mac}: wanted six pairs of digits, such as 02:00:00:00:00:01", Status.USAGE)
        pairs.append(f"MAC={mac}")
    return ";".join(pairs)


# Whose namespace


def _resolve(target: str) -> Target:
    if target.startswith("/"):
        return _namespace(target)
    if target.isdecimal():
        return _namespace(f"/proc/{target}/ns/net")
    if not _ID.fullmatch(target):
        raise Failure(
            f"{target}: wanted the name of a container, a process id, or the path of a namespace", Status.USAGE
        )
    found = _of_docker(target) or _of_podman(target)
    if found is None:
        raise Failure(f"{target}: no running container of Docker's or podman's has this name or id")
    return found


def _namespace(path: str) -> Target:
    try:
        return Target(f"netns-{netns.identify(path).inode}", path)
    except NotFound:
        raise Failure(f"{path}: there is no such namespace") from None
    except KernelError as error:
        raise Failure(str(error)) from None


def _of_docker(name: str) -> Target | None:
    if not os.path.exists(docker.SOCKET):
        return None
    try:
        found = docker.container(docker.SOCKET, name)
    except docker.DockerAwayError as error:
        raise Failure(str(error)) from None
    return Target(found[0], f"/proc/{found[1]}/ns/net") if found else None


def _of_podman(name: str) -> Target | None:
    podman = shutil.which("podman")
    if podman is None:
        return None
    try:
        done = subprocess.run(
            [podman, "inspect", "--type", "container", "--format", "{{.ID}} {{.State.Pid}}", "--", name],
            capture_output=True,
            text=True,
            timeout=_PODMAN_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"cannot ask podman: {error}") from None
    words = done.stdout.split()
    if done.returncode != 0 or len(words) != 2 or words[1] == "0":
        return None
    return Target(words[0], f"/proc/{words[1]}/ns/net")


# On disk


def _directory() -> str:
    try:
        return os.path.join(paths.run_dir(os.environ), "attached")
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None


def _file(one: Attached) -> str:
    return os.path.join(_directory(), f"{one.container_id}@{one.ifname}.json")


def _write(one: Attached) -> None:
    os.makedirs(_directory(), 0o700, exist_ok=True)
    temporary = f"{_file(one)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(one))
    os.rename(temporary, _file(one))


def _all() -> list[Attached]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(_directory())):
            with (
                contextlib.suppress(OSError, msgspec.MsgspecError),
                open(os.path.join(_directory(), name), "rb") as file,
            ):
                if name.endswith(".json"):
                    found.append(msgspec.json.decode(file.read(), type=Attached))
    return found


def prune() -> int:
    """Forget what was attached to namespaces that are gone; how many."""
    gone = [one for one in _all() if not _is_still(one)]
    for one in gone:
        _forget(one)
    return len(gone)


def _forget(one: Attached) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_file(one))
    with contextlib.suppress(OSError):  # others are there
        os.rmdir(_directory())


def _is_still(one: Attached) -> bool:
    try:
        return netns.identify(one.netns).inode == one.inode
    except KernelError:
        return False


def _print(choices: Choices, done: list[Attached]) -> None:
    documents = [_document(one) for one in done]
    if choices.as_json:
        output.document({"attachments": documents})
        return
    output.table(
        ("NETWORK", "CONTAINER", "INTERFACE", "MAC", "ADDRESSES"),
        [
            (one["network"], one["container_id"][:12], one["interface"], one["mac"], " ".join(one["addresses"]))
            for one in documents
        ],
    )


def _document(one: Attached) -> AttachedDocument:
    interfaces = one.result.get("interfaces", ())
    mac = next((i.get("mac", "") for i in interfaces if i.get("sandbox") and i.get("name") == one.ifname), "")
    return AttachedDocument(
        network=one.network,
        target=one.target,
        container_id=one.container_id,
        netns=one.netns,
        interface=one.ifname,
        mac=mac,
        addresses=[ip["address"] for ip in one.result.get("ips", ())],
    )
