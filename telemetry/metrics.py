"""The metrics of ipamd, in a registry of their own: nothing is global, so a test or a second instance starts at zero.

Names follow Prometheus' conventions: base units (seconds, bytes), counters end in _total. Labels hold only what is
bounded: results, reasons, methods, status codes, pools; never an address or a container.

Every method may be called from any thread.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

AllocationResult = Literal["created", "repeated", "exhausted", "cooling", "conflict", "refused", "error"]

_REQUEST_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_FSYNC_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_CONFLICT_BUCKETS = (0, 1, 2, 3, 5, 8, 13, 20)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolSample:
    """How full one family of one pool is. `size` may exceed 2^64 (IPv6); it is exported as a float."""

    pool: str
    family: Literal["ipv4", "ipv6"]
    size: int
    allocated: int
    reserved: int
    cooling: int
    elsewhere: int = 0  # of a pool of mode cluster-address: held by other nodes
    blocks: tuple[int, int, int] | None = None  # node-block: this node's, all nodes' together, how many there are


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """How a node stands to its cluster."""

    reachable: bool
    joined: bool
    draining: bool
    unpublished: int


class IpamdMetrics:
    """What ipamd counts and measures. One instance for each daemon."""

    def __init__(self, version: str = "", node: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, descriptors, CPU seconds of this process
        Info("netloom_ipamd_build", "What runs here.", registry=self.registry).info({"version": version, "node": node})
        self._allocations = Counter(
            "netloom_ipamd_allocations_total",
            "Allocate requests, by how they ended.",
            ["result"],
            registry=self.registry,
        )
        self._releases = Counter(
            "netloom_ipamd_releases_total",
            "Allocations released, by who or what asked.",
            ["reason"],
            registry=self.registry,
        )
        self._requests = Histogram(
            "netloom_ipamd_request_seconds",
            "Time from a request's arrival to its answer.",
            ["method", "code"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "netloom_ipamd_commit_batch_size",
            "Requests that shared one commit.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self._fsyncs = Histogram(
            "netloom_ipamd_fsync_seconds",
            "Time of one durable commit of the store.",
            buckets=_FSYNC_BUCKETS,
            registry=self.registry,
        )

        self._claims = Counter(
            "netloom_ipamd_blocks_claimed_total", "Blocks that this node claimed.", registry=self.registry
        )
        self._claim_conflicts = Histogram(
            "netloom_ipamd_claim_conflicts",
            "How often another node was faster before a claim of blocks succeeded.",
            buckets=_CONFLICT_BUCKETS,
            registry=self.registry,
        )
        self._etcd = Histogram(
            "netloom_ipamd_etcd_seconds",
            "Time until something was told to etcd, or asked of it.",
            ["operation"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )

    def allocation(self, result: AllocationResult) -> None:
        """Counts one Allocate request."""
        self._allocations.labels(result).inc()

    def released(self, reason: str, count: int = 1) -> None:
        """Counts released allocations. `reason` is one of few words: "request", "gc", "boot", "netns", "replay"."""
        self._releases.labels(reason).inc(count)

    def request(self, method: str, code: str, seconds: float) -> None:
        """Records one answered request: the RPC's name ("Allocate") and its gRPC status code ("OK", "NOT_FOUND")."""
        self._requests.labels(method, code).observe(seconds)

    def commit(self, batch_size: int, fsync_s: float) -> None:
        """Records one durable commit: how many requests shared it and how long it took, in seconds."""
        self._batches.observe(batch_size)
        self._fsyncs.observe(fsync_s)

    def claimed(self, blocks: int, conflicts: int, seconds: float) -> None:
        """Records a claim of blocks that succeeded."""
        self._claims.inc(blocks)
        self._claim_conflicts.observe(conflicts)
        self._etcd.labels("claim").observe(seconds)

    def told(self, operation: str, seconds: float) -> None:
        """Records something that etcd was told: "publish", "address"."""
        self._etcd.labels(operation).observe(seconds)

    def watch_cluster(self, sample: Callable[[], ClusterSample]) -> None:
        """Has `sample` called at each scrape."""
        for name, text, value in (
            ("etcd_reachable", "Whether etcd answered the last call.", lambda: sample().reachable),
            ("cluster_joined", "Whether this node met its cluster since it started.", lambda: sample().joined),
            ("draining", "Whether this node gives no new addresses of the cluster's pools.", lambda: sample().draining),
            ("unpublished", "Changes that the cluster does not know yet.", lambda: sample().unpublished),
        ):
            Gauge(f"netloom_ipamd_{name}", text, registry=self.registry).set_function(value)

    def watch_pools(self, samples: Callable[[], Iterable[PoolSample]]) -> None:
        """Has `samples` called at each scrape, in the scraper's thread or task, for the gauges of the pools.

        Samples of the same pool and family are added up (a pool may hold several range sets of one family).
        Where `samples` raises, the scrape goes on without the pools and the failure is logged.
        """
        self.registry.register(_Pools(samples))

    def render(self) -> bytes:
        """The registry in Prometheus' text format, to be served as CONTENT_TYPE."""
        return generate_latest(self.registry)


class _Pools(Collector):
    def __init__(self, samples: Callable[[], Iterable[PoolSample]]) -> None:
        self._samples = samples

    def describe(self) -> Iterator[Metric]:
        # Without this the registry would call collect() to learn the names, while the daemon is still starting.
        return iter(_pool_gauges())

    def collect(self) -> Iterator[Metric]:
        gauges = _pool_gauges()
        for (pool, family), values in self._sums().items():
            # Without values for what the pool has not: a pool without blocks has no gauges of them.
            for gauge, value in zip(gauges, values, strict=False):
                gauge.add_metric([pool, family], float(value))
        return iter(gauges)

    def _sums(self) -> dict[tuple[str, str], tuple[int, ...]]:
        sums: dict[tuple[str, str], tuple[int, ...]] = {}
        try:
            for s in self._samples():
                values = (s.size, s.allocated, s.reserved, s.cooling, s.elsewhere, *(s.blocks or ()))
                so_far = sums.get((s.pool, s.family), (0,) * len(values))
                sums[s.pool, s.family] = tuple(map(sum, zip(so_far, values, strict=True)))
        except Exception:
            _logger.exception("the pools' fill cannot be read; this scrape goes without it")
            return {}
        return sums


def _pool_gauges() -> list[GaugeMetricFamily]:
    return [
        GaugeMetricFamily(f"netloom_ipamd_pool_{name}", text, labels=["pool", "family"])
        for name, text in (
            ("size", "Addresses that the pool may hand out; of a pool of mode node-block, from this node's blocks."),
            ("allocated", "Addresses in use."),
            ("reserved", "Addresses that an operator keeps back."),
            ("cooling", "Addresses freed lately, not yet to be reused."),
            ("elsewhere", "Addresses that other nodes hold, of a pool of mode cluster-address."),
            ("blocks", "Blocks that this node holds, of a pool of mode node-block."),
            ("blocks_claimed", "Blocks that nodes hold, all together."),
            ("blocks_total", "Blocks that the pool has."),
        )
    ]
