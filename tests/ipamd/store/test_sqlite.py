"""What is SQLite's alone: versions, damage, rights, the lock."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ipamd.errors import StartError
from ipamd.store import sqlite
from ipamd.store.base import Filter, PoolRow, PutPool
from ipamd.store.sqlite import SqliteStore


def _refusal(path: Path) -> str:
    with pytest.raises(StartError) as caught:
        SqliteStore(str(path))
    return str(caught.value)


def test_full_durability(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "s.db"))
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    store.close()


def test_rights_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = SqliteStore(str(tmp_path / "deep" / "er" / "s.db"))
        store.begin()
        store.apply([PutPool(PoolRow("p", "{}", managed=False), new=True)])
        store.commit()
        names = os.listdir(tmp_path / "deep" / "er")
        assert "s.db-wal" in names
        for name in names:
            assert stat.S_IMODE(os.stat(tmp_path / "deep" / "er" / name).st_mode) == 0o600
        store.close()
    finally:
        os.umask(old)


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    SqliteStore(str(path)).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE schema SET version = version + 1")
    db.close()
    content = path.read_bytes()
    text = _refusal(path)
    assert f"schema version {len(sqlite.MIGRATIONS) + 1}" in text
    assert "newer ipamd" in text
    assert path.read_bytes() == content


def test_an_older_version_is_brought_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(str(path))
    store.begin()
    store.apply([PutPool(PoolRow("p", "{}", managed=False), new=True)])
    store.commit()
    store.close()
    steps = ("CREATE TABLE later (x); INSERT INTO later SELECT name FROM pool;", "ALTER TABLE later ADD COLUMN y;")
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*sqlite.MIGRATIONS, *steps))
    store = SqliteStore(str(path))
    assert store.schema == str(len(sqlite.MIGRATIONS))
    assert store._db.execute("SELECT x, y FROM later").fetchall() == [("p", None)]
    assert [row.name for row in store.pools()] == ["p"]
    store.close()


def test_a_step_that_fails_leaves_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.db"
    SqliteStore(str(path)).close()
    good = sqlite.MIGRATIONS
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*good, "CREATE TABLE later (x); CREATE TABLE pool (y);"))
    assert "pool already exists" in _refusal(path)
    monkeypatch.setattr(sqlite, "MIGRATIONS", good)
    store = SqliteStore(str(path))
    assert store._db.execute("SELECT name FROM sqlite_master WHERE name = 'later'").fetchall() == []
    store.close()


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(b"this is a text of some length, and no database" * 100)
    assert "no database" in _refusal(path)


def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes (x)")
    db.close()
    content = path.read_bytes()
    assert "another program's database" in _refusal(path)
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "directory" in _refusal(tmp_path / "file" / "s.db")


def test_a_second_daemon_is_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(str(path))
    text = _refusal(path)
    assert f"process {os.getpid()}" in text
    assert "stop it first" in text
    store.close()
    SqliteStore(str(path)).close()


def test_other_programs_cannot_write_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    store = SqliteStore(str(path))
    code = f"import sqlite3; sqlite3.connect({str(path)!r}, timeout=0).execute('DELETE FROM pool')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "database is locked" in result.stderr
    store.close()


def test_large_numbers_of_the_kernel_survive(tmp_path: Path) -> None:
    for number in (0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        assert sqlite._signed(number) & (1 << 64) - 1 == number
        assert -(1 << 63) <= sqlite._signed(number) < 1 << 63


def test_an_empty_store(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "s.db"))
    assert store.allocations(Filter()) == []
    assert store.pools() == []
    assert store.remembered_node() == ""
    store.close()
