"""What to change, from what is wanted and what was found. Pure: no I/O.

Rules of this file
- Only what is ours is changed: routes of our protocol, devices with our alias, and what is on those. Nothing else is in
  `found`; where something foreign is in the way, the kernel refuses, and that is told.
- What is new comes before what goes, devices before what is on them, and what leads to a neighbour before the route by
  it: at no moment does a packet find less than before or after.
- A route that differs is exchanged in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from netd.values import ROUTE, Device, Entry, Key


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes in the order in which they are made.

    Attributes:
        devices: (wanted, found or None): made, changed, or made anew, before all else.
        put: (wanted, found or None): added, or put in the place of what was found.
        drop: removed.
        drop_devices: removed last, with all that is on them.
    """

    devices: list[tuple[Device, Device | None]] = field(default_factory=list)
    put: list[tuple[Entry, Entry | None]] = field(default_factory=list)
    drop: list[Entry] = field(default_factory=list)
    drop_devices: list[Device] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.devices or self.put or self.drop or self.drop_devices)


def plan(keys: Iterable[Key], desired: Callable[[Key], Entry | None], found: Callable[[Key], Entry | None]) -> Plan:
    """The changes that make the entries of these keys what they should be."""
    made = Plan()
    for key in sorted(keys):
        want, have = desired(key), found(key)
        if want == have:
            continue
        if isinstance(want, Device):
            made.devices.append((want, have if isinstance(have, Device) else None))
        elif isinstance(have, Device):
            made.drop_devices.append(have)
        elif want is not None:
            made.put.append((want, have))
        elif have is not None:
            made.drop.append(have)
    # Routes go first: what they need must not go before them.
    made.drop.sort(key=lambda entry: entry.key[0] != ROUTE)
    return made


def needs_new_device(want: Device, have: Device) -> bool:
    """Whether the kernel can make the one of the other only by making it anew."""
    same = replace(have, mac=want.mac, mtu=want.mtu, tx_checksum=want.tx_checksum, up=want.up, learns=want.learns)
    return same != want
