"""What an operator asks of pools and reservations: of this node's own the ledger does it, of a cluster's `member`."""

from collections.abc import Container
from typing import Protocol

from ipamd.engine import Engine
from ipamd.errors import PreconditionError
from ipamd.lease import Ledger
from ipamd.pool import Pool, PoolSpec
from ipamd.store.base import Reservation


class SharedDesk(Protocol):
    """The same for pools of the cluster. Raises IpamdError."""

    async def create_pool(self, name: str, spec: PoolSpec) -> Pool: ...

    async def delete_pool(self, name: str) -> None: ...

    async def reserve(self, name: str, text: str, note: str) -> Reservation: ...

    async def unreserve(self, name: str, text: str) -> None: ...


class Desk:
    """Each method is durable when it returns. Raises IpamdError.

    `networks`: the names of this node's networks, each of which has the pool of its name.
    """

    def __init__(self, engine: Engine, ledger: Ledger, shared: SharedDesk | None = None) -> None:
        self._engine = engine
        self._ledger = ledger
        self._shared = shared
        self.networks: Container[str] = ()

    async def create_pool(self, name: str, spec: PoolSpec) -> Pool:
        """As `Ledger.create_pool`."""
        if self._shared is not None and spec.mode != "local":
            return await self._shared.create_pool(name, spec)
        return await self._engine.run(lambda: self._ledger.create_pool(name, spec), grows=True)

    async def delete_pool(self, name: str) -> None:
        """As `Ledger.delete_pool`; raises PreconditionError for the pool of a network, which would lack it."""
        shared = self._shared_of(name)
        if shared is not None:
            await shared.delete_pool(name)
        else:
            await self._engine.run(lambda: self._delete_pool(name))

    async def reserve(self, name: str, text: str, note: str) -> Reservation:
        """As `Ledger.reserve`."""
        shared = self._shared_of(name)
        if shared is not None:
            return await shared.reserve(name, text, note)
        return await self._engine.run(lambda: self._ledger.reserve(name, text, note), grows=True)

    async def unreserve(self, name: str, text: str) -> None:
        """As `Ledger.unreserve`."""
        shared = self._shared_of(name)
        if shared is not None:
            await shared.unreserve(name, text)
        else:
            await self._engine.run(lambda: self._ledger.unreserve(name, text))

    def _delete_pool(self, name: str) -> None:
        if name in self.networks:
            raise networks_pool(name)
        self._ledger.delete_pool(name)

    def _shared_of(self, name: str) -> SharedDesk | None:
        pool = self._ledger.pools.get(name)
        return self._shared if pool is None or pool.spec.mode != "local" else None


def networks_pool(name: str) -> PreconditionError:
    """Why a pool is not deleted alone."""
    return PreconditionError(
        f"pool {name} is that of network {name}; delete the network (netloom network delete {name})"
    )
