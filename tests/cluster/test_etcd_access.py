"""Who may speak with etcd: certificates, users and passwords."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from cluster.etcd import DeniedError, EtcdError, Put, UnavailableError, absent
from tests.cluster.loop import connected, looped
from tests.etcd import VERSIONS, EtcdCluster, Version
from tests.hosts import PATIENCE_S
from tests.tls import Authority

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("version", VERSIONS)
@looped
async def test_certificates(version: Version, tmp_path: Path) -> None:
    with EtcdCluster(1, version, tls=True) as cluster:
        authority = cluster.authority
        assert authority is not None
        own = {"ca": authority.ca, "cert": authority.client.cert, "key": authority.client.key}
        async with connected(cluster.sockets, **own) as etcd, aclosing(etcd.watch("n/")) as watch:
            await anext(watch)
            await etcd.put("n/a", b"1")
            assert (await asyncio.wait_for(anext(watch), PATIENCE_S)).events[0].pair.value == b"1"
        # Not ours: an authority that this etcd does not have, and none at all.
        foreign = Authority(tmp_path, ["localhost"])
        async with connected(cluster.sockets, **{**own, "ca": foreign.ca}) as etcd:
            with pytest.raises(DeniedError, match=r"is not by \[etcd\] ca"):
                await etcd.get("n/a")
        for wrong in (
            {"ca": authority.ca},
            {"ca": authority.ca, "cert": foreign.client.cert, "key": foreign.client.key},
        ):
            async with connected(cluster.sockets, **wrong) as etcd:
                with pytest.raises(DeniedError, match=r"it does not take \[etcd\] cert, or wants one"):
                    await etcd.get("n/a")
        async with connected(cluster.sockets, **{**own, "key": foreign.client.key}) as etcd:
            with pytest.raises(DeniedError, match=r"\[etcd\] cert and key do not belong together"):
                await etcd.get("n/a")
        async with connected(cluster.sockets, timeout_s=3.0) as etcd:
            with pytest.raises(UnavailableError, match="only one of the two sides speak TLS"):
                await etcd.get("n/a")
        async with connected(cluster.sockets, **{**own, "ca": str(tmp_path / "none.pem")}) as etcd:
            with pytest.raises(EtcdError, match=r"none\.pem"):
                await etcd.get("n/a")
        # Files are read anew when a connection is refused over them: renewed ones need no restart.
        exchanged = {"ca": tmp_path / "ca.pem", "cert": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
        for source, path in zip((foreign.ca, own["cert"], own["key"]), exchanged.values(), strict=True):
            shutil.copy(source, path)
        async with connected(cluster.sockets, **{name: str(path) for name, path in exchanged.items()}) as etcd:
            with pytest.raises(DeniedError):
                await etcd.get("n/a")
            shutil.copy(authority.ca, exchanged["ca"])
            assert await etcd.get("n/a") is not None


@looped
async def test_tls_where_there_is_none(tmp_path: Path) -> None:
    with EtcdCluster(1) as cluster:
        authority = Authority(tmp_path, ["localhost"])
        async with connected(cluster.sockets, ca=authority.ca, timeout_s=3.0) as etcd:
            with pytest.raises(UnavailableError, match="only one of the two sides speak TLS"):
                await etcd.get("a")


@pytest.fixture(params=VERSIONS)
def guarded(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    """A member that wants a user: `netloom`, password `first`, who may use /netloom/."""
    with EtcdCluster(1, request.param) as cluster:
        ctl = cluster.etcdctl
        ctl("user", "add", "root:root")
        ctl("user", "grant-role", "root", "root", check=False)
        ctl("role", "add", "netloom")
        ctl("role", "grant-permission", "netloom", "--prefix=true", "readwrite", "/netloom/")
        ctl("user", "add", "netloom:first")
        ctl("user", "grant-role", "netloom", "netloom")
        ctl("auth", "enable")
        cluster.user = "root:root"
        yield cluster


@looped
async def test_users(guarded: EtcdCluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n", encoding="utf-8")
    known = {"user": "netloom", "password_file": str(file)}
    async with connected(guarded.sockets, **known) as etcd, aclosing(etcd.watch("n/")) as watch:
        await anext(watch)
        lease = await etcd.grant(60)
        assert (await etcd.txn([absent("n/a")], [Put("n/a", b"1", lease.id)])).succeeded
        assert await etcd.keep_alive_once(lease.id) == 60
        assert (await asyncio.wait_for(anext(watch), PATIENCE_S)).events[0].pair.value == b"1"
        # Tokens are in the member's memory only: after a restart ours is none. All goes on, the watch too.
        guarded.restart("m1")
        assert (await etcd.txn([], [Put("n/a", b"2")])).succeeded
        assert (await asyncio.wait_for(anext(watch), PATIENCE_S)).events[0].pair.value == b"2"
        (status,) = await etcd.status()
        assert (status.error, status.leader) == ("", True)
        # Any change of users makes older tokens stale for changes.
        guarded.etcdctl("user", "add", "other:other")
        assert (await etcd.txn([], [Put("n/a", b"3")])).succeeded
    async with connected(guarded.sockets, user="netloom", password="first") as etcd:
        pair = await etcd.get("n/a")
        assert pair is not None
        assert pair.value == b"3"


@looped
async def test_a_changed_password(guarded: EtcdCluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n", encoding="utf-8")
    async with connected(guarded.sockets, user="netloom", password_file=str(file)) as etcd:
        await etcd.put("a", b"1")
        guarded.etcdctl("user", "delete", "netloom")
        guarded.etcdctl("user", "add", "netloom:second")
        guarded.etcdctl("user", "grant-role", "netloom", "netloom")
        with pytest.raises(DeniedError, match="user and password_file"):
            await etcd.put("a", b"2")
        file.write_text("second\n", encoding="utf-8")
        await etcd.put("a", b"3")
        os.unlink(file)
        guarded.restart("m1")
        with pytest.raises(DeniedError, match="password_file"):
            await etcd.put("a", b"4")


@looped
async def test_who_is_refused(guarded: EtcdCluster) -> None:
    sockets = guarded.sockets
    async with connected(sockets) as etcd:
        with pytest.raises(DeniedError, match=r"wants a user: set \[etcd\] user and password_file"):
            await etcd.get("a")
    async with connected(sockets, user="netloom", password="wrong") as etcd:
        with pytest.raises(DeniedError, match=r"check \[etcd\] user and password_file"):
            await etcd.get("a")
    async with connected(sockets, "/elsewhere/", user="netloom", password="first") as etcd:
        with pytest.raises(DeniedError, match="whole key prefix"):
            await etcd.get("a")
        with pytest.raises(DeniedError, match="needs the right"):
            async with aclosing(etcd.watch("a")) as watch:
                await asyncio.wait_for(anext(watch), PATIENCE_S)


@pytest.mark.parametrize("version", VERSIONS)
@looped
async def test_a_user_that_etcd_does_not_want_yet(version: Version) -> None:
    with EtcdCluster(1, version) as cluster:
        async with connected(cluster.sockets, user="root", password="root") as etcd:
            await etcd.put("a", b"1")
            watch = etcd.watch("n/")
            await anext(watch)
            cluster.etcdctl("user", "add", "root:root")
            cluster.etcdctl("user", "grant-role", "root", "root", check=False)
            cluster.etcdctl("auth", "enable")
            cluster.user = "root:root"
            await etcd.put("a", b"2")
            assert await etcd.count("") == 1
            cluster.restart("m1")
            await etcd.put("n/a", b"")
            assert [event.pair.key for event in (await asyncio.wait_for(anext(watch), PATIENCE_S)).events] == ["n/a"]
            await watch.aclose()
