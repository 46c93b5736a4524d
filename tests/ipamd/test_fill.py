"""Warnings of pools that are nearly full."""

import logging

import pytest

from ipamd.fill import Fill, FillWatch


def test_each_mark_is_told_of_once_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    watch = FillWatch()
    told = []
    for used in (0, 79, 80, 94, 79, 78, 80, 95, 100, 93, 91, 76, 80):
        caplog.clear()
        with caplog.at_level(logging.INFO, "ipamd.fill"):
            watch.look([Fill("blue", "ipv4", "addresses", used, 100)])
        told.append([(record.levelname, record.getMessage()) for record in caplog.records])
    high, full = [("WARNING", "pool is 80 % full")], [("WARNING", "pool is 95 % full")]
    less, least = [("INFO", "pool is less than 95 % full again")], [("INFO", "pool is less than 80 % full again")]
    assert told == [[], [], high, [], [], [], [], full, [], [], less, least, high]


def test_pools_that_are_empty_or_gone(caplog: pytest.LogCaptureFixture) -> None:
    watch = FillWatch()
    with caplog.at_level(logging.INFO, "ipamd.fill"):
        watch.look([Fill("none", "ipv4", "blocks", 0, 0)])
        watch.look([Fill("blue", "ipv6", "blocks", 8, 10)])
        watch.look([])
        watch.look([Fill("blue", "ipv6", "blocks", 8, 10)])
    assert [record.getMessage() for record in caplog.records] == ["pool is 80 % full"] * 2
