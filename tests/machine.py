"""What no test may change: files of Netloom and of CNI on the machine itself."""

from __future__ import annotations

import os

# Not whether the directories are there: without overlayfs a host has to make its mount points (tests/hosts.py).
_DIRECTORIES = (
    "/run/netloom",
    "/run/netns",
    "/run/cni",
    "/var/lib/netloom",
    "/var/lib/cni",
    "/etc/netloom",
    "/etc/cni/net.d",
    "/opt/cni/bin",
)
_OTHERS = ("netns-", "cni-")  # as podman and containerd call the namespaces that they make in /run/netns


def own_files() -> frozenset[str]:
    """The paths in those directories, one level deep; quick enough to be asked after each test."""
    return frozenset(path for directory in _DIRECTORIES for path in _in(directory))


def _in(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [f"{directory}/{name}" for name in names if not (directory == "/run/netns" and name.startswith(_OTHERS))]
