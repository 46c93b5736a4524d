"""One request of a runtime: environment and standard input, checked, as one frozen value. Pure.

Rules of this file
- The order of the checks is the reference's (pkg/skel/skel.go): a malformed variable, then missing ones in the order
  of the table, then standard input, then the network's name, then the version.
- A name that goes into a path, a table or a log is checked here, once: network, container id, interface name, type of
  plugin and of IPAM. ASCII only, whole string.
- DEL succeeds as far as it can: a prevResult or CNI_ARGS that cannot be read are treated as absent. The ADD that got
  them failed on them, and a DEL that fails as well would be repeated for ever by the runtime.
- Precedence of what may be given in several places: runtimeConfig, then args.cni, then CNI_ARGS (CONVENTIONS.md).
"""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

import msgspec

from cni import versions
from cni.config import KERNELS_NAMES, convert, decode, decode_object, found
from cni.errors import CniError, Code, shown
from cni.result import Result

T = TypeVar("T")


class Command(StrEnum):
    """The verbs of spec 1.1.0."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


class Attachment(msgspec.Struct, frozen=True):
    """What GC's list of valid attachments is made of."""

    container_id: str
    ifname: str


class Request(msgspec.Struct, frozen=True):
    """A checked request. To change a field, `msgspec.structs.replace(request, field=…)`.

    Attributes:
        netns: path of the container's namespace, "" where there is none (any more).
        args: CNI_ARGS; every pair, whether known or not.
        malformed_args: the pairs of CNI_ARGS that are none; `arguments` refuses them.
        path: CNI_PATH's directories.
        config: the configuration without nulls, runtimeConfig's keys in the conventions' spelling.
        stdin: the configuration as received, for a delegate.
        cni_version: of the configuration and so of the answer; "" has become "0.1.0".
        prev_result: None where there is none, and where DEL got one that cannot be read.
        valid_attachments: GC only; everything else of this network may go.
        environment: the runtime's, for a delegate.
        request_id: 16 hexadecimal digits that tie the logs of all processes together.
        began_ns: CLOCK_BOOTTIME in nanoseconds before anything was done.
    """

    command: Command
    plugin: str
    container_id: str
    netns: str
    ifname: str
    args: Mapping[str, str]
    ignore_unknown: bool
    malformed_args: tuple[str, ...]
    path: tuple[str, ...]
    config: Mapping[str, object]
    stdin: bytes
    network: str
    cni_version: str
    prev_result: Result | None
    valid_attachments: tuple[Attachment, ...]
    environment: Mapping[str, str]
    request_id: str
    began_ns: int

    @property
    def netns_override(self) -> bool:
        """Whether the runtime waives the rule that the plugin's namespace and the container's are different ones."""
        return self.environment.get("CNI_NETNS_OVERRIDE", "").upper() in ("1", "TRUE")

    @property
    def ipam_type(self) -> str:
        """The delegate for addresses, "" where there is none."""
        ipam = self.config.get("ipam")
        kind = ipam.get("type", "") if isinstance(ipam, Mapping) else ""
        return kind if isinstance(kind, str) else ""

    def arguments(self, *known: str) -> dict[str, str]:
        """The pairs of CNI_ARGS that the plugin knows, by key; case counts.

        Raises:
            CniError: 4 for a pair that is none, and for unknown keys unless IgnoreUnknown is set; never on DEL.
        """
        if self.command is not Command.DEL:
            if self.malformed_args:
                raise CniError(
                    Code.INVALID_ENVIRONMENT,
                    f"invalid CNI_ARGS pair {shown(self.malformed_args[0])}",
                    "wanted KEY=VALUE;KEY2=VALUE2, with IgnoreUnknown being one of 1, true, 0, false",
                )
            unknown = [f"{key}={value}" for key, value in self.args.items() if key not in (*known, "IgnoreUnknown")]
            if unknown and not self.ignore_unknown:
                listed = " ".join(shown(pair) for pair in unknown)
                raise CniError(
                    Code.INVALID_ENVIRONMENT,
                    f"CNI_ARGS: unknown args [{listed}]",
                    f"known are {', '.join(known) or 'none'}; IgnoreUnknown=1 makes the plugin ignore the others",
                )
        return {key: self.args[key] for key in known if key in self.args}

    def capability(self, name: str, kind: type[T]) -> T | None:
        """runtimeConfig's value of a capability, None where the runtime gave none.

        Raises:
            CniError: 7, the text names the JSON path.
        """
        return self._nested(("runtimeConfig", name), kind)

    def convention(self, name: str, kind: type[T]) -> T | None:
        """The value of a key in args.cni, None where there is none. Raises as `capability` does."""
        return self._nested(("args", "cni", name), kind)

    def mac(self, *known: str) -> tuple[str, str]:
        """The MAC that was asked for, as it was written, and where; "" where none was.

        Args:
            known: further keys of CNI_ARGS that the plugin knows.

        Raises:
            CniError: 7 where it is no string; as `arguments` does.
        """
        arguments = self.arguments("MAC", *known)
        return (
            _first(self.capability("mac", str), "$.runtimeConfig.mac")
            or _first(self.convention("mac", str), "$.args.cni.mac")
            or _first(arguments.get("MAC"), "CNI_ARGS: MAC")
            or ("", "")
        )

    def ips(self, *known: str) -> tuple[str, ...]:
        """The addresses that were asked for, each with or without prefix length, in canonical spelling.

        Taken from the first place that names any. (host-local adds up all three places instead, and then refuses an
        address that stands in two of them.)

        Args:
            known: further keys of CNI_ARGS that the plugin knows.

        Raises:
            CniError: 7 or 4 for an address that is none; as `arguments` does.
        """
        # A comma list, as the reference's static plugin reads it; host-local knows one address only.
        arguments = [ip for ip in self.arguments("IP", *known).get("IP", "").split(",") if ip]
        for ips, where, code in (
            (self.capability("ips", list[str]), "$.runtimeConfig.ips", Code.INVALID_CONFIG),
            (self.convention("ips", list[str]), "$.args.cni.ips", Code.INVALID_CONFIG),
            (arguments, "CNI_ARGS: IP", Code.INVALID_ENVIRONMENT),
        ):
            if ips:
                return tuple(_ip(ip, where, code) for ip in ips)
        return ()

    def _nested(self, keys: tuple[str, ...], kind: type[T]) -> T | None:
        if keys[0] not in self.config:
            return None
        value: object = self.config
        at = "$"
        for key in keys:
            value = convert(value, dict[str, object], at).get(key)
            at = f"{at}.{key}"
            if value is None:
                return None
        return convert(value, kind, at)


