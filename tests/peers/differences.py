"""Where Netloom differs from Debian's reference plugins, and means to: the one table. docs/plugins.md has it in words.

Each entry accepts some differences of facts (tests.peers.twins.Difference). The tests fail for a difference that no
entry accepts, and for an entry that accepted none: when the reference or Netloom changes, its line has to go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.peers.twins import ABSENT, Case, Difference

ANY = ".*"
_ADDRESSED = "(eth0|net1)"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Differences that are meant.

    Attributes:
        plugins: in whose cases.
        what, ours, theirs: regular expressions for the whole of a difference's fields.
        reference, netloom, why: for people.
        refused: only in cases that our ADD refuses.
        needs: a queueing discipline that some kernels lack, without which there is no such difference.
    """

    plugins: tuple[str, ...]
    what: str
    ours: str
    theirs: str
    reference: str
    netloom: str
    why: str
    refused: bool = False
    needs: str = ""

    def covers(self, case: Case, difference: Difference) -> bool:
        return bool(
            set(self.plugins) & case.types
            and bool(case.error) >= self.refused
            and re.fullmatch(self.what, difference.what)
            and re.fullmatch(self.ours, difference.ours)
            and re.fullmatch(self.theirs, difference.theirs)
        )


_LIFETIMES = r"preferred_life_time \d+ scope global valid_life_time \d+"
_CHAINED = ("portmap", "firewall", "tuning", "bandwidth")
_INTERFACE = ("bridge", "ptp", "macvlan")

