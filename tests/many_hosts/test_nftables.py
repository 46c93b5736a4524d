"""nftables on a host whose plugins run cold: nobody but netd sees what others take out of our tables."""

from __future__ import annotations

import pytest

from tests.hosts import wait_until
from tests.many_hosts.fleet import Fleet

pytestmark = pytest.mark.kernel


def test_what_others_take_out_comes_back_without_workers() -> None:
    with Fleet("host-gw", segments=(0, 0)) as fleet:
        fleet.start()
        host, netd = fleet.host(1), fleet.netd(1)
        netns = host.netns("c")
        conf = {
            "cniVersion": "1.0.0",
            "name": "nat",
            "type": "bridge",
            "bridge": "cni1",
            "isGateway": True,
            "ipMasq": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.7.0.0/24"}]]},
        }
        result = host.cni("ADD", "bridge", conf, container_id="c", netns=netns).result()

        def rules() -> str:
            shown = host.run(["nft", "-s", "list", "table", "inet", "netloom"], check=False).stdout
            return "\n".join(line for line in shown.splitlines() if "handle" not in line)

        before = rules()
        assert "10.7.0." in before
        for words in (
            ["flush", "ruleset"],
            ["delete", "table", "inet", "netloom"],
            ["flush", "table", "inet", "netloom"],
            ["flush", "set", "inet", "netloom", "masq4"],
        ):
            host.run(["nft", *words])
            wait_until(lambda: rules() == before, f"nftables after {words}", lambda: netd.log() + rules())
        # A DEL takes out what is no longer wanted, and that stays away.
        done = {**conf, "prevResult": result}
        host.cni("DEL", "bridge", done, container_id="c", netns=netns).ok()
        assert "10.7.0." not in rules()
