"""The client among three members that die, hang or are cut off; and where an answer is lost on its way."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest

from cluster.etcd import Delete, Etcd, Get, Put, UnavailableError, UnknownOutcomeError, absent
from tests.cluster.loop import connected, looped, until
from tests.cluster.relay import Relay
from tests.etcd import VERSIONS, EtcdCluster, Member
from tests.hosts import PATIENCE_S

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=VERSIONS)
def kept(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with EtcdCluster(3, request.param) as cluster:
        yield cluster


@pytest.fixture
def three(kept: EtcdCluster) -> EtcdCluster:
    """Three members that are well, whatever the test before has done, and no keys."""
    for name, member in kept.members.items():
        if member.runs:
            kept.resume(member)
        else:
            kept._launch(name)
    kept.heal_all()
    kept.etcdctl("del", "", "--prefix")
    return kept


def _current(etcd: Etcd, cluster: EtcdCluster) -> Member:
    return next(member for member in cluster.members.values() if member.socket == etcd.state.endpoint)


@looped
async def test_members_that_die(three: EtcdCluster) -> None:
    async with connected(three.sockets) as etcd:
        await etcd.put("a", b"0")
        for number in range(3):
            gone = _current(etcd, three)
            three.kill(gone)
            done = await etcd.txn([], [Put("a", b"%d" % number), Put(f"b/{number}", b"")], repeatable=True)
            assert done.succeeded
            assert _current(etcd, three) is not gone
            three.start(gone)
        assert await etcd.count("b/") == 3
        for member in three.members.values():
            three.kill(member)
    async with connected(three.sockets, timeout_s=2.0) as etcd:
        with pytest.raises(UnavailableError) as caught:
            await etcd.put("a", b"")
        # It was never sent, so that it was not done is known; and every endpoint has its reason.
        assert not isinstance(caught.value, UnknownOutcomeError)
        assert all(endpoint in str(caught.value) for endpoint in three.sockets)
        assert "connection refused" in str(caught.value)
        assert not etcd.state.connected
        assert etcd.state.reason == "connection refused"


@looped
async def test_a_watch_among_members_that_die(three: EtcdCluster) -> None:
    async with connected(three.sockets) as etcd, connected(three.sockets) as writer:
        seen: list[tuple[int, bytes]] = []
        written: list[tuple[int, bytes]] = []
        total = 400

        async def follow() -> None:
            async with aclosing(etcd.watch("n/")) as watch:
                await anext(watch)
                begun.set()
                async for batch in watch:
                    seen.extend((event.pair.mod_revision, event.pair.value) for event in batch.events)
                    if len(seen) >= total:
                        return

        async def write() -> None:
            await begun.wait()
            gone: Member | None = None
            for number in range(total):
                if number % 100 == 50:
                    if gone is not None:
                        three._launch(gone.name)
                    # The one that the watch is on.
                    name = etcd._endpoints._current.name
                    gone = next(member for member in three.members.values() if member.socket == name)
                    three.kill(gone)
                while not await _written(writer, number):
                    pass

        async def _written(writer: Etcd, number: int) -> bool:
            value, mark = b"%d" % number, f"done/{number}"
            try:
                done = await writer.txn([absent(mark)], [Put("n/a", value), Put(mark, b"")], [Get(mark)])
            except UnknownOutcomeError:
                return False  # asked for again, which the condition makes harmless
            found = done.pairs[0] if done.pairs else None
            written.append((done.revision if found is None else found.mod_revision, value))
            return True

        begun = asyncio.Event()
        await etcd.get("a")
        await asyncio.wait_for(asyncio.gather(follow(), write()), 4 * PATIENCE_S)
        assert seen == written


@looped
async def test_a_member_that_hangs(three: EtcdCluster) -> None:
    async with connected(three.sockets, timeout_s=30.0) as etcd, aclosing(etcd.watch("n/")) as watch:
        await anext(watch)
        await etcd.get("a")
        hung = _current(etcd, three)
        three.pause(hung)
        began = time.monotonic()
        # Not all of the time is spent on it: each endpoint has its share.
        await etcd.get("a")
        assert time.monotonic() - began < 25
        assert _current(etcd, three) is not hung
        await etcd.put("n/a", b"", repeatable=True)
        # The watch was on the hung member, or is not; it goes on in either case.
        batch = await asyncio.wait_for(anext(watch), PATIENCE_S)
        while not batch.events:
            batch = await asyncio.wait_for(anext(watch), PATIENCE_S)
        assert [event.pair.key for event in batch.events] == ["n/a"]
        three.resume(hung)


@looped
async def test_a_change_at_a_member_that_hangs(three: EtcdCluster) -> None:
    async with connected(three.sockets) as patient, connected(three.sockets, timeout_s=3.0) as etcd:
        await patient.put("a", b"")
        await until(lambda: _answered(etcd), "an answer")
        hung = _current(etcd, three)
        three.pause(hung)
        with pytest.raises(UnknownOutcomeError, match="may have been made"):
            await etcd.txn([absent("b")], [Put("b", b"")])
        assert not etcd.state.connected
        # What may be repeated, and what only reads, finds another member; so does all that follows.
        await until(lambda: _answered(etcd), "an answer")
        assert _current(etcd, three) is not hung
        three.resume(hung)


async def _answered(etcd: Etcd) -> bool:
    try:
        await etcd.txn([], [Get("a")])
    except UnavailableError:
        return False
    return True


@looped
async def test_a_member_that_is_cut_off_is_left(three: EtcdCluster) -> None:
    async with connected(three.sockets, timeout_s=15.0) as etcd, aclosing(etcd.watch("n/")) as watch:
        await anext(watch)
        begin = (await etcd.txn([], [Get("a")])).revision + 1
        cut = _current(etcd, three)
        # From the other members; the client still reaches it, by its socket.
        three.cut(cut)
        done = 0
        while _current(etcd, three) is cut:
            await etcd.put(f"n/{done}", b"", repeatable=True)
            done += 1
        async with aclosing(etcd.watch("n/", begin)) as fresh:
            keys = set()
            async for batch in fresh:
                keys |= {event.pair.key for event in batch.events}
                if len(keys) == done:
                    break
        # The watch that was at the cut member has come away, too.
        seen: list[str] = []
        while len(seen) < done:
            seen += [event.pair.key for event in (await asyncio.wait_for(anext(watch), PATIENCE_S)).events]
        # What was repeated is written twice, and both are told.
        assert set(seen) <= keys
        statuses = {status.endpoint: status for status in await etcd.status()}
        assert len(statuses) == 3
        assert sum(status.leader and status.has_leader for status in statuses.values()) >= 1
        three.heal(cut)
        three.wait(cut)


@looped
async def test_all_are_cut_off(three: EtcdCluster) -> None:
    async with connected(three.sockets, timeout_s=5.0) as etcd:
        await until(lambda: _answered(etcd), "an answer")
        three.cut_all()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            await etcd.get("a")
        # A limit that only a call without a deadline would miss.
        assert time.monotonic() - began < PATIENCE_S

        async def refused() -> bool:
            try:
                await etcd.txn([absent("b")], [Put("b", b"")])
            except UnknownOutcomeError:
                return False  # not yet known to the member that it has no leader
            except UnavailableError as error:
                return "no leader" in str(error)
            raise AssertionError("a change was made without a majority")

        await until(refused, "the members to know that they are alone")
        three.heal_all()
        await until(lambda: _answered(etcd), "an answer")


@looped
async def test_an_answer_that_is_lost(three: EtcdCluster) -> None:
    async with (
        connected(three.sockets) as truth,
        Relay(three.sockets[0]) as relay,
        Relay(three.sockets[1]) as other,
        connected((relay.endpoint,), timeout_s=5.0) as one,
        connected((relay.endpoint, other.endpoint), timeout_s=10.0) as two,
    ):
        await until(lambda: _answered(one), "an answer")
        relay.silence()
        with pytest.raises(UnknownOutcomeError):
            await one.txn([absent("a")], [Put("a", b"mine")])
        pair = await truth.get("a")
        assert pair is not None
        assert pair.value == b"mine"  # it was made: to say that it was not would have been wrong
        with pytest.raises(UnknownOutcomeError):
            await one.delete("a")
        assert await truth.get("a") is None
        # With leave to repeat, the other endpoint answers; that it was made already is seen by reading.
        await two.get("a")
        (relay if two.state.endpoint == relay.endpoint else other).silence()
        done = await two.txn([absent("b")], [Put("b", b"mine")], [Get("b")], repeatable=True)
        assert not done.succeeded
        assert done.pairs[0] is not None
        assert done.pairs[0].value == b"mine"
        # Where no repetition is answered, nobody knows; by connections of its own, as pings end the silent ones.
        async with connected((relay.endpoint, other.endpoint), timeout_s=10.0) as fresh:
            await fresh.get("a")
            relay.silence(for_good=True)
            other.silence(for_good=True)
            with pytest.raises(UnknownOutcomeError, match=r"may have been made.*; then: "):
                await fresh.txn([], [Delete("b")], repeatable=True)


_ON_THE_WIRE = """
import asyncio, json, sys
from cluster.etcd import Etcd, EtcdConfig, Put, UnavailableError, absent
given = json.load(sys.stdin)

