"""The metrics of netd, read at each scrape from a snapshot that its thread made. Names follow Prometheus' conventions.

Labels hold only what is bounded: kinds of entries, states of peers, where holders are; never a host or an address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class Sample:
    """What there is to tell at one moment."""

    full: int = 0
    changes: int = 0
    repairs: int = 0
    last_full_s: float = 0.0
    problems: int = 0
    entries: Mapping[str, int] = field(default_factory=dict)  # kind → how many are in the kernel
    peers: Mapping[str, int] = field(default_factory=dict)  # state → how many
    overlay_addresses: Mapping[str, int] = field(default_factory=dict)  # "here", "other" → how many are held


class NetdMetrics:
    """One instance for each daemon. `sample` is called in the scraper's task and must not block."""

    def __init__(self, version: str, node: str, sample: Callable[[], Sample]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("netloom_netd_build", "What runs here.", registry=self.registry).info({"version": version, "node": node})
        self.registry.register(_Samples(sample))

    def render(self) -> bytes:
        """The registry in Prometheus' text format."""
        return generate_latest(self.registry)


class _Samples(Collector):
    def __init__(self, sample: Callable[[], Sample]) -> None:
        self._sample = sample

    def describe(self) -> Iterator[Metric]:
        return self._families(Sample())

    def collect(self) -> Iterator[Metric]:
        return self._families(self._sample())

    @staticmethod
    def _families(now: Sample) -> Iterator[Metric]:
        yield CounterMetricFamily("netloom_netd_full_reconciles", "Times that everything was compared.", now.full)
        yield CounterMetricFamily("netloom_netd_changes", "Entries of the kernel put or removed.", now.changes)
        yield CounterMetricFamily("netloom_netd_repairs", "Of these, what somebody else had changed.", now.repairs)
        yield GaugeMetricFamily("netloom_netd_last_full_seconds", "Time of the last comparison.", now.last_full_s)
        yield GaugeMetricFamily("netloom_netd_problems", "What is not as it should be now.", now.problems)
        entries = GaugeMetricFamily("netloom_netd_entries", "Entries of the kernel that are ours.", labels=["kind"])
        for kind, number in sorted(now.entries.items()):
            entries.add_metric([kind], number)
        yield entries
        peers = GaugeMetricFamily("netloom_netd_peers", "Other hosts, by state.", labels=["state"])
        for state, number in sorted(now.peers.items()):
            peers.add_metric([state], number)
        yield peers
        held = GaugeMetricFamily(
            "netloom_netd_overlay_addresses",
            "Addresses held on the overlays that this host is on, by where the holder is.",
            labels=["where"],
        )
        for where, number in sorted(now.overlay_addresses.items()):
            held.add_metric([where], number)
        yield held