ACCEPTED: tuple[Accepted, ...] = (
    # What is printed.
    Accepted(
        (*_INTERFACE, "loopback", "host-local", "static"),
        r"ADD \S+ result \.dns",
        ABSENT,
        r"\{\}",
        'prints `"dns": {}` in a result of 1.0.0',
        "leaves an empty `dns` out",
        "As the specification has it, and the newest reference.",
    ),
    Accepted(
        ("loopback",),
        r"ADD loopback result \.(interfaces|ip4|ip6|ips)\S*",
        ANY,
        ANY,
        "prints 0.2.0 with `interfaces`, and 0.3.1 and 0.4.0 without `ips[].version`",
        "prints the asked version",
        "The specification.",
    ),
    Accepted(
        (*_INTERFACE, *_CHAINED, "host-local", "static"),
        r"(ADD|DEL) \S+( again)? code",
        "2|4|7|100",
        "999",
        "has one error code, 999, for nearly everything",
        "tells wrong environment (4), configuration (7), exhaustion (100) and other causes apart",
        "[Errors](errors.md); the texts name key, value and remedy.",
    ),
    Accepted(
        (*_INTERFACE, *_CHAINED, "host-local"),
        r"DEL \S+( again)? (code|exit status)",
        f"0|{ABSENT}",
        "1|999",
        "DEL fails where ADD had refused the configuration, or the master is gone",
        "DEL succeeds",
        "There is nothing to remove, and a failing DEL keeps the runtime from removing the rest.",
    ),
    Accepted(
        ("bridge", "ptp", *_CHAINED),
        r"CHECK \S+ (code|exit status)",
        f"0|{ABSENT}",
        "1|2|999",
        "CHECK fails directly after ADD: bridge without `ipam`, a route without `gw`, a sysctl with `IFNAME`; "
        "portmap with one address, or with one of each family; bandwidth without a rate crashes",
        "CHECK succeeds",
        "The specification.",
    ),
    Accepted(
        ("bandwidth",),
        r"CHECK bandwidth (code|exit status)",
        "1|999",
        f"0|{ABSENT}",
        "CHECK does not see that the host end's shaper is gone",
        "CHECK fails",
        "The specification.",
    ),
    Accepted(
        ("portmap",),
        r"ADD portmap (code|exit status)",
        "1|7",
        f"0|{ABSENT}",
        "publishes nothing, and says nothing, where `hostIP` is no address or prevResult has none of the container",
        "error 7",
        "Nobody would know.",
    ),
    # What a refused ADD leaves.
    Accepted(
        (*_INTERFACE, "portmap", "host-local", "loopback"),
        r"after (ADD|DEL): ((host|container) link .* kind|file .*|(host|container) sysctl ipv[46]\..*"
        r"|container (link lo flags|address ::1/128 dev lo|route .* dev lo .*))",
        f"{ABSENT}|0",
        "(?!absent).*",
        "a refused ADD leaves links, the bridge, forwarding, host-local's files, or `lo` up",
        "all is as before",
        "An ADD undoes itself; what can be refused is refused before anything is done.",
        refused=True,
    ),
    Accepted(
        ("bridge",),
        r"after (ADD|DEL): file /var/lib/cni/networks/net/(lock|last_reserved_ip\.0)",
        r"(750|600 .*) ?",
        ABSENT,
        "looks at the bridge before it asks IPAM",
        "asks IPAM first; where the bridge is none, host-local's round has gone on by one address",
        "The attachment record, which names the address, is written before the bridge is made.",
    ),
    # Links.
    Accepted(
        _INTERFACE,
        r"after ADD: (host|container) link .* txqlen",
        "1000",
        ABSENT,
        "makes links with a transmit queue of 0 packets",
        "1000, the kernel's own",
        "A queueing discipline that is attached later takes its limit from it. As the newest reference.",
    ),
    Accepted(
        ("bridge",),
        r"(ADD \w+ result \.interfaces\[1\]\.mac|after ADD: host link <host end of (eth0|another)> address)",
        "<MAC of host's <host end of (eth0|another)>>",
        "<MAC of host's (br0|cni0)>",
        "a bridge without an address takes the MAC of its first port",
        "a bridge has a MAC of its own from birth",
        "It would change with the ports that come and go, and its neighbours would lose it.",
    ),
    Accepted(
        ("bridge",),
        r"after DEL: host link (br0|cni0) address",
        "<MAC of host's (br0|cni0)>",
        "00:00:00:00:00:00",
        "which is zero when the last port has gone",
        "the MAC stays",
        "As before.",
    ),
    Accepted(
        ("bridge",),
        r"after (ADD|DEL): host link (br0|cni0) ifalias",
        "made by netloom",
        ABSENT,
        "does not mark the bridge",
        "the alias `made by netloom`",
        "GC deletes an idle bridge only if it is ours.",
    ),
    # Addresses.
    Accepted(
        _INTERFACE,
        r"after (ADD|DEL): (container|host) address fd00:.*",
        f"nodad true (noprefixroute true )?{_LIFETIMES}",
        _LIFETIMES,
        "waits until the kernel has looked for duplicates of an IPv6 address",
        "`nodad` on the addresses",
        "IPAM gives no address twice, and detection takes a second and more. With `enabledad` bridge does wait.",
    ),
    Accepted(
        ("ptp",),
        r"after ADD: container address [0-9.]+/\d+ dev eth0",
        f"broadcast [0-9.]+ noprefixroute true {_LIFETIMES}",
        f"broadcast [0-9.]+ {_LIFETIMES}",
        "deletes the kernel's route to the network, which comes back when the link goes down and up",
        "`noprefixroute` on the address: there never is one",
        "It would lead to neighbours that are not there.",
    ),
    # Sysctls.
    Accepted(
        _INTERFACE,
        rf"after ADD: container sysctl (ipv4\.conf\.{_ADDRESSED}\.arp_notify|ipv6\.conf\.{_ADDRESSED}\.ndisc_notify)",
        "1",
        "0",
        "sets `arp_notify` in bridge and macvlan with `ipam` only, `ndisc_notify` in macvlan only",
        "both are 1 on each interface that it makes",
        "Neighbours learn at once where an address went.",
    ),
    Accepted(
        _INTERFACE,
        rf"after ADD: (container|host) sysctl ipv6\.conf\.({_ADDRESSED}|<host end of eth0>)\.accept_dad",
        "0",
        "1",
        "sets `accept_dad` to 0 in bridge with `ipam` only",
        "0 on each container's interface, and on ptp's host end with IPv6",
        "As with `nodad`: link-local addresses would wait too.",
    ),
    Accepted(
        _INTERFACE,
        rf"after ADD: container sysctl ipv6\.conf\.{_ADDRESSED}\.keep_addr_on_down",
        "1",
        "0",
        "IPv6 addresses are lost when the interface goes down",
        "`keep_addr_on_down` is 1",
        "As IPv4; as the newest reference.",
    ),
    Accepted(
        ("bridge",),
        r"after (ADD|DEL): host sysctl ipv6\.conf\.br0\.accept_ra",
        f"1|{ABSENT}",
        "0",
        "switches `accept_ra` off on a bridge that was there",
        "does so only on a bridge that it makes",
        "It may be how the host itself gets its addresses.",
    ),
    # Queueing disciplines.
    Accepted(
        ("bandwidth",),
        r"after ADD: host qdisc (<host end of eth0>|bwp\w+) \S+",
        ".*kind fq_codel.*",
        ABSENT,
        "has one queue for all below the shaper",
        "fair queues (`fq_codel`), where the kernel has them",
        "One download does not delay everything else.",
        needs="fq_codel",
    ),
    # host-local.
    Accepted(
        ("host-local",),
        r"after (ADD|DEL): file /var/lib/cni/.*",
        "(600) (.*)",
        "(644) (.*)",
        "files that everybody may read",
        "mode 0600",
        "As the newest reference.",
    ),
)


def unexplained(case: Case, differences: Iterable[Difference], used: set[Accepted]) -> list[Difference]:
    """The differences of a case that no entry accepts; adds the entries that accepted one to `used`."""
    left = []
    for difference in differences:
        entry = next((entry for entry in ACCEPTED if entry.covers(case, difference)), None)
        if entry is None:
            left.append(difference)
        else:
            used.add(entry)
    return left


def table() -> str:
    """The rows for docs/plugins.md, in Markdown."""
    lines = ["| plugins | reference 1.1.1 | Netloom | why |", "|---|---|---|---|"]
    for entry in ACCEPTED:
        plugins = ", ".join(f"`{plugin}`" for plugin in entry.plugins)
        lines.append(f"| {plugins} | {entry.reference} | {entry.netloom} | {entry.why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # to be put into docs/plugins.md
