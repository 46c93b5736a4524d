"""What is on disk: whole or not at all, one writer, and nothing that stops the shim."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from libnetwork.errors import DriverError
from libnetwork.published import Published
from libnetwork.state import Endpoint, Network, Pool, State
from tests.libnetwork.conftest import endpoint, network


def test_everything_comes_back(state: State, tmp_path: Path) -> None:
    ports = (Published(6, 80, "127.0.0.1", 8080, 0, chosen=True),)
    one = endpoint(staging="/run/netloom/staging/a", result={"ips": [{"address": "10.1.0.2/24"}]}, ports=ports)
    values: list[Network | Endpoint | Pool] = [
        network(mtu=1400, internal=True),
        one,
        Pool("docker-10.1.0.0_24", "10.1.0.0/24", "10.1.0.128/25"),
    ]
    for value in values:
        state.put(value)
    state.close()
    again = State(str(tmp_path / "state"))
    try:
        assert [*again.all(Network), *again.all(Endpoint), *again.all(Pool)] == values
        assert again.get(Endpoint, one.id) == one
        again.remove(Endpoint, one.id)
        again.remove(Endpoint, one.id)
        assert again.find(Endpoint, one.id) is None
    finally:
        again.close()
        state._held = os.open("/dev/null", os.O_RDONLY)  # the fixture closes once more


def test_only_root_may_look(state: State, tmp_path: Path) -> None:
    state.put(endpoint())
    for directory, _, files in os.walk(tmp_path / "state"):
        assert os.stat(directory).st_mode & 0o077 == 0
        for file in files:
            assert os.stat(os.path.join(directory, file)).st_mode & 0o077 == 0


def test_a_write_that_fails_leaves_what_was_there(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = network()
    state.put(before)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(OSError, match="No space left"):
        state.put(msgspec.structs.replace(before, gateways=()))
    assert state.get(Network, before.id) == before
    assert [path.name for path in (tmp_path / "state/networks").iterdir()] == [f"{before.id}.json"]


def test_who_waits_for_the_disk(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and pools; an endpoint's interface survives no power cut either."""
    synced = []
    for call in ("fdatasync", "fsync"):
        monkeypatch.setattr(os, call, lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    state.put(endpoint("e"))
    state.remove(Endpoint, "e")
    assert synced == []
    state.put(network("n"))
    state.remove(Network, "n")
    assert synced == ["n.json.tmp", "networks", "networks"]


def test_half_a_write_is_not_seen(state: State, tmp_path: Path) -> None:
    (tmp_path / "state/endpoints/e2.json.tmp").write_text('{"id": "e2"')
    assert list(state.all(Endpoint)) == []


def test_a_directory_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns the directory above could put it there."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    with pytest.raises(DriverError, match=r"open belongs to user \d+ with mode 0770; wanted one that only user"):
        State(str(tmp_path / "open"))
    (tmp_path / "own").mkdir(0o700)
    (tmp_path / "link").symlink_to("own")
    with pytest.raises(OSError, match="link"):
        State(str(tmp_path / "link"))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(DriverError, match="only user 4711 can write to: move it away"):
        State(str(tmp_path / "own"))


def test_what_is_put_in_its_place_is_not_looked_at(state: State, tmp_path: Path) -> None:
    state.put(endpoint("ours"))
    os.rename(tmp_path / "state", tmp_path / "aside")
    other = State(str(tmp_path / "state"))
    other.put(endpoint("theirs"))
    other.close()
    assert [one.id for one in state.all(Endpoint)] == ["ours"]


def test_another_shim_is_refused(state: State, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="is in use by another netloom-docker; stop it first"):
        State(str(tmp_path / "state"))
    state.put(endpoint())  # and this one still works


@pytest.mark.parametrize("id", ["", "..", "../x", "a/b", "a" * 129, ".hidden", "a\nb", "ä"])
def test_an_id_that_is_no_file_name_is_refused(state: State, id: str) -> None:  # noqa: A002
    with pytest.raises(DriverError, match="wanted an id of letters, digits"):
        state.find(Endpoint, id)
    with pytest.raises(DriverError):
        state.put(endpoint(id))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'{"id": "bad"}', b'{"id": 7}', b"\xff\xfe", b"\0" * 100, b'{"id": "\xff"}']
)
def test_a_file_that_makes_no_sense_is_set_aside_and_named(
    state: State, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    state.put(endpoint("good"))
    path = tmp_path / "state/endpoints/bad.json"
    path.write_bytes(content)
    assert [one.id for one in state.all(Endpoint)] == ["good"]
    (record,) = caplog.records
    assert record.netloom_fields["file"] == f"{path}.bad"  # type: ignore[attr-defined]
    assert Path(f"{path}.bad").read_bytes() == content
    assert [one.id for one in state.all(Endpoint)] == ["good"]
    assert len(caplog.records) == 1
    with pytest.raises(DriverError, match=r"endpoint bad: .* could not be read and is in .*bad\.json\.bad"):
        state.get(Endpoint, "bad")
    state.put(endpoint("bad"))
    assert state.get(Endpoint, "bad").id == "bad"


def test_a_file_under_another_name_is_not_believed(state: State, tmp_path: Path) -> None:
    state.put(endpoint("one"))
    os.rename(tmp_path / "state/endpoints/one.json", tmp_path / "state/endpoints/two.json")
    assert list(state.all(Endpoint)) == []


def test_a_file_that_cannot_be_read_is_passed_over(
    state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.put(endpoint("good"))
    (tmp_path / "state/endpoints/dir.json").mkdir()
    assert [one.id for one in state.all(Endpoint)] == ["good"]
    assert "cannot read state" in caplog.text


def test_one_that_is_unknown(state: State) -> None:
    with pytest.raises(DriverError, match=r"network abc is unknown to netloom-docker; .*remove it in Docker"):
        state.get(Network, "abc")


def test_a_newer_versions_key_is_ignored(state: State, tmp_path: Path) -> None:
    path = tmp_path / "state/pools/p.json"
    path.write_text('{"id": "p", "pool": "10.1.0.0/24", "of": "another version"}')
    assert state.get(Pool, "p") == Pool("p", "10.1.0.0/24")
