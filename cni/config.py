"""Configuration from standard input: bytes → plain values → a plugin's own types. Pure.

Rules of this file
- Bytes that are no JSON object, are too many, or are nested too deep: code 6. A value of the wrong type: code 7, and
  the text names its JSON path, what is there and what was expected.
- null is the same as absent, as it is for Go's encoding/json into a struct. Of a key given twice the last one counts.
- An integer beyond 64 bits, and any number written with a point or exponent, is a float; no float passes for an int.
- The case of keys is ignored inside runtimeConfig, and only there: containerd capitalises them (go-cni's types have no
  JSON tags). What is inside a capability that we do not know is left as it is.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from cni.errors import CniError, Code, printable

LIMIT = 1024 * 1024  # bytes of standard input; the hand-off to the warm workers has the same bound
MAX_DEPTH = 100

T = TypeVar("T")

# As for CNI_IFNAME. The kernel takes more, but makes br0 of br%d, which is then not the link that was named.
_LINK_NAME = re.compile(r"[A-Za-z0-9_.+@=,~^][A-Za-z0-9_.+@=,~^\-]{0,14}", re.ASCII)
# Directories of /proc/sys/net/ipv4/conf beside those of interfaces (net/ipv4/devinet.c, inetdev_init).
KERNELS_NAMES = ("all", "default")
_INT64_MIN = -(2**63)
_UINT64_MAX = 2**64 - 1

# CONVENTIONS.md, "Dynamic Plugin specific fields": capability → keys inside it, at any level, in their spelling.
_CAPABILITIES: Mapping[str, tuple[str, ...]] = {
    "portMappings": ("hostPort", "containerPort", "protocol", "hostIP"),
    "ipRanges": ("subnet", "rangeStart", "rangeEnd", "gateway"),
    "bandwidth": ("ingressRate", "ingressBurst", "egressRate", "egressBurst"),
    "dns": ("servers", "searches", "options"),
    "ips": (),
    "mac": (),
    "infinibandGUID": (),
    "deviceID": (),
    "aliases": (),
    "cgroupPath": (),
}
_CAPABILITY_BY_LOWER = {name.lower(): name for name in _CAPABILITIES}


def decode(stdin: bytes) -> dict[str, object]:
    """The configuration object, without nulls and with runtimeConfig's keys in the conventions' spelling.

    Raises:
        CniError: 6, the text says where the bytes stop being JSON.
    """
    document = decode_object(stdin, "network config")
    config = without_nulls(document)
    runtime = config.get("runtimeConfig")
    if isinstance(runtime, dict):
        config["runtimeConfig"] = _spelled_capabilities(runtime)
    return config


def decode_object(data: bytes, what: str) -> dict[str, object]:
    """The JSON object in `data`, nulls included; `what` names it in the error.

    Raises:
        CniError: 6.
    """
    if len(data) > LIMIT:
        raise _undecodable(what, f"more than {LIMIT} bytes; make it smaller")
    try:
        document = msgspec.json.decode(data)
    except RecursionError:
        raise _undecodable(what, "nested too deep") from None
    except UnicodeDecodeError as error:
        raise _undecodable(what, f"not UTF-8: {error.reason}") from error
    except msgspec.MsgspecError as error:
        raise _undecodable(what, str(error)) from error
    if document is None:
        # As for Go: null decodes into a struct and leaves every field empty.
        return {}
    if not isinstance(document, dict):
        raise _undecodable(what, f"$: wanted an object, found {_kind(document)}")
    if data.count(b"{") + data.count(b"[") <= MAX_DEPTH:
        return document
    try:
        if _deeper_than(document, MAX_DEPTH):
            raise _undecodable(what, f"nested deeper than {MAX_DEPTH} levels")
    except RecursionError:
        raise _undecodable(what, "nested too deep") from None
    return document


def without_nulls(document: Mapping[str, object]) -> dict[str, object]:
    """A copy without the keys whose value is null, at every level. A null inside a list stays."""
    return {key: _clean(value) for key, value in document.items() if value is not None}


def convert(document: object, kind: type[T], at: str = "$") -> T:
    """`document` as a value of `kind`; keys that `kind` does not know are ignored.

    Args:
        document: what `decode` gave, or a part of it.
        kind: anything that msgspec converts to; types are taken strictly, a bool is no int and "1" is no number.
        at: the JSON path of `document`, for the text of an error.

    Raises:
        CniError: 7, e.g. `$.ipam.ranges[0][0].subnet: expected str, found 5`.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise _invalid(document, str(error), at) from error
    except RecursionError:
        raise CniError(Code.INVALID_CONFIG, f"invalid network config: {at}: nested too deep") from None


