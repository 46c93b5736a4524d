"""The lab notices when a request goes another way than the one that it asserts."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cni.lab import Lab
from tests.hosts import Host

pytestmark = pytest.mark.kernel

CONF = {"cniVersion": "1.1.0", "name": "net", "type": "loopback"}


def test_ways_are_asserted(launcher: Path) -> None:
    with Host() as host:
        lab = Lab(host)
        lab.serve("warm", launcher)
        lab.cni("STATUS", "loopback", CONF).ok()
        lab.cni("VERSION", "loopback", CONF).ok()
        assert lab.cni("STATUS", "loopback", b"{").code() == 6
        lab.serve("cold")
        for _ in range(2):
            lab.cni("STATUS", "loopback", CONF).ok()
        assert lab.cni("STATUS", "loopback", b"{").code() == 6
        with pytest.raises(AssertionError, match=r"cold was wanted, went cold: \[\]"):
            lab.cni("STATUS", "loopback", CONF, env={"NETLOOM_CNI_SOCKET": "/run/netloom/cni.sock"})
        lab.serve("warm")
        with pytest.raises(AssertionError, match=r"warm was wanted, went cold: \['loopback STATUS'\]"):
            lab.cni("STATUS", "loopback", CONF, env={"NETLOOM_CNI_SOCKET": "/nonexistent"})
        assert lab._service is not None
        lab._service.signal(signal.SIGTERM)
        assert lab._service.process is not None
        lab._service.process.wait(60)
        with pytest.raises(AssertionError, match="warm was wanted"):
            lab.cni("STATUS", "loopback", CONF)
        lab.serve("in process")
        served = lab.cni("STATUS", "loopback", CONF, faults=[{"at": 1000, "when": "before", "kind": "error"}])
        assert served.undo_calls == ()