async def main():
    taken = []
    for endpoints in given["endpoints"]:
        etcd = Etcd(EtcdConfig(tuple(endpoints), timeout_s=given["timeout_s"], **given["options"]))
        try:
            await etcd.put("a", b"", repeatable=True)
            await etcd.get("a")
            taken.append(etcd.state.endpoint)
        except UnavailableError as error:
            taken.append(f"unavailable: {error}")
        await etcd.close()
    print(json.dumps(taken))

asyncio.run(main())
"""


def _on_the_wire(cluster: EtcdCluster, endpoints: list[list[str]], timeout_s: float, **options: str) -> Any:
    """Which endpoint answered each client, which runs where the members' addresses are reached."""
    given = {"endpoints": endpoints, "timeout_s": timeout_s, "options": options}
    argv = [sys.executable, "-c", _ON_THE_WIRE]
    return json.loads(cluster.underlay.host.run(argv, input=json.dumps(given)).stdout)


def test_a_member_whose_packets_are_lost(three: EtcdCluster) -> None:
    cut, well = three.follower(), three.leader()
    three.cut(cut)
    # The order is random: the lost one comes first for some of these.
    taken = _on_the_wire(three, [[cut.endpoint, well.endpoint]] * 6, PATIENCE_S)
    assert taken == [well.endpoint] * 6
    (refused,) = _on_the_wire(three, [[cut.endpoint]], 1.0)
    assert refused.startswith("unavailable: ")
    assert cut.endpoint in refused
    three.heal(cut)


@pytest.mark.parametrize("version", VERSIONS)
def test_addresses_and_certificates(version: str) -> None:
    with EtcdCluster(1, version, tls=True) as cluster:  # type: ignore[arg-type]
        assert cluster.authority is not None
        pair = cluster.authority.client
        named = [list(cluster.endpoints), [cluster.members["m1"].endpoint]]
        if cluster.members["m1"].port.ipv6:
            named.append(list(cluster.endpoints6))
        taken = _on_the_wire(cluster, named, PATIENCE_S, ca=cluster.authority.ca, cert=pair.cert, key=pair.key)
        shown = [cluster.members["m1"].endpoint, cluster.members["m1"].endpoint, cluster.members["m1"].endpoint6]
        assert taken == shown[: len(named)]