def refused(key: str, value: object, reason: str) -> CniError:
    """The error for a key of the right type whose value a plugin cannot take; `reason` says what it wants."""
    return CniError(Code.INVALID_CONFIG, f"invalid network config: $.{key}: {reason}, found {found(value)}")


def check_link_name(key: str, name: str) -> None:
    """Refuse what names no link.

    Raises:
        CniError: 7.
    """
    if name in KERNELS_NAMES:
        raise refused(key, name, "want another name, the kernel has its own meaning for this one")
    if not _LINK_NAME.fullmatch(name) or name in (".", ".."):
        raise refused(key, name, "want an interface name: 1 to 15 ASCII letters, digits and _ . - + @ = , ~ ^")


def found(value: object, limit: int = 60) -> str:
    """A foreign value as part of a message: JSON in ASCII, at most `limit` characters of it."""
    try:
        text = msgspec.json.encode(value).decode("utf-8")
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        text = _kind(value)
    # JSON leaves DEL and everything beyond ASCII alone; a terminal would act on some of that.
    safe = "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text[: limit + 1])
    return safe if len(text) <= limit else f"{safe[:limit]}..."


def _undecodable(what: str, reason: str) -> CniError:
    # The reference's words ("error unmarshall"), so that whoever searches for them finds the same thing.
    return CniError(Code.DECODING_FAILURE, f"error unmarshall {what}: {printable(reason)}")


def _deeper_than(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value)
    return False


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return without_nulls(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if type(value) is int and not _INT64_MIN <= value <= _UINT64_MAX:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _spelled_capabilities(runtime: Mapping[str, object]) -> dict[str, object]:
    """runtimeConfig with the conventions' spelling of capabilities and of the keys inside those that we know."""
    spelled: dict[str, object] = {}
    for key, value in runtime.items():
        name = _CAPABILITY_BY_LOWER.get(key.lower())
        if name is None:
            spelled[key] = value
        else:
            spelled[name] = _spelled_keys(value, {inner.lower(): inner for inner in _CAPABILITIES[name]})
    return spelled


def _spelled_keys(value: object, names: Mapping[str, str]) -> object:
    if isinstance(value, dict):
        return {names.get(key.lower(), key): _spelled_keys(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled_keys(item, names) for item in value]
    return value


# msgspec: "Expected `int`, got `str` - at `$.ranges[0].mtu`" or "… - at `key` in `$.sysctl`"; no tail where the
# document itself is wrong.
# Compiled with the first error: a request that is in order does not pay for them.
_PLACE = r"(?s)(.*) - at (`key` in )?`(\$.*)`"
_STEP = r"\.([^.\[\]]+)|\[([0-9]+)\]"
_EXPECTED = r"Expected (.*?)(?:, got .*)?"


def _invalid(document: object, message: str, at: str) -> CniError:
    """CniError 7 from msgspec's message, with the value that is there."""
    place = re.fullmatch(_PLACE, message)
    reason, path = (place[1], place[3]) if place else (message, "$")
    of_key = bool(place and place[2])
    expected = re.fullmatch(_EXPECTED, reason)
    plain = (f"expected {expected[1]}" if expected else reason[:1].lower() + reason[1:]).replace("`", "")
    wanted = plain.replace(" | null", "")  # nulls were dropped: nobody can put one there
    known, value = (False, None) if of_key else _look_up(document, path)
    where = f"{'a key of ' if of_key else ''}{path.replace('$', at, 1)}"
    there = f", found {found(value)}" if known else ""
    return CniError(Code.INVALID_CONFIG, f"invalid network config: {where}: {wanted}{there}")


def _look_up(document: object, path: str) -> tuple[bool, Any]:
    """The value at msgspec's path; False where the path does not say (`[...]`: some value of a map)."""
    value: Any = document
    rest = path.removeprefix("$")
    while rest:
        step = re.match(_STEP, rest)
        if step is None:
            return False, None
        try:
            value = value[step[1]] if step[1] is not None else value[int(step[2])]
        except (KeyError, IndexError, TypeError):
            return False, None
        rest = rest[step.end() :]
    return True, value


def _kind(value: object) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list | tuple) else "an object"
