"""Attachment records on disk, and the nftables tables that follow from them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel import libnftables, netns, nft, nft_tables
from kernel.errors import KernelError
from kernel.nft import Element
from kernel.record import Key, Record, Records
from kernel.session import Session
from tests.kernel import spaces
from tests.kernel.spaces import Space


def record(network: str = "net", container_id: str = "c1", address: str = "10.1.0.2", subnet: str = "") -> Record:
    return Record(
        Key(network, container_id, "eth0", "bridge"),
        netns="/run/netns/x",
        netns_inode=4026531840,
        netns_cookie=2**63,
        links=("veth1",),
        bridge="cni0",
        elements=(nft.masquerade(address, f"{network} {container_id} eth0"),),
        shared=(nft.no_masquerade(subnet),) if subnet else (),
    )


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(str(tmp_path / "run"))


def files(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_a_record_comes_back(records: Records) -> None:
    wanted = record(subnet="10.1.0.0/16")
    assert records.read(wanted.key) is None
    records.write(wanted)
    assert records.read(wanted.key) == wanted
    assert list(records.all()) == [wanted]
    assert list(records.of_network("net", "bridge")) == [wanted]
    assert list(records.of_network("net", "ptp")) == []
    assert list(records.of_network("other", "bridge")) == []
    changed = replace(wanted, links=("veth2",))
    records.write(changed)
    assert list(records.all()) == [changed]


@given(st.lists(st.tuples(*[st.text(min_size=1, max_size=300)] * 3), min_size=1, max_size=4, unique=True))
def test_no_two_keys_share_a_file_and_none_leaves_the_directory(names: list[tuple[str, str, str]]) -> None:
    records = Records("/run/netloom")
    names += [("..", "..", "..")]
    paths = {os.path.normpath(records._path(Key(*name, "bridge"))) for name in set(names)}
    assert len(paths) == len(set(names))
    for path in paths:
        assert path.startswith("/run/netloom/attachments/")
        assert len(path.split("/")) == 6
        assert len(path.rpartition("/")[2].encode()) <= 255


def test_keys_that_look_alike_are_apart(records: Records) -> None:
    # A container id never has an @.
    alike = [("a", "b", "c@d"), ("a.b", "c", "d"), ("a", "b.c", "d"), ("a@b", "c", "d"), ("a", "b", "c.bridge")]
    alike += [("n" * 161, "c", "d"), ("n" * 160, "c", "d"), ("n" * 200, "c", "d"), ("n" * 201, "c", "d")]
    for network, container, ifname in alike:
        records.write(Record(Key(network, container, ifname, "bridge"), bridge=f"{network}|{container}|{ifname}"))
    for network, container, ifname in alike:
        found = records.read(Key(network, container, ifname, "bridge"))
        assert found is not None
        assert found.bridge == f"{network}|{container}|{ifname}"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'{"version": 1}', b'{"key": 5}', b"\xff\xfe", b"{}" * 9]
)
def test_what_cannot_be_read_is_passed_over(records: Records, tmp_path: Path, content: bytes) -> None:
    good, bad = record(), record(container_id="c2")
    records.write(good)
    records.write(bad)
    Path(records._path(bad.key)).write_bytes(content)
    assert records.read(bad.key) is None
    assert list(records.all()) == [good]
    assert list(records.of_network("net", "bridge")) == [good]


def test_a_record_of_a_newer_version_is_not_taken_for_ours(records: Records) -> None:
    records.write(replace(record(), version=2))
    assert records.read(record().key) is None


def test_only_root_reads_them(records: Records, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        records.write(record(subnet="10.1.0.0/16"))
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.kernel
def test_removing_takes_the_elements_and_the_file(records: Records, tmp_path: Path, session: Session) -> None:
    one, two = record(subnet="10.1.0.0/16"), record(container_id="c2", address="10.1.0.3", subnet="10.1.0.0/16")
    for each in (one, two):
        records.write(each)
        nft.add(session, [*each.elements, *each.shared])
    records.remove(session, one)
    assert not nft.present(session, one.elements[0])
    assert nft.present(session, two.elements[0])
    assert nft.present(session, two.shared[0])
    records.remove(session, one)
    records.remove(session, two)
    records.remove(session, two)
    assert all(nft.all_elements(session, name) == [] for name in nft.element_sets())
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_a_shared_element_goes_with_the_last_network_that_wants_it(
    records: Records, tmp_path: Path, session: Session
) -> None:
    subnet = "10.1.0.0/16"
    first, second = record("first", subnet=subnet), record("second", address="10.1.0.3", subnet=subnet)
    lonely = record("lonely", address="10.2.0.2", subnet="10.2.0.0/16")
    for each in (first, second, lonely):
        records.write(each)
        nft.add(session, [*each.elements, *each.shared])
    records.remove(session, first)
    assert nft.present(session, second.shared[0])
    records.remove(session, second)
    assert not nft.present(session, second.shared[0])
    assert nft.present(session, lonely.shared[0])
    records.remove(session, lonely)
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_what_a_killed_writer_left_holds_no_shared_element(records: Records, tmp_path: Path, session: Session) -> None:
    one = record(subnet="10.1.0.0/16")
    records.write(one)
    nft.add(session, [*one.elements, *one.shared])
    for step in range(1, 12):
        dying = record("dying", f"d{step}", "10.3.0.3", "10.3.0.0/16")
        _die_in(partial(records.write, dying), step, ("open", "write", "close", "rename", "mkdir"))
    left = list(records.all())
    assert one in left
    assert len(left) > 1
    for each in left:
        assert records.read(each.key) == each
        records.apply(session, each)
        records.remove(session, each)
    assert all(nft.all_elements(session, name) == [] for name in nft.element_sets())
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_a_removal_that_was_killed_is_finished_by_the_next(records: Records, tmp_path: Path, session: Session) -> None:
    one = record(subnet="10.1.0.0/16")
    records.write(one)
    nft.add(session, [*one.elements, *one.shared])
    steps = 0
    while records.read(one.key) is not None:
        steps += 1
        _die_in(
            lambda: records.remove(Session(), one), steps, ("open", "close", "unlink", "rmdir", "scandir", "listdir")
        )
        if records.read(one.key) is not None:
            records.remove(session, one)
        # Without the record nobody knows any more what there is to do.
        assert not nft.present(session, one.shared[0])
        assert not nft.present(session, one.elements[0])
        if steps < 30:
            records.write(one)
            records.apply(session, one)
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
@pytest.mark.parametrize("damage", ["flush ruleset", "flush set inet netloom masq4", "delete table inet netloom"])
def test_rebuild_restores_exactly_what_the_records_want(records: Records, session: Session, damage: str) -> None:
    wanted = [record(container_id=f"c{n}", address=f"10.1.0.{n}", subnet="10.1.0.0/16") for n in range(2, 7)]
    guarded = replace(
        record(container_id="g"), elements=tuple(nft.spoof_check("veth1", "02:00:00:00:00:01", "net g eth0"))
    )
    for each in (*wanted, guarded):
        records.write(each)
        nft.add(session, [*each.elements, *each.shared])
    stale = [nft.masquerade("10.9.9.9", "nobody"), nft.no_masquerade("10.9.0.0/16")]
    stale += nft.spoof_check("veth9", "02:00:00:00:00:09", "nobody")
    nft.add(session, stale)
    assert records.rebuild(session) == (0, len(stale))
    before = {name: set(nft.all_elements(session, name)) for name in nft.element_sets()}
    libnftables.run(damage, "somebody's reload")
    restored, removed = records.rebuild(session)
    assert removed == 0
    assert restored >= len(wanted)
    assert {name: set(nft.all_elements(session, name)) for name in nft.element_sets()} == before
    assert records.rebuild(session) == (0, 0)


@pytest.mark.kernel
def test_rebuild_without_records_removes_all_elements(records: Records, session: Session) -> None:
    assert records.rebuild(session) == (0, 0)
    nft.add(session, [nft.masquerade("10.9.9.9", "nobody")])
    assert records.rebuild(session) == (0, 1)


@pytest.mark.kernel
@pytest.mark.parametrize("lost", ["another version", "flushed"])
def test_an_attachment_that_finds_no_tables_brings_back_what_all_want(
    records: Records, session: Session, lost: str
) -> None:
    """The first ADD after an upgrade, or a flush, where no helper runs."""
    old, new = record(subnet="10.1.0.0/16"), record(container_id="c2", address="10.1.0.3", subnet="10.1.0.0/16")
    chain = nft.Chain("c_old", ("meta nfproto ipv4 ip saddr 10.0.0.0/8 dnat ip to meta l4proto . th dport map "
                                "{ tcp . 80 : 10.1.0.2 . 80 }",))  # fmt: skip
    publisher = replace(
        record(container_id="c3"),
        elements=tuple(nft.publish("", "tcp", 80, "10.1.0.2", 80, "o", chain=chain.name)),
        chains=(chain,),
    )
    for one in (old, publisher):
        records.write(one)
        records.apply(session, one)
    nft.delete_tables()
    if lost == "another version":
        libnftables.run(nft_tables.table("inet").replace(nft.SCHEMA, "schema1"), "write the tables of another version")
        libnftables.run("add element inet netloom nomasq4 { 10.1.0.0/16 . 10.1.0.0/16 }", "exempt the network")
    records.write(new)
    records.apply(session, new)
    assert all(nft.present(session, element) for one in (old, publisher, new) for element in one.elements)
    assert nft.present(session, old.shared[0])
    assert nft.count_rules(session, chain.name) == 1
    assert records.rebuild(session) == (0, 0)


@pytest.mark.kernel
def test_a_chain_that_is_refused_by_now_holds_up_nothing_else(records: Records, session: Session) -> None:
    """Its condition is about a link that went."""
    chain = nft.Chain("c_1", ('meta nfproto ipv4 iif "gone" accept',))
    elements = nft.publish("", "tcp", 80, "10.1.0.2", 80, "o", chain=chain.name)
    records.write(replace(record(container_id="c3"), elements=tuple(elements), chains=(chain,)))
    records.write(record())
    with pytest.raises(KernelError, match=r"write chain c_1: .*Interface does not exist"):
        records.rebuild(session)
    assert nft.present(session, record().elements[0])
    assert nft.present(session, elements[1])
    assert not nft.present(session, elements[0])
    records.write(record(container_id="c2", address="10.1.0.3"))
    nft.delete_tables()
    records.apply(session, record(container_id="c2", address="10.1.0.3"))
    assert nft.present(session, record().elements[0])


def _die_in(work: Callable[[], object], step: int, calls: tuple[str, ...]) -> None:
    """Does the work in a process that ends without any clean-up at the given one of these system calls."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **more: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(0)
                return real(*args, **more)

            return call

        for name in calls:
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def _nomasq(session: Session) -> list[str]:
    return sorted(element.key[0] for element in nft.all_elements(session, "nomasq4"))


