"""Nodes of a cluster: hosts with an ipamd each, joined to one etcd, and clients that never rest.

    with Fleet(etcd, 10, pools) as fleet:
        with fleet.load(10):                    # all clients work for at least so long, and while the block runs
            etcd.kill(etcd.leader())
        fleet.assert_sound()                    # the judge, ipamd's own lists, ip check

Clients keep what they own from one load to the next, and logs go on: the judge sees all of a fleet's life.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from ipamd.client import Client, IpamError
from protos.ipam.v1 import ipam_pb2 as pb
from protos.ipam.v1 import ipam_pb2_grpc
from tests.cluster.clients import NETWORK, Clients
from tests.cluster.judge import Tail, Verdict, judge, read
from tests.etcd import EtcdCluster
from tests.hosts import Host, HostError, Ipamd, wait_until

_FIRST = 11  # number on the underlay
# Generous: a check of the whole cluster waits for everybody's publishing.
_CALL_S = 30.0
_SETTLE_S = 90.0

Spec = Mapping[str, Any]


@dataclass
class Node:
    """One host with its ipamd and its clients."""

    name: str
    host: Host
    ipamd: Ipamd
    clients: Clients

    @property
    def socket(self) -> str:
        return str(self.host.path(self.ipamd.socket))

    def client(self) -> Client:
        """Its API, for the test; to be closed."""
        return Client(self.socket, timeout_s=_CALL_S)

    def held(self) -> dict[tuple[str, str], frozenset[str]]:
        """What its ipamd has for the clients: node and key → addresses."""
        with self.client() as client:
            found = client.list_allocations(pb.ListAllocationsRequest(network=NETWORK))
            return {
                (self.name, entry.key.container_id): frozenset(a.cidr.partition("/")[0] for a in entry.addresses)
                for entry in found
            }

    def check(self, repair: bool = False) -> list[str]:
        """What `netloom ip check` finds, without a look into the kernel."""
        with grpc.insecure_channel(f"unix:{self.socket}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = ipam_pb2_grpc.IpamStub(channel)
            answer = stub.CheckStore(pb.CheckStoreRequest(repair=repair), timeout=_CALL_S)
        return [f"{one.kind} {one.pool} {one.address} {one.node}: {one.text}" for one in answer.differences]


class Fleet:
    """Use it as a context manager: it returns when every node serves and knows the pools.

    `pools`: name → the message's fields, as `pb.PoolSpec` takes them. `ask_for`: pool → subnet of which clients ask for
    single addresses. `environments`: node → variables of its ipamd. `rest_s`: how long clients rest after an answer at
    most.
    """

    def __init__(
        self,
        etcd: EtcdCluster | None,
        count: int,
        pools: Mapping[str, Spec],
        *,
        ask_for: Mapping[str, str] | None = None,
        environments: Mapping[str, Mapping[str, str]] | None = None,
        config: Mapping[str, Mapping[str, object]] | None = None,
        rest_s: float = 0.0,
    ) -> None:
        self.etcd = etcd
        self.pools = dict(pools)
        self.nodes: dict[str, Node] = {}
        self._names = [f"n{number}" for number in range(1, count + 1)]
        self._ask_for = ask_for or {}
        self._environments = environments or {}
        self._config = config or {}
        self._rest_s = rest_s
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for number, name in enumerate(self._names):
                host = stack.enter_context(Host(name))
                if self.etcd is not None:
                    self.etcd.underlay.join(host, _FIRST + number)
                ipamd = Ipamd(host, self._settings(name))
                ipamd.env = dict(self._environments.get(name, {}))
                ipamd.launch()
                pools = {pool: self._ask_for.get(pool, "") for pool in self.pools}
                clients = Clients(name, host.path(ipamd.socket), host.directory / "clients.log", pools, self._rest_s)
                stack.callback(clients.kill)
                self.nodes[name] = Node(name, host, ipamd, clients)
            for node in self.nodes.values():
                node.ipamd.wait()
            self._make_pools()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def load(self, seconds: float) -> Iterator[None]:
        """Clients of all nodes work while the block runs, and until so many seconds are over."""
        end = time.monotonic() + seconds
        for node in self.nodes.values():
            node.clients.go()
        try:
            yield
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            for node in self.nodes.values():
                node.clients.stop()
        for node in self.nodes.values():
            node.clients.stopped()

    def verdict(self) -> Verdict:
        """Of all that was logged so far."""
        return judge(read(node.clients.log for node in self.nodes.values() if node.clients.log.exists()))

    def until_served(self, *pools: str) -> None:
        """Under load: returns when each node has given a new address of each of these pools (of all) from now on."""
        since_ns = time.monotonic_ns()
        missing = {(name, pool) for name in self.nodes for pool in pools or self.pools}
        tails = [Tail(node.clients.log) for node in self.nodes.values()]

        def served() -> bool:
            for event in (event for tail in tails for event in tail.read()):
                if event["e"] == "got" and event["new"] and event["t"] >= since_ns:
                    missing.discard((event["node"], event["p"]))
            return not missing

        def explain() -> str:
            return ", ".join(sorted(f"{pool} on {name}" for name, pool in missing))

        wait_until(served, "a new address on every node", explain, _SETTLE_S)

    def until_heard(self, count: int, *kinds: str) -> None:
        """Under load: returns when each node's clients had so many answers (of these kinds) from now on."""
        tails = {node.clients.log: Tail(node.clients.log) for node in self.nodes.values()}
        heard = Counter[Path]()

        def enough() -> bool:
            for log, tail in tails.items():
                heard[log] += sum(event["e"] in (kinds or ("got", "freed", "no")) for event in tail.read())
            return min(heard.values()) >= count

        wait_until(enough, f"{count} answers on every node", lambda: str(heard), _SETTLE_S)

    def assert_sound(self) -> Verdict:
        """No address had two owners, none is lost, and every node finds its state in order. For a fleet at rest."""
        verdict = self.verdict()
        verdict.assert_clean()
        try:
            self._until_none("what clients own and what ipamd has", lambda: verdict.compare(self._held()))
        except HostError as error:
            raise HostError(f"{error}\n{self._stories(verdict.compare(self._held()))}") from None
        for node in self.nodes.values():
            self._until_none(f"ip check on {node.name}", node.check)
        # The command itself, once: it looks into the kernel too.
        next(iter(self.nodes.values())).host.run([sys.executable, "-m", "cli", "ip", "check"])
        return verdict

    def _until_none(self, what: str, differences: Callable[[], list[str]]) -> None:
        """What is published late, or is repaired by ipamd itself, may take its time."""
        found: list[str] = []

        def none() -> bool:
            try:
                found[:] = differences()
            except (IpamError, grpc.RpcError) as error:
                found[:] = [str(error)]
            return not found

        wait_until(none, what, lambda: "\n" + "\n".join(found[:20]), _SETTLE_S)

    def _stories(self, differences: Sequence[str]) -> str:
        """What clients and ipamd wrote down about the first keys that are not as they should be."""
        lines: list[str] = []
        for text in differences[:3]:
            name, _, key = text.split()[1].partition("/")
            node = self.nodes[name]
            for log in (node.clients.log.read_text(encoding="utf-8"), node.ipamd.log()):
                lines += [
                    line for line in log.splitlines() if f'"k":"{key}"' in line or f"container_id={key} " in line
                ][-12:]
        return "\n".join(lines)

    def _held(self) -> dict[tuple[str, str], frozenset[str]]:
        found: dict[tuple[str, str], frozenset[str]] = {}
        for node in self.nodes.values():
            found |= node.held()
        return found

    def _settings(self, name: str) -> dict[str, dict[str, object]]:
        tables: dict[str, dict[str, object]] = {table: dict(values) for table, values in self._config.items()}
        tables.setdefault("ipamd", {})["node"] = name
        if self.etcd is not None:
            tables.setdefault("store", {})["kind"] = "etcd"
            tables["etcd"] = {"endpoints": list(self.etcd.endpoints), **tables.get("etcd", {})}
        return tables

    def _make_pools(self) -> None:
        first = next(iter(self.nodes.values()))
        for node in [first] if self.etcd is not None else self.nodes.values():
            with node.client() as client:
                for name, fields in self.pools.items():
                    client.create_pool(name, pb.PoolSpec(**fields))
        for node in self.nodes.values():
            with node.client() as client:

                def known(client: Client = client) -> bool:
                    return set(self.pools) <= {pool.name for pool in client.list_pools()}

                wait_until(known, f"the pools on {node.name}", node.ipamd.log)


