"""What a scrape shows after things happened."""

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from telemetry.metrics import IpamdMetrics, PoolSample


def _scrape(metrics: IpamdMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_counts_and_times() -> None:
    metrics = IpamdMetrics(version="0.1.0", node="n1")
    metrics.allocation("created")
    metrics.allocation("created")
    metrics.allocation("exhausted")
    metrics.released("netns", 3)
    metrics.request("Allocate", "OK", 0.003)
    metrics.commit(7, 0.0007)
    scraped = _scrape(metrics)
    assert scraped["netloom_ipamd_allocations_total", (("result", "created"),)] == 2
    assert scraped["netloom_ipamd_allocations_total", (("result", "exhausted"),)] == 1
    assert scraped["netloom_ipamd_releases_total", (("reason", "netns"),)] == 3
    method = (("code", "OK"), ("method", "Allocate"))
    assert scraped["netloom_ipamd_request_seconds_count", method] == 1
    assert scraped["netloom_ipamd_request_seconds_sum", method] == pytest.approx(0.003)
    assert scraped["netloom_ipamd_commit_batch_size_sum", ()] == 7
    assert scraped["netloom_ipamd_fsync_seconds_bucket", (("le", "0.0005"),)] == 0
    assert scraped["netloom_ipamd_fsync_seconds_bucket", (("le", "0.001"),)] == 1
    assert scraped["netloom_ipamd_build_info", (("node", "n1"), ("version", "0.1.0"))] == 1
    assert scraped["process_resident_memory_bytes", ()] > 0


def test_instances_share_nothing() -> None:
    IpamdMetrics().allocation("created")
    assert not [key for key in _scrape(IpamdMetrics()) if key[0] == "netloom_ipamd_allocations_total"]


def test_pools_are_read_at_each_scrape_and_range_sets_are_added_up() -> None:
    metrics = IpamdMetrics()
    samples = [
        PoolSample("p", "ipv4", 10, 1, 0, 2),
        PoolSample("p", "ipv4", 5, 1, 1, 0),
        PoolSample("p", "ipv6", 1 << 80, 4, 0, 0),
    ]
    metrics.watch_pools(lambda: samples)
    v4, v6 = (("family", "ipv4"), ("pool", "p")), (("family", "ipv6"), ("pool", "p"))
    scraped = _scrape(metrics)
    assert scraped["netloom_ipamd_pool_size", v4] == 15
    assert scraped["netloom_ipamd_pool_allocated", v4] == 2
    assert scraped["netloom_ipamd_pool_reserved", v4] == 1
    assert scraped["netloom_ipamd_pool_cooling", v4] == 2
    assert scraped["netloom_ipamd_pool_size", v6] == float(1 << 80)
    samples.clear()
    assert ("netloom_ipamd_pool_size", v4) not in _scrape(metrics)


def test_watching_does_not_ask_before_the_first_scrape() -> None:
    asked: list[int] = []

    def read() -> list[PoolSample]:
        asked.append(1)
        return []

    metrics = IpamdMetrics()
    metrics.watch_pools(read)
    assert asked == []
    metrics.render()
    assert asked == [1]


def test_a_failing_pool_reader_costs_the_pools_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> list[PoolSample]:
        raise RuntimeError("store away")

    metrics = IpamdMetrics()
    metrics.watch_pools(broken)
    metrics.allocation("created")
    with caplog.at_level(logging.ERROR):
        scraped = _scrape(metrics)
    assert scraped["netloom_ipamd_allocations_total", (("result", "created"),)] == 1
    assert "cannot be read" in caplog.text


def test_hostile_pool_names_are_escaped() -> None:
    metrics = IpamdMetrics()
    metrics.watch_pools(lambda: [PoolSample('a"}\n# forged 1', "ipv4", 1, 0, 0, 0)])
    key = (("family", "ipv4"), ("pool", 'a"}\n# forged 1'))
    assert _scrape(metrics)["netloom_ipamd_pool_size", key] == 1