@pytest.mark.kernel
@pytest.mark.parametrize("order", ["wide first", "narrow first"])
def test_networks_within_one_another(records: Records, tmp_path: Path, session: Session, order: str) -> None:
    # A pool that grew or shrank while containers of its former size live, or two networks that overlap.
    wide = record("wide", "w", "10.1.0.2", "10.1.0.0/16")
    narrow = [record("narrow", f"n{n}", f"10.1.{n}.2", f"10.1.{n}.0/24") for n in (2, 3)]
    for each in (wide, *narrow) if order == "wide first" else (*narrow, wide):
        records.write(each)
        records.apply(session, each)
        records.apply(session, each)
    assert _nomasq(session) == ["10.1.0.0/16"]
    for each in (wide, *narrow):
        assert nft.holds(session, each.elements[0])
        assert nft.holds(session, each.shared[0])
    assert not nft.holds(session, nft.no_masquerade("10.0.0.0/8"))
    libnftables.run("flush ruleset", "somebody's reload")
    records.rebuild(session)
    assert _nomasq(session) == ["10.1.0.0/16"]
    assert records.rebuild(session) == (0, 0)
    records.remove(session, wide)
    assert _nomasq(session) == ["10.1.2.0/24", "10.1.3.0/24"]
    assert nft.present(session, narrow[0].elements[0])
    for each in narrow:
        records.remove(session, each)
    assert _nomasq(session) == []
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_a_network_that_grows_under_one_name(records: Records, tmp_path: Path, session: Session) -> None:
    before, after = record(subnet="10.1.2.0/24"), record("net", "c2", "10.1.9.2", "10.1.0.0/16")
    for each in (before, after):
        records.write(each)
        records.apply(session, each)
    assert _nomasq(session) == ["10.1.0.0/16"]
    records.remove(session, after)
    assert nft.holds(session, before.shared[0])
    records.remove(session, before)
    assert _nomasq(session) == []
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_rebuild_gives_an_element_back_to_its_owner(records: Records, session: Session) -> None:
    dead, alive = record("old", "dead"), record("new", "alive")
    records.write(alive)
    nft.add(session, dead.elements)
    assert records.rebuild(session) == (1, 0)
    nft.delete(session, dead.elements)
    assert nft.all_elements(session, "masq4") == list(alive.elements)