def pool(subnet: str, mode: str = "", cooldown_ms: int = 500, **more: Any) -> dict[str, Any]:
    """Fields of a pool of one subnet."""
    ranges = [pb.RangeSet(ranges=[pb.Range(subnet=subnet)])]
    return {"range_sets": ranges, "mode": mode, "cooldown_ms": cooldown_ms, **more}


def fill(nodes: Mapping[str, Node], pool: str) -> dict[str, str]:
    """Takes every address of a pool that can be had: address → node. Cooling ones are waited for.

    Raises HostError where one comes twice. What it took is for `empty` to release.
    """
    found: dict[str, str] = {}
    for node in nodes.values():
        with node.client() as client:
            for address in _every(client, pool):
                if address in found:
                    raise HostError(f"{address} of {pool} was given to {found[address]}, then to {node.name}")
                found[address] = node.name
    return found


def _every(client: Client, pool: str) -> Iterator[str]:
    for number in range(1_000_000):
        key = pb.AttachmentKey(client="test", network="fill", container_id=f"{pool}-{number}", ifname="eth0")
        deadline = time.monotonic() + _SETTLE_S
        while True:
            try:
                answer = client.allocate(key, pools=(pool,))
                break
            except IpamError as error:
                if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    return
                # Only cooling ones are left.
                if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield from (address.cidr.partition("/")[0] for address in answer.addresses)


def empty(nodes: Mapping[str, Node]) -> None:
    """Releases what `fill` took."""
    for node in nodes.values():
        with node.client() as client:
            for entry in list(client.list_allocations(pb.ListAllocationsRequest(network="fill"))):
                client.release(entry.key, generation=entry.generation)