def command(environment: Mapping[str, str]) -> Command:
    """The verb. Raises CniError 4 for one that does not exist; an unset one is the caller's to answer."""
    asked = environment.get("CNI_COMMAND", "")
    try:
        return Command(asked)
    except ValueError:
        # The reference reads and checks standard input first; the answer is the same whenever that is in order.
        raise CniError(Code.INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {asked}") from None


def check_environment(verb: Command, environment: Mapping[str, str]) -> None:
    """The variables that the verb needs: well-formed and there.

    Raises:
        CniError: 4, in the reference's words. A malformed value is reported before what is missing.
    """
    missing = []
    for name, verbs, check in _VARIABLES:
        if verb not in verbs:
            continue
        value = environment.get(name, "")
        if not value:
            missing.append(name)
        elif check is not None:
            check(value)
    if missing:
        raise CniError(Code.INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")


def parse(
    environment: Mapping[str, str],
    stdin: bytes,
    *,
    plugin: str,
    supported: tuple[str, ...],
    request_id: str,
    began_ns: int,
) -> Request:
    """A checked request from what a runtime gave; not for VERSION, which has nothing to check.

    Args:
        environment: the whole environment.
        stdin: the configuration.
        plugin: the CNI type that was called.
        supported: the spec versions it speaks.
        request_id: 16 hexadecimal digits.
        began_ns: CLOCK_BOOTTIME at the start.

    Raises:
        CniError: 1, 4, 6 or 7.
    """
    verb = command(environment)
    check_environment(verb, environment)
    config = decode(stdin)
    network = check_network(config)
    version = check_version(verb, config, supported)
    _check_types(config)
    pairs, malformed = _parse_args(environment.get("CNI_ARGS", ""))
    return Request(
        command=verb,
        plugin=plugin,
        container_id=environment.get("CNI_CONTAINERID", ""),
        netns=environment.get("CNI_NETNS", ""),
        ifname=environment.get("CNI_IFNAME", ""),
        args=pairs,
        ignore_unknown=_BOOLEANS.get(pairs.get("IgnoreUnknown", "").lower(), False),
        malformed_args=malformed,
        # An empty element would mean the working directory, where anybody may have put a delegate.
        path=tuple(entry for entry in environment.get("CNI_PATH", "").split(os.pathsep) if entry),
        config=config,
        stdin=stdin,
        network=network,
        cni_version=version,
        prev_result=_prev_result(verb, config, version),
        valid_attachments=_valid_attachments(stdin) if verb is Command.GC else (),
        environment=environment,
        request_id=request_id,
        began_ns=began_ns,
    )


def check_network(config: Mapping[str, object]) -> str:
    """The network's name. Raises CniError: 6 for no string, as the reference; 7 where it is missing or malformed."""
    name = config.get("name", "")
    if not isinstance(name, str):
        raise CniError(
            Code.DECODING_FAILURE, f"error unmarshall network config: $.name: expected str, found {found(name)}"
        )
    if not name:
        raise CniError(Code.INVALID_CONFIG, "missing network name")
    if not _NAME.fullmatch(name):
        raise CniError(Code.INVALID_CONFIG, "invalid characters found in network name", shown(name))
    return name


def config_version(config: Mapping[str, object]) -> str:
    """The configuration's version; without one it is 0.1.0. Raises CniError 6 where it is no string."""
    version = config.get("cniVersion", "")
    if not isinstance(version, str):
        raise CniError(
            Code.DECODING_FAILURE,
            f"decoding version from network config: $.cniVersion: expected str, found {found(version)}",
        )
    return version or "0.1.0"


def check_version(verb: Command, config: Mapping[str, object], supported: tuple[str, ...]) -> str:
    """The configuration's version, if the plugin speaks it and it has the verb. Raises CniError 1."""
    version = config_version(config)
    if version not in versions.SUPPORTED:
        raise versions.incompatible(version, supported)
    since = _SINCE.get(verb)
    if since is not None and not versions.at_least(version, since):
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"config version does not allow {verb}",
            f"config is {shown(version)}, {verb} exists since {since}",
        )
    if version not in supported:
        raise versions.incompatible(version, supported)
    return version


_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*", re.ASCII)
# Printable ASCII without what the kernel refuses (/ : and blanks), what it expands (eth%d becomes eth0), and what a
# shell, an nft script or a log line would take for something else.
_IFNAME = re.compile(r"[A-Za-z0-9_.+@=,~^][A-Za-z0-9_.+@=,~^\-]*", re.ASCII)
_IFNAME_MAX = 15  # bytes, IFNAMSIZ - 1
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
_SINCE = {Command.CHECK: "0.4.0", Command.GC: "1.1.0", Command.STATUS: "1.1.0"}


def _check_container_id(value: str) -> None:
    if not _NAME.fullmatch(value):
        raise CniError(
            Code.INVALID_ENVIRONMENT, "invalid characters in containerID", f"CNI_CONTAINERID is {shown(value)}"
        )


def _check_ifname(value: str) -> None:
    if len(value.encode("utf-8", "surrogateescape")) > _IFNAME_MAX:
        reason = "interface name is too long"
    elif value in (".", ".."):
        reason = "interface name is . or .."
    elif any(char in "/:" or char.isspace() for char in value):
        reason = "interface name contains / or : or whitespace characters"
    elif value in KERNELS_NAMES:
        reason = "interface name has a meaning of its own for the kernel"
    elif not _IFNAME.fullmatch(value):
        # The reference leaves these to the kernel, which takes most of them.
        reason = "interface name contains characters other than ASCII letters, digits and _ . - + @ = , ~ ^"
    else:
        return
    raise CniError(
        Code.INVALID_ENVIRONMENT,
        reason,
        f"CNI_IFNAME is {shown(value)}; interface name should be less than {_IFNAME_MAX + 1} characters",
    )


_ATTACHMENT_VERBS = (Command.ADD, Command.CHECK, Command.DEL)
# In the order in which missing ones are named. The specification has CNI_PATH optional for ADD and DEL; the reference
# asks for it always, and every runtime sets it.
_VARIABLES = (
    ("CNI_CONTAINERID", _ATTACHMENT_VERBS, _check_container_id),
    ("CNI_NETNS", (Command.ADD, Command.CHECK), None),
    ("CNI_IFNAME", _ATTACHMENT_VERBS, _check_ifname),
    ("CNI_PATH", (*_ATTACHMENT_VERBS, Command.GC, Command.STATUS), None),
)


def _check_types(config: Mapping[str, object]) -> None:
    """`type` and `ipam.type` name executables: no path may come of them."""
    ipam = config.get("ipam", {})
    if not isinstance(ipam, dict):
        raise CniError(Code.INVALID_CONFIG, f"invalid network config: $.ipam: expected object, found {found(ipam)}")
    for at, kind in (("$.type", config.get("type", "")), ("$.ipam.type", ipam.get("type", ""))):
        if not isinstance(kind, str):
            raise CniError(Code.INVALID_CONFIG, f"invalid network config: {at}: expected str, found {found(kind)}")
        if kind and not _NAME.fullmatch(kind):
            raise CniError(
                Code.INVALID_CONFIG,
                f"invalid network config: {at}: invalid characters found in plugin type",
                f"found {shown(kind)}; wanted the name of an executable in CNI_PATH: letters, digits and _ . -",
            )


def _parse_args(text: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The pairs of CNI_ARGS, and what is none. Of a key given twice the last one counts."""
    pairs: dict[str, str] = {}
    malformed = []
    for pair in text.split(";") if text else ():
        key, *values = pair.split("=")
        if len(values) != 1 or (key == "IgnoreUnknown" and values[0].lower() not in _BOOLEANS):
            malformed.append(pair)
        else:
            pairs[key] = values[0]
    return pairs, tuple(malformed)


def _prev_result(verb: Command, config: Mapping[str, object], version: str) -> Result | None:
    document = config.get("prevResult")
    if document is None or verb in (Command.GC, Command.STATUS):
        return None
    try:
        result = versions.decode(document, version, "$.prevResult")
    except CniError:
        if verb is Command.DEL:
            return None
        raise
    own = document.get("cniVersion") if isinstance(document, Mapping) else None
    if verb is not Command.DEL and isinstance(own, str) and own and not versions.same_shape(own, version):
        # As the reference: whoever made it was given another configuration, so it is not this attachment's.
        raise CniError(
            Code.INVALID_CONFIG,
            f"invalid network config: $.prevResult.cniVersion: expected a result of version {version}, the "
            f"configuration's, found {found(own)}",
            "the runtime must hand on the result that the plugin before this one printed",
        )
    return result


def _valid_attachments(stdin: bytes) -> tuple[Attachment, ...]:
    """The attachments that GC must leave alone.

    libcni writes the same list under two names (the specification once had the wrong one). Its list is null when the
    runtime gives a nil slice, and both keys are missing when the runtime gives no arguments at all: null says that
    nothing is valid, a missing key says nothing, and freeing everything on nothing would be the worst of all mistakes.
    """
    document = decode_object(stdin, "network config")
    present = [key for key in ("cni.dev/valid-attachments", "cni.dev/attachments") if key in document]
    if not present:
        raise CniError(
            Code.INVALID_CONFIG,
            "invalid network config: GC without cni.dev/valid-attachments",
            "nothing was freed; the runtime must list the attachments that are still valid, if need be as []",
        )
    key = next((key for key in present if document[key] is not None), present[0])
    at = f'$["{key}"]'
    entries = convert(document[key] if document[key] is not None else [], list[dict[str, object]], at)
    return tuple(_attachment(entry, f"{at}[{index}]") for index, entry in enumerate(entries))


def _attachment(entry: Mapping[str, object], at: str) -> Attachment:
    # Without regard to case, as Go reads it: an entry must never be lost, since what it names would be freed.
    by_lower = {key.lower(): value for key, value in entry.items()}
    values = []
    for key in ("containerID", "ifname"):
        value = by_lower.get(key.lower())
        if not isinstance(value, str) or not value:
            raise CniError(
                Code.INVALID_CONFIG,
                f"invalid network config: {at}.{key}: expected a name, found {found(value)}",
                "nothing was freed",
            )
        values.append(value)
    return Attachment(values[0], values[1])


def _first(value: str | None, where: str) -> tuple[str, str] | None:
    return (value, where) if value else None


def _ip(text: str, where: str, code: Code) -> str:
    try:
        return versions.canonical_cidr(text) if "/" in text else versions.canonical_ip(text)
    except ValueError:
        raise CniError(
            code, f"invalid IP address at {where}: {shown(text)}", "wanted 10.0.0.5 or 10.0.0.5/24"
        ) from None
