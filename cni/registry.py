"""Every CNI type that Netloom answers to, and the module that does the work.

The one table: the cold entry, the installed launchers and PyInstaller's hidden imports are read from it. A module is
only ever imported by a name from here, never by one that came from outside.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Literal

import msgspec

Kind = Literal["interface", "chained", "ipam", "meta"]


class Entry(msgspec.Struct, frozen=True):
    """One plugin.

    Attributes:
        type: the `type` of a network configuration, and the executable's name.
        module: who implements add, delete, check, gc and status.
        kind: "interface" and "chained" as the specification has them; "ipam" is delegated to; "meta" is the rest.
        oldest: the oldest spec version it speaks; it speaks all from there on.
    """

    type: str
    module: str
    kind: Kind
    oldest: str = "0.1.0"


_ENTRIES = (
    Entry("bridge", "cni.interface.bridge", "interface"),
    Entry("ptp", "cni.interface.ptp", "interface"),
    Entry("macvlan", "cni.interface.macvlan", "interface"),
    Entry("netloom", "cni.interface.netloom", "interface"),
    Entry("flannel", "cni.interface.flannel", "meta"),
    Entry("loopback", "cni.interface.loopback", "interface"),
    Entry("portmap", "cni.chained.portmap", "chained"),
    Entry("firewall", "cni.chained.firewall", "chained", oldest="0.4.0"),
    Entry("tuning", "cni.chained.tuning", "chained"),
    Entry("bandwidth", "cni.chained.bandwidth", "chained", oldest="0.3.0"),
    Entry("ipamd", "cni.ipam.ipamd", "ipam"),
    Entry("host-local", "cni.ipam.host_local", "ipam"),
    Entry("static", "cni.ipam.static", "ipam"),
)

PLUGINS: Mapping[str, Entry] = MappingProxyType({entry.type: entry for entry in _ENTRIES})


def load(plugin: str) -> ModuleType:
    """The module of a type in PLUGINS. Raises KeyError for any other type."""
    return import_module(PLUGINS[plugin].module)
