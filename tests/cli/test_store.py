"""`netloom store`: a backup of a running ipamd, and a database made from it."""

import contextlib
import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from tests.cli.conftest import Netloom
from tests.ipamd.daemon import Daemon, cidrs, key, own, spec


@pytest.fixture
def daemon(netloom: Netloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """With a database in a file; the command's configuration is the daemon's."""
    one = Daemon(tmp_path / "host", "[reclaim]\ninterval_s = 0\n")
    monkeypatch.setenv("NETLOOM_CONFIG", str(one.config))
    return one


def _lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_backup_restored_is_the_same_store(daemon: Daemon, netloom: Netloom, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24", "fd00::/64"))
        ipamd.reserve("blue", "10.1.0.200", "printer")
        first = ipamd.allocate(key("a"), pools=["blue"])
        ipamd.allocate(key("b"), network_pool=own("10.2.0.0/24"))
        gone = ipamd.allocate(key("c"), pools=["blue"])
        ipamd.release(key("c"))
        before = [entry.SerializeToString() for entry in ipamd.list_allocations()]
        ran = netloom("store", "backup", str(file))
        assert ran.status == 0, ran
        daemon.stop()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup"]

    refused = netloom("store", "restore", str(file))
    assert refused.status == 1
    assert "--force" in refused.err
    ran = netloom("store", "restore", str(file), "--force", "--json")
    assert ran.status == 0, ran
    document = json.loads(ran.out)
    assert (document["pools"], document["allocations"], document["reservations"]) == (2, 2, 1)
    assert Path(document["put_aside"]).exists()
    with daemon, daemon.client() as ipamd:
        assert [entry.SerializeToString() for entry in ipamd.list_allocations()] == before
        again = ipamd.allocate(key("a"), pools=["blue"])
        assert (again.created, cidrs(again)) == (False, cidrs(first))
        assert [entry.address for entry in ipamd.list_reservations()] == ["10.1.0.200"]
        new = ipamd.allocate(key("d"), pools=["blue"])
        assert set(cidrs(new)).isdisjoint(cidrs(gone)), "what was freed goes on cooling down"
        assert new.generation > gone.generation + 1_000_000, "numbers given after the backup do not come again"


def test_nothing_is_restored_under_a_running_ipamd(daemon: Daemon, netloom: Netloom, tmp_path: Path) -> None:
    file = tmp_path / "backup"
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24"))
        assert netloom("store", "backup", str(file)).status == 0
        ran = netloom("store", "restore", str(file), "--force")
        assert ran.status == 1
        assert "another ipamd" in ran.err
        assert [pool.name for pool in ipamd.list_pools()] == ["blue"]


def test_a_backup_that_is_cut_off_or_contradicts_itself_changes_nothing(
    daemon: Daemon, netloom: Netloom, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24"))
        ipamd.allocate(key("a"), pools=["blue"])
        assert netloom("store", "backup", str(file)).status == 0
        daemon.stop()
    whole = file.read_bytes().splitlines(keepends=True)
    database = Path(daemon.database).read_bytes()

    def refused(lines: list[bytes], words: str) -> None:
        file.write_bytes(b"".join(lines))
        ran = netloom("store", "restore", str(file), "--force")
        assert ran.status != 0
        assert words in ran.err, ran.err
        assert Path(daemon.database).read_bytes() == database
        assert [path.name for path in Path(daemon.database).parent.iterdir() if "before" in path.name] == []

    refused(whole[:-1], "cut off")
    refused([*whole[:-1], whole[-1][:-4]], "damaged or cut off")
    refused(whole[1:], "no backup")
    refused([line.replace(b"10.1.0.0/24", b"10.1.0.0/99") for line in whole], "pool blue cannot be")
    refused([whole[0].replace(b'backup":1', b'backup":9'), *whole[1:]], "version 1, found 9")
    twice = [line for line in whole if line.startswith(b'{"allocation"')]
    large = [line.replace(b'"boottime_ns":', b'"boottime_ns":9999999999') for line in whole]
    refused(large, "nothing was changed")
    refused([*whole[:-1], *twice, b'{"end":%d}\n' % (len(whole) - 2 + len(twice))], "nothing was changed")


def test_a_restored_database_is_ipamds_own_also_where_it_failed(
    daemon: Daemon, netloom: Netloom, tmp_path: Path
) -> None:
    file, database = tmp_path / "backup", Path(daemon.database)
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24"))
        ipamd.allocate(key("a"), pools=["blue"])
        assert netloom("store", "backup", str(file)).status == 0
        daemon.stop()
    for path in database.parent.glob("*.db*"):
        path.unlink()
    os.chown(database.parent, 1234, 1234)
    try:
        whole = file.read_bytes().splitlines(keepends=True)
        twice = [line for line in whole if line.startswith(b'{"allocation"')]
        bad = tmp_path / "bad"
        bad.write_bytes(b"".join([*whole[:-1], *twice, b'{"end":%d}\n' % (len(whole) - 2 + len(twice))]))
        for name, status in ((bad, 1), (file, 0)):
            assert netloom("store", "restore", str(name)).status == status
            found = {path.name: path.stat().st_uid for path in database.parent.glob("*.db*")}
            assert found, "its lock file stays"
            assert set(found.values()) == {1234}, found
    finally:
        os.chown(database.parent, 0, 0)


def test_a_node_that_was_renamed_since_the_backup_keeps_what_it_holds(
    daemon: Daemon, netloom: Netloom, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24"))
        held = cidrs(ipamd.allocate(key("a"), pools=["blue"]))
        assert netloom("store", "backup", str(file)).status == 0
        daemon.stop()
    daemon.config.write_text(daemon.config.read_text().replace('node = "host"', 'node = "other"'))
    assert netloom("store", "restore", str(file), "--force").status == 0
    with daemon, daemon.client() as ipamd:
        again = ipamd.allocate(key("a"), pools=["blue"])
        assert (again.created, cidrs(again)) == (False, held)
        daemon.stop()


def test_a_backup_takes_the_place_of_nothing_but_a_file(daemon: Daemon, netloom: Netloom, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    with daemon:
        for name in ("pipe", "link"):
            ran = netloom("store", "backup", str(tmp_path / name))
            assert ran.status == 1
            assert "no ordinary file" in ran.err
        daemon.stop()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_database_that_another_program_uses_is_not_put_aside(
    daemon: Daemon, netloom: Netloom, tmp_path: Path
) -> None:
    file = tmp_path / "backup"
    with daemon:
        assert netloom("store", "backup", str(file)).status == 0
        daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ran = netloom("store", "restore", str(file), "--force")
        assert ran.status == 1
        assert "another program has it open" in ran.err
    assert Path(daemon.database).exists()


def test_a_backup_goes_to_standard_output_too(daemon: Daemon, netloom: Netloom) -> None:
    with daemon, daemon.client() as ipamd:
        ipamd.create_pool("blue", spec("10.1.0.0/24"))
        ran = netloom("store", "backup", "-")
    head, pool, end = map(json.loads, ran.out.splitlines())
    assert (head["netloom_backup"], head["store"], head["node"]) == (1, "sqlite", "host")
    assert pool["pool"]["name"] == "blue"
    assert end == {"end": 1} or end["end"] >= 1


def test_a_wrong_configuration_is_named_and_can_be_gone_round(daemon: Daemon, netloom: Netloom, tmp_path: Path) -> None:
    with daemon:
        assert netloom("store", "backup", str(tmp_path / "backup")).status == 0
    daemon.config.write_text("[store]\nkind = 7\n")
    ran = netloom("store", "restore", str(tmp_path / "backup"))
    assert ran.status == 2
    assert "store.kind" in ran.err
    assert "--to" in ran.err
    ran = netloom("store", "restore", str(tmp_path / "backup"), "--to", str(tmp_path / "new.db"))
    assert ran.status == 0, ran
    assert (tmp_path / "new.db").exists()


def test_a_file_that_cannot_be_written_leaves_nothing(daemon: Daemon, netloom: Netloom, tmp_path: Path) -> None:
    with daemon:
        ran = netloom("store", "backup", str(tmp_path / "no" / "where"))
        assert ran.status == 1
        assert "cannot be written" in ran.err
    ran = netloom("store", "backup", str(tmp_path / "down"))
    assert ran.status == 3
    assert "down" not in os.listdir(tmp_path)
