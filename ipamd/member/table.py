"""Whose each block is, as etcd has it: kept up by what is read, watched, and done by this node itself.

These three come in any order, so each fact has the revision that it is of, and an older one changes nothing.
"""

import logging
from collections.abc import Sequence

from msgspec import Struct

from cluster import layout
from cluster.etcd import Pair
from cluster.layout import BlockRecord, LayoutError
from telemetry import log

_logger = logging.getLogger("ipamd.member")

Place = tuple[str, str]  # pool, block


class Claim(Struct, frozen=True):
    """Whose a block is, and since which revision of etcd."""

    node: str
    node_id: str
    revision: int


class Table:
    """See the top of this file. `identity` is this node's."""

    def __init__(self, identity: BlockRecord) -> None:
        self._identity = identity
        self._claims: dict[str, dict[str, Claim]] = {}  # by pool and CIDR

    def get(self, pool: str, cidr: str) -> Claim | None:
        """Whose a block is; None: nobody's."""
        return self._claims.get(pool, {}).get(cidr)

    def cidrs(self, pool: str) -> list[str]:
        """The blocks of a pool that somebody has."""
        return list(self._claims.get(pool, ()))

    def own(self) -> list[Place]:
        """This node's, of all pools."""
        mine = self._identity.node_id
        return [(n, c) for n, known in self._claims.items() for c, claim in known.items() if claim.node_id == mine]

    def others(self, pool: str) -> list[str]:
        """The blocks of a pool that other nodes have."""
        mine = self._identity.node_id
        return [cidr for cidr, claim in self._claims.get(pool, {}).items() if claim.node_id != mine]

    def is_own(self, pool: str, cidr: str) -> bool:
        """Whether a block is this node's."""
        claim = self.get(pool, cidr)
        return claim is not None and claim.node_id == self._identity.node_id

    def note(self, pair: Pair) -> Place:
        """A record was seen."""
        pool, cidr = layout.split(pair.key.removeprefix(layout.BLOCKS))
        try:
            record = layout.decode(BlockRecord, pair.key, pair.value)
        except LayoutError as error:
            record = BlockRecord("?", "?")
            log.event(_logger, "error", "a block of the cluster cannot be read", error=str(error))
        known = self._claims.setdefault(pool, {})
        if cidr not in known or known[cidr].revision <= pair.mod_revision:
            known[cidr] = Claim(record.node, record.node_id, pair.mod_revision)
        return pool, cidr

    def note_own(self, pool: str, cidr: str, revision: int) -> None:
        """This node wrote its record."""
        self._claims.setdefault(pool, {})[cidr] = Claim(self._identity.node, self._identity.node_id, revision)

    def note_free(self, pool: str, cidr: str, revision: int) -> None:
        """There was no record at this revision."""
        known = self._claims.get(pool, {})
        if cidr in known and known[cidr].revision <= revision:
            del known[cidr]

    def replace(self, pairs: Sequence[Pair], revision: int, pool: str = "", *, went_back: bool = False) -> None:
        """All records (of one pool) were read, as of a revision; `went_back`: of another history, so none is newer."""
        if went_back:
            self._claims.clear()
        for name in [pool] if pool else list(self._claims):
            known = self._claims.get(name, {})
            self._claims[name] = {cidr: claim for cidr, claim in known.items() if claim.revision > revision}
        for pair in pairs:
            self.note(pair)
