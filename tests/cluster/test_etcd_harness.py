"""etcd as the tests start it: in both versions, with one member and three, with TLS, through all that faults need."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from tests.etcd import VERSIONS, EtcdCluster, Version
from tests.hosts import HostError

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("version", VERSIONS)
def test_one_member(version: Version) -> None:
    with EtcdCluster(1, version) as etcd:
        assert etcd.status("m1").version.startswith(version)
        # The host of the underlay, and this process by way of a socket.
        etcd.etcdctl("put", "/a/1", "x")
        etcd.etcdctl("put", "/b", "x")
        assert set(etcd.keys("/a")) == {"/a/1"}
        for target in etcd.sockets:
            with grpc.insecure_channel(target) as channel:
                grpc.channel_ready_future(channel).result(60)
        before = etcd.revision()
        etcd.kill("m1")
        etcd.start("m1")
        assert etcd.revision() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_three_members_with_tls(version: Version) -> None:
    with EtcdCluster(3, version, tls=True) as etcd:
        leader = etcd.leader()
        etcd.kill(leader)
        assert etcd.leader() is not leader
        etcd.start(leader)

        leader = etcd.leader()
        etcd.cut(leader)
        assert etcd.leader() is not leader
        etcd.etcdctl("put", "k", "v")
        with pytest.raises(HostError):
            etcd.etcdctl("get", "k", "--command-timeout=1s", member=leader)
        etcd.heal(leader)
        etcd.wait(leader)
        assert set(etcd.keys()) == {"k"}

        etcd.cut_all()
        with pytest.raises(HostError):
            etcd.etcdctl("put", "k", "v", "--command-timeout=1s", member="m1")
        etcd.heal_all()
        etcd.etcdctl("put", "k", "v")

        assert etcd.authority is not None
        for pair in (None, etcd.authority.client):
            credentials = grpc.ssl_channel_credentials(
                Path(etcd.authority.ca).read_bytes(),
                *(Path(f).read_bytes() for f in ((pair.key, pair.cert) if pair else ())),
            )
            options = [("grpc.default_authority", "localhost")]
            with grpc.secure_channel(etcd.sockets[0], credentials, options) as channel:
                call = channel.unary_unary("/etcdserverpb.Maintenance/Status", bytes, bytes)
                if pair is None:
                    with pytest.raises(grpc.RpcError):
                        call(b"", timeout=5)
                else:
                    assert call(b"", timeout=60)


@pytest.mark.parametrize("version", VERSIONS)
def test_quota_and_history(version: Version) -> None:
    with EtcdCluster(1, version, quota_bytes=16 << 20) as etcd:
        etcd.fill("/fill/")
        assert "NOSPACE" in etcd.alarms()
        with pytest.raises(HostError, match="database space exceeded"):
            etcd.etcdctl("put", "k", "v")
        before = etcd.status("m1").db_bytes
        etcd.etcdctl("del", "/fill/", "--prefix")
        revision = etcd.compact()
        etcd.defragment()
        assert etcd.status("m1").db_bytes < before / 2
        etcd.disarm()
        assert etcd.alarms() == ""
        etcd.etcdctl("put", "k", "v")
        with pytest.raises(HostError, match="required revision has been compacted"):
            etcd.etcdctl("get", "k", f"--rev={revision - 1}")
