"""The client of etcd without an etcd: configuration, what failures mean, ranges. The rest is in tests/cluster."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from pathlib import Path

import grpc
import pytest
from grpc import aio

from cluster.config import EtcdConfig, EtcdConfigError
from cluster.errors import (
    CompactedError,
    DeniedError,
    EtcdError,
    QuotaError,
    TooLargeError,
    UnavailableError,
    Verdict,
    judge,
    plain,
)
from cluster.etcd import Etcd, Put, UnknownOutcomeError
from cluster.watch import prefix_end
from protos.etcd.v3 import kv_pb2, rpc_pb2


@pytest.mark.parametrize(
    ("endpoint", "target", "shown"),
    [
        ("10.0.0.1:2379", "ipv4:10.0.0.1:2379", "10.0.0.1:2379"),
        ("10.0.0.1", "ipv4:10.0.0.1:2379", "10.0.0.1:2379"),
        ("http://10.0.0.1:4001/", "ipv4:10.0.0.1:4001", "10.0.0.1:4001"),
        ("[fd00::1]:2379", "ipv6:[fd00::1]:2379", "[fd00::1]:2379"),
        ("[fd00:0::1]", "ipv6:[fd00::1]:2379", "[fd00::1]:2379"),
        ("etcd-1.example:2379", "dns:///etcd-1.example:2379", "etcd-1.example:2379"),
        ("etcd", "dns:///etcd:2379", "etcd:2379"),
        ("unix:/run/etcd:2379", "unix:/run/etcd:2379", "unix:/run/etcd:2379"),
    ],
)
def test_endpoints(endpoint: str, target: str, shown: str) -> None:
    (address,) = EtcdConfig((endpoint,)).addresses()
    assert (address.target, address.shown, address.tls) == (target, shown, False)


@pytest.mark.parametrize(
    "endpoint",
    [
        *("", "a b", "10.0.0.1:0", "10.0.0.1:x", "10.0.0.1:", "10.0.0.1:65536", "[fd00::1", "[fd00::1]x"),
        # Is it a port? And typing errors that would be asked of a name server.
        *("fd00::1", "fd00::1:2379", "10.0.0.300:2379", "10.0.0", "2379", "10.0.0.1:2379,10.0.0.2:2379"),
    ],
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(EtcdConfigError, match="wanted such as"):
        EtcdConfig((endpoint,))


def test_when_tls_is_spoken() -> None:
    config = EtcdConfig(("10.0.0.1", "https://10.0.0.2", "http://10.0.0.3"), ca="/ca.pem")
    assert [address.tls for address in config.addresses()] == [True, True, False]
    with pytest.raises(EtcdConfigError, match="ca: wanted"):
        EtcdConfig(("https://10.0.0.2",))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("endpoints", (), "at least one"),
        ("prefix", "", "prefix"),
        ("cert", "/a.pem", "both or none"),
        ("password_file", "/a", "user"),
        ("timeout_s", 0.0, "timeout_s"),
    ],
)
def test_values_that_are_refused(field: str, value: object, text: str) -> None:
    config = EtcdConfig(("10.0.0.1",))
    with pytest.raises(EtcdConfigError, match=text):
        dataclasses.replace(config, **{field: value})  # type: ignore[arg-type]


def test_a_password_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    config = EtcdConfig(("10.0.0.1",), user="u", password_file=str(file))
    with pytest.raises(EtcdConfigError, match="password_file"):
        config.read_password()
    file.write_text(" with spaces \r\n", encoding="utf-8")
    assert config.read_password() == " with spaces "


_CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "verdict", "kind"),
    [
        (_CODES.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Verdict.FINAL, QuotaError),
        (_CODES.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Verdict.FINAL, CompactedError),
        (_CODES.UNAUTHENTICATED, "etcdserver: invalid auth token", Verdict.TOKEN, DeniedError),
        (_CODES.UNKNOWN, "auth: revision in header is old", Verdict.TOKEN, DeniedError),
        (_CODES.INVALID_ARGUMENT, "etcdserver: user name is empty", Verdict.TOKEN, DeniedError),
        (_CODES.PERMISSION_DENIED, "etcdserver: permission denied", Verdict.FINAL, DeniedError),
        (_CODES.INVALID_ARGUMENT, "etcdserver: request is too large", Verdict.FINAL, TooLargeError),
        (_CODES.RESOURCE_EXHAUSTED, "grpc: received message larger than max (9 vs. 8)", Verdict.FINAL, TooLargeError),
        (_CODES.UNAVAILABLE, "etcdserver: no leader", Verdict.ELSEWHERE, UnavailableError),
        (_CODES.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.ELSEWHERE, UnavailableError),
        (_CODES.UNKNOWN, "raft proposal dropped", Verdict.ELSEWHERE, UnavailableError),
        (
            _CODES.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:2379: Failed to connect to remote "
            "host: connect: Connection refused (111)",
            Verdict.ELSEWHERE,
            UnavailableError,
        ),
        (
            _CODES.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: unix:/e: recvmsg:Connection reset by peer",
            Verdict.ELSEWHERE,
            UnavailableError,
        ),
        (_CODES.UNAVAILABLE, "etcdserver: request timed out", Verdict.UNSURE, UnavailableError),
        (_CODES.UNAVAILABLE, "etcdserver: leader changed", Verdict.UNSURE, UnavailableError),
        (_CODES.UNAVAILABLE, "recvmsg:Connection reset by peer", Verdict.UNSURE, UnavailableError),
        (_CODES.DEADLINE_EXCEEDED, "Deadline Exceeded", Verdict.UNSURE, UnavailableError),
        (_CODES.NOT_FOUND, "etcdserver: requested lease not found", Verdict.FINAL, EtcdError),
    ],
)
def test_what_a_failure_means(code: grpc.StatusCode, details: str, verdict: Verdict, kind: type[EtcdError]) -> None:
    error = aio.AioRpcError(code, aio.Metadata(), aio.Metadata(), details=details, debug_error_string=None)
    found, meaning = judge(error)
    assert (found, type(meaning)) == (verdict, kind)
    assert "UNKNOWN:" not in str(meaning)


@pytest.mark.parametrize(
    ("first", "end"), [(b"/a/", b"/a0"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"", b"\0"), (b"a\xffb", b"a\xffc")]
)
def test_the_end_of_a_prefix(first: bytes, end: bytes) -> None:
    assert prefix_end(first) == end


def test_the_names_on_the_wire() -> None:
    services = rpc_pb2.DESCRIPTOR.services_by_name
    assert {service.full_name for service in services.values()} == {
        "etcdserverpb.KV",
        "etcdserverpb.Watch",
        "etcdserverpb.Lease",
        "etcdserverpb.Auth",
        "etcdserverpb.Maintenance",
    }
    assert kv_pb2.KeyValue.DESCRIPTOR.full_name == "mvccpb.KeyValue"


def test_nobody_there(tmp_path: Path) -> None:
    async def main() -> None:
        endpoints = (f"unix:{tmp_path}/one", f"unix:{tmp_path}/two")
        etcd = Etcd(EtcdConfig(endpoints, timeout_s=0.5))
        with pytest.raises(UnavailableError) as caught:
            await etcd.txn([], [Put("a", b"")])
        assert not isinstance(caught.value, UnknownOutcomeError)
        assert all(f"{endpoint}: no such file or directory" in str(caught.value) for endpoint in endpoints)
        assert not etcd.state.connected
        assert etcd.state.reason == "no such file or directory"
        statuses = await etcd.status()
        assert {status.endpoint for status in statuses} == set(endpoints)
        assert all(status.error for status in statuses)
        await etcd.close()

    asyncio.run(main())


@pytest.mark.parametrize("reads", [True, False], ids=["closed", "reset"])
def test_what_was_said_is_told_rather_than_the_silence_after_it(tmp_path: Path, reads: bool) -> None:
    """As where only one side speaks TLS, on a slow machine: hung up on, then no answer within the time."""
    accepted: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut down at the end
            first, _ = listener.accept()
            with first:
                first.recv(1 << 16, 0 if reads else socket.MSG_PEEK)
            while True:
                accepted.append(listener.accept()[0])

    async def main() -> None:
        # Longer than gRPC takes to give a connection up.
        etcd = Etcd(EtcdConfig((f"unix:{tmp_path}/etcd",), timeout_s=4.0))
        with pytest.raises(UnavailableError, match="only one of the two sides speak TLS"):
            await etcd.get("a")
        assert "only one of the two sides speak TLS" in etcd.state.reason
        await etcd.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/etcd")
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        try:
            asyncio.run(main())
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()
            for one in accepted:
                one.close()
    assert accepted, "it was not asked again"


def test_grpcs_own_words_for_a_broken_connection_do_not_reach_an_operator() -> None:
    assert plain("Internal error from Core") == "the connection broke"
