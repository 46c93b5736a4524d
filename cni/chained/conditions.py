"""portmap's `conditionsV4` and `conditionsV6`: which packets a published port is for, in nftables' words or iptables'.

What comes out is text for nft, so what goes in is read word by word: nothing but comparisons of a packet's fields.
libnftables has the last word on whether they make sense. Pure.

iptables' words are translated where there is a plain counterpart; what the operator must write otherwise is part of
the refusal.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address, ip_interface

from cni import config
from cni.errors import CniError

# nft(8), payload, meta, ct, fib and socket expressions, and what compares them. No statement and no verdict.
_WORDS = frozenset(
    re.findall(
        r"\w+",
        "ip ip6 tcp udp sctp th meta ct fib ether vlan socket ipv4 ipv6 in and or xor not "
        "saddr daddr sport dport dscp ecn ttl hoplimit length nexthdr version protocol l4proto nfproto flowlabel "
        "iif iifname iifgroup iifkind oif oifname oifgroup oifkind mark pkttype skuid skgid cgroup rtclassid secpath "
        "state status direction zone original reply new established related invalid untracked expected assured "
        "confirmed type local unicast broadcast multicast anycast blackhole unreachable prohibit "
        "flags syn ack fin rst psh urg transparent wildcard id pcp",
    )
)
_NAMED = frozenset(("iif", "iifname", "iifkind", "oif", "oifname", "oifkind"))  # what follows is anybody's name
_SIGNS = frozenset(("==", "!=", "<", ">", "<=", ">=", "&", "|", "^", "{", "}", ",", "!", ".", "(", ")", "/"))
# libnftables would ask the domain name system for what is neither a number nor an address.
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,10}(-[0-9]{1,10})?|[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{2}){5}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_.+@=~^\-]{1,15}\*?", re.ASCII)
_TOKEN = re.compile(r'"[^"]*"|[{}(),|^]|[<>=!]=|[<>!&](?!=)|[^\s"{}(),|&<>=!]+', re.ASCII)
_LIMIT = 4096  # characters

_NO_PART = "want comparisons only"
_NO_TRANSLATION = "an option of iptables that has no plain translation"
_EXAMPLES = {4: '["ip saddr 10.0.0.0/8", "iifname eth0"]', 6: '["ip6 saddr fd00::/8", "iifname eth0"]'}


def parse(key: str, words: Sequence[str], version: int) -> str:
    """The condition in nft's syntax, "" where there is none.

    Args:
        key: the configuration's key, for the text of an error.
        words: its value; how it is split does not matter, as the reference puts blanks between.
        version: 4 or 6.

    Raises:
        CniError: 7, naming the key and the word that cannot be taken.
    """
    text = " ".join(words).strip()
    if not text:
        return ""
    if len(text) > _LIMIT:
        raise _refused(key, text, f"want at most {_LIMIT} characters", version)
    if text[0] in "-!":
        text = " ".join(_translated(key, text, version))
    return _checked(key, text, version)


def _refused(key: str, value: str, reason: str, version: int) -> CniError:
    return config.refused(key, value, f"{reason}; write comparisons in nftables' syntax, such as {_EXAMPLES[version]}")


# nftables


def _checked(key: str, text: str, version: int) -> str:
    """The text, if each word of it may be there."""
    if re.search(r"[^\x20-\x7e\t]|[;#$@`\\']", text):
        raise _refused(key, text, "want no ; # $ @ ` \\ ' or line break", version)
    tokens = []
    end = depth = 0
    named = False
    for match in _TOKEN.finditer(text):
        if text[end : match.start()].strip():
            break
        word, end = match[0], match.end()
        depth += {"{": 1, "}": -1}.get(word, 0)
        if depth not in (0, 1):
            raise _refused(key, text, "want each { closed by a }, and none inside another", version)
        if word in _WORDS:
            named = word in _NAMED
        elif not (word in _SIGNS or _is_value(word)):
            name = word[1:-1] if word[0] == '"' else word
            if not (named and _NAME.fullmatch(name)):
                raise _refused(key, word, _NO_PART, version)
            word = f'"{name}"'  # a link may be called like a word of nft's
        tokens.append(word)
    if text[end:].strip() or depth:
        raise _refused(key, text[end:].strip() or text, _NO_PART, version)
    return " ".join(tokens)


def _is_value(word: str) -> bool:
    """Whether it is a number, a MAC, or an address, with a length or as a range."""
    if _NUMBER.fullmatch(word):
        return True
    try:
        if "/" in word:
            ip_interface(word)
        else:
            for part in word.split("-", 1):
                ip_address(part)
    except ValueError:
        return False
    return True


# iptables


def _translated(key: str, text: str, version: int) -> Iterator[str]:
    """nft's words for iptables'."""
    words = text.split()
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        negated = word == "!"
        if negated:
            word = words[position] if position < len(words) else ""
            position += 1
        if word in _IGNORED:
            position += 1
            continue
        if word in ("-m", "--match"):
            module = words[position] if position < len(words) else ""
            if module not in _MODULES:
                raise _refused(key, f"-m {module}", _NO_TRANSLATION, version)
            position += 1
            continue
        translate = _OPTIONS.get(word)
        value = words[position] if position < len(words) else ""
        position += 1
        if value == "!":  # as old versions of iptables took it
            negated = not negated
            value = words[position] if position < len(words) else ""
            position += 1
        if translate is None:
            raise _refused(key, word, _NO_TRANSLATION, version)
        if not value or value.startswith("-"):
            raise _refused(key, word, "an option of iptables without its value", version)
        try:
            yield translate(value, "!= " if negated else "", "ip" if version == 4 else "ip6")
        except ValueError:
            raise _refused(key, f"{word} {value}", _NO_TRANSLATION, version) from None


Translation = Callable[[str, str, str], str]


def _several(value: str, one: Callable[[str], str] = str) -> str:
    parts = [one(part) for part in value.split(",")]
    return parts[0] if len(parts) == 1 else "{ " + ", ".join(parts) + " }"


def _address(field: str) -> Translation:
    return lambda value, no, ip: f"{ip} {field} {no}{_several(value)}"


def _ports(field: str) -> Translation:
    return lambda value, no, _ip: f"th {field} {no}{_several(value, _port)}"


def _port(text: str) -> str:
    low, colon, high = text.partition(":")
    if not re.fullmatch(r"[0-9]{0,5}", low) or not re.fullmatch(r"[0-9]{0,5}", high):
        raise ValueError(text)
    return f"{low or 0}-{high or 65535}" if colon else low


def _link(value: str, no: str, _ip: str) -> str:
    return f'iifname {no}"{value[:-1]}*"' if value.endswith("+") else f'iifname {no}"{value}"'


def _protocol(value: str, no: str, _ip: str) -> str:
    if value.lower() not in ("tcp", "udp", "sctp"):
        raise ValueError(value)
    return f"meta l4proto {no}{value.lower()}"


def _mark(value: str, no: str, _ip: str) -> str:
    number, slash, mask = value.partition("/")
    return f"meta mark & {mask} {no or '== '}{number}" if slash else f"meta mark {no}{number}"


def _kind(field: str) -> Translation:
    return lambda value, no, _ip: f"fib {field} type {no}{value.lower()}"


def _state(value: str, no: str, _ip: str) -> str:
    return f"ct state {no}{_several(value.lower())}"


_IGNORED = frozenset(("--comment",))
_MODULES = frozenset(
    ("comment", "tcp", "udp", "sctp", "multiport", "iprange", "mark", "addrtype", "conntrack", "state")
)
_OPTIONS: dict[str, Translation] = {
    **dict.fromkeys(("-s", "--source", "--src"), _address("saddr")),
    **dict.fromkeys(("-d", "--destination", "--dst"), _address("daddr")),
    **dict.fromkeys(("-i", "--in-interface"), _link),
    **dict.fromkeys(("-p", "--protocol"), _protocol),
    **dict.fromkeys(("--sport", "--source-port", "--sports", "--source-ports"), _ports("sport")),
    **dict.fromkeys(("--dport", "--destination-port", "--dports", "--destination-ports"), _ports("dport")),
    "--src-range": _address("saddr"),
    "--dst-range": _address("daddr"),
    "--mark": _mark,
    "--src-type": _kind("saddr"),
    "--dst-type": _kind("daddr"),
    "--ctstate": _state,
    "--state": _state,
}
