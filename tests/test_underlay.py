"""The segment between hosts does what tests of several hosts rely on."""

from __future__ import annotations

import pytest

from tests.hosts import IPV6, Host, HostError
from tests.underlay import Underlay

pytestmark = pytest.mark.kernel


def test_hosts_reach_one_another_unless_cut_off() -> None:
    with Underlay(mtu=1400) as underlay, Host("first", plugins=False) as first, Host("second", plugins=False) as second:
        assert underlay.join(first, 11).ipv4 == "192.168.77.11"
        port = underlay.join(second, 12)
        first.ping(port.ipv4)
        underlay.host.ping(port.ipv4)
        if IPV6:
            first.ping(port.ipv6)
        assert first.links()["eth0"]["mtu"] == 1400

        underlay.cut(second)
        assert "LOWER_UP" in second.links()["eth0"]["flags"]
        with pytest.raises(HostError, match="no answer"):
            first.ping(port.ipv4, 1)
        underlay.heal(second)
        first.ping(port.ipv4)

        underlay.unplug(second)
        assert "NO-CARRIER" in second.links()["eth0"]["flags"]
        with pytest.raises(HostError, match="no answer"):
            first.ping(port.ipv4, 1)
        underlay.plug(second)
        first.ping(port.ipv4)


def test_a_host_is_joined_again_after_its_reboot_and_a_namespace_like_a_host() -> None:
    with Underlay() as underlay, Host("first", plugins=False) as first:
        underlay.join(first, 11)
        first.reboot()
        assert "eth0" not in first.links()
        underlay.join(first, 11)
        underlay.host.ping("192.168.77.11")
        outside, container = underlay.host.netns("outside"), first.netns()
        underlay.join(outside, 21)
        underlay.join(container, 22)
        outside.ping("192.168.77.22")
        with pytest.raises(HostError, match="hosts begin with 2"):
            underlay.join(first, 1)