@pytest.mark.kernel
def test_a_full_disk_leaves_no_half_record(tmp_path: Path, home: Space) -> None:
    run = tmp_path / "full"
    run.mkdir()
    spaces.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(run))
    try:
        full = Records(str(run))
        full.write(record())
        ballast = os.open(run / "ballast", os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):
            while os.write(ballast, bytes(4096)):
                pass
        os.close(ballast)
        big = replace(record(container_id="big"), links=tuple(f"veth{n}" for n in range(500)))
        with pytest.raises(OSError, match="No space left"):
            full.write(big)
        assert list(full.all()) == [record()]
        left = {path.name for path in run.rglob("*") if path.is_file()}
        assert left == {"attachments.lock", "ballast", "c1@eth0.bridge"}
    finally:
        spaces.run("umount", str(run))


def _churn(home: str, run_dir: str, seed: int, stop: Callable[[], bool]) -> None:
    """One runtime: adds and removes attachments of two networks until told to stop, then removes them all."""
    with netns.opened(home) as where:
        netns.setns(where.fd)
        chance = random.Random(seed)
        records = Records(run_dir)
        alive: list[Record] = []
        with Session() as session:
            while not stop() or alive:
                if not stop() and len(alive) < 5 and chance.random() < 0.6:
                    number = chance.randrange(200)
                    subnet = f"10.{number & 1}.0.0/16"
                    mine = record(f"n{number & 1}", f"c{seed}-{number}", f"10.{number & 1}.{seed}.{number}", subnet)
                    if any(each.key == mine.key for each in alive):
                        continue
                    records.write(mine)
                    records.apply(session, mine)
                    alive.append(mine)
                elif alive:
                    records.remove(session, alive.pop(chance.randrange(len(alive))))


