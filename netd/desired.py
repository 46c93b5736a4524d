"""What this host's kernel should hold, kept so that one host's change costs what that host has, however many others.

Pure: no I/O. Whoever wants an entry is its owner: a peer by its name, this host as "". Where two want entries of one
key that differ, the first keeps it and the other is told; when the first leaves, the other gets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from netd.values import Entry, Key

OWN = ""


class Desired:
    """Entries by key, and who wants them."""

    def __init__(self) -> None:
        self._claims: dict[Key, dict[str, Entry]] = {}
        self._keys: dict[str, frozenset[Key]] = {}
        self._disputed: set[Key] = set()

    def get(self, key: Key) -> Entry | None:
        """The wanted entry of this key."""
        claims = self._claims.get(key)
        return next(iter(claims.values())) if claims else None

    def owner(self, key: Key) -> str | None:
        """Who wants it, or None."""
        claims = self._claims.get(key)
        return next(iter(claims)) if claims else None

    def keys(self) -> Set[Key]:
        """Of everything that is wanted."""
        return self._claims.keys()

    def owners(self) -> Set[str]:
        """All who want something, and who are known to want nothing."""
        return self._keys.keys()

    def keys_of(self, owner: str) -> frozenset[Key]:
        """What one of them wants."""
        return self._keys.get(owner, frozenset())

    def replace(self, owner: str, entries: Iterable[Entry]) -> set[Key]:
        """From now on an owner wants these and nothing else; the keys whose wanted entry may have changed."""
        wanted = {entry.key: entry for entry in entries}
        before = self._keys.get(owner, frozenset())
        changed: set[Key] = set()
        for key in before.difference(wanted):
            changed.add(key)
            self._leave(key, owner)
        for key, entry in wanted.items():
            claims = self._claims.setdefault(key, {})
            if claims.get(owner) != entry:
                claims[owner] = entry
                changed.add(key)
            self._judge(key, claims)
        self._keys[owner] = frozenset(wanted)
        return changed

    def remove(self, owner: str) -> set[Key]:
        """An owner is gone; the keys whose wanted entry may have changed."""
        changed = self.replace(owner, ())
        del self._keys[owner]
        return changed

    def disputes(self) -> list[tuple[Key, list[str]]]:
        """Keys that several want, differently: who has it, then who does not."""
        return [(key, list(self._claims[key])) for key in sorted(self._disputed)]

    def _leave(self, key: Key, owner: str) -> None:
        claims = self._claims[key]
        claims.pop(owner, None)
        if not claims:
            del self._claims[key]
        self._judge(key, claims)

    def _judge(self, key: Key, claims: Mapping[str, Entry]) -> None:
        if len(claims) > 1 and len(set(claims.values())) > 1:
            self._disputed.add(key)
        else:
            self._disputed.discard(key)