@pytest.mark.kernel
def test_rebuild_beside_adds_and_removals_leaves_nothing_stale(
    records: Records, tmp_path: Path, home: Space, session: Session
) -> None:
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    run_dir = str(tmp_path / "run")
    writers = [context.Process(target=_churn, args=(home.path, run_dir, seed, stop.is_set)) for seed in (1, 2, 3)]
    for writer in writers:
        writer.start()
    try:
        for number in range(60):
            if number % 20 == 19:
                libnftables.run("flush ruleset", "somebody's reload")
            records.rebuild(session)
            # At no moment is there an element without a record; the other way round is an ADD on its way.
            with records.hold():
                wanted = {(e.set, e.key) for one in records.all() for e in (*one.elements, *one.shared)}
                present = {(e.set, e.key) for name in nft.element_sets() for e in nft.all_elements(session, name)}
                unmarked = {key for key in present - wanted if key[0].startswith("masq")}
            assert unmarked == set()
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert all(nft.all_elements(session, name) == [] for name in nft.element_sets())
    assert files(tmp_path) == ["attachments.lock"]


@pytest.mark.kernel
def test_a_reader_waits_for_who_holds_the_records(records: Records) -> None:
    records.write(record())
    started, written = threading.Event(), threading.Event()

    def write() -> None:
        started.set()
        records.write(record(container_id="c2"))
        written.set()

    with records.hold():
        thread = threading.Thread(target=write)
        thread.start()
        started.wait()
        assert len(list(records.all())) == 1
        assert not written.is_set()
    thread.join()
    assert len(list(records.all())) == 2


def test_elements_of_a_record_keep_their_order(records: Records) -> None:
    elements = tuple(Element("masq4", (f"10.0.0.{n}",)) for n in range(9, 0, -1))
    records.write(replace(record(), elements=elements))
    found = records.read(record().key)
    assert found is not None
    assert found.elements == elements


@pytest.mark.kernel
def test_what_the_host_wants_stands_whatever_is_attached(records: Records, session: Session, tmp_path: Path) -> None:
    whole, part = nft.remote("10.0.0.0/8"), nft.remote("10.1.0.0/16")
    among, local = nft.among("10.1.0.0/16", "10.2.0.0/16"), nft.local("fd00::/64")

    def found() -> set[Element]:
        return {one for name in nft.standing_sets() for one in nft.all_elements(session, name)}

    records.stand(session, "one", [])
    assert nft.chains(session) == []
    records.stand(session, "one", [part, among])
    assert not records.attend(session)
    assert not nft.current(session, "inet")  # nobody translates addresses
    libnftables.run("table ip6 x { chain y { type nat hook prerouting priority 0; }; }", "somebody's table")
    assert records.attend(session)
    assert not records.attend(session)
    assert found() == {part, among}
    records.stand(session, "two", [whole, local])
    assert found() == {whole, among, local}
    assert set(records.standing()) == {part, whole, among, local}
    assert records.standing("one") == [part, among]
    # Beside attachments that come and go, and tables that go.
    records.write(record(subnet="10.1.0.0/16"))
    records.apply(session, record(subnet="10.1.0.0/16"))
    assert records.rebuild(session) == (0, 0)
    libnftables.run("flush ruleset", "somebody's reload")
    records.write(record(container_id="c2", address="10.1.0.3"))
    records.apply(session, record(container_id="c2", address="10.1.0.3"))
    assert found() == {whole, among, local}
    for container_id in ("c1", "c2"):
        there = records.read(record(container_id=container_id).key)
        assert there is not None
        records.remove(session, there)
    assert found() == {whole, among, local}
    # Of what cannot be read nothing is wanted; nor of what is no standing element.
    (tmp_path / "run/standing/three.json").write_text("[{")
    (tmp_path / "run/standing/four.json").write_text('[{"set": "masq4", "key": ["10.1.0.9"]}, {"set": "x", "key": []}]')
    assert records.rebuild(session) == (0, 0)
    records.stand(session, "two", [])
    assert found() == {part, among}
    records.stand(session, "one", [])
    assert found() == set()
