"""What can go wrong with etcd, in words for an operator; and what an answer of etcd's means for the next step."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable

import grpc
from grpc import aio


class EtcdError(Exception):
    """etcd did not do what was asked; the text says why and what to do."""


class UnavailableError(EtcdError):
    """No endpoint answered within the time. Nothing was changed."""


class UnknownOutcomeError(UnavailableError):
    """The connection was lost over a change: it may have been made, or not. Read before you ask again."""


class QuotaError(EtcdError):
    """etcd is full and takes no more data until an operator acts. Deleting still works."""


class DeniedError(EtcdError):
    """Wrong user, password, certificate, or a right is missing."""


class TooLargeError(EtcdError):
    """The request, or the answer, is larger than etcd or gRPC take."""


class CompactedError(EtcdError):
    """The history from the wanted revision on is not there any more: list anew and watch from there."""

    def __init__(self, revision: int, text: str = "") -> None:
        super().__init__(
            text or f"etcd's history before revision {revision} was compacted away; the state has to be read anew"
        )
        self.revision = revision  # the oldest that is left; 0: etcd did not say


class AnotherHistoryError(CompactedError):
    """etcd is behind what it said before: it was restored from a backup, or begun anew."""


class Verdict(enum.Enum):
    """What to do after a call that failed."""

    ELSEWHERE = "certainly not done; another endpoint may do it"
    UNSURE = "may have been done"
    TOKEN = "certainly not done; wants a fresh token"  # noqa: S105 - no password
    FINAL = "certainly not done, and no other endpoint would"


QUOTA_TEXT = (
    "etcd is full: its database reached the quota and it takes no more data. Compact the history (etcdctl compact), "
    "then defragment every member (etcdctl defrag), or raise --quota-backend-bytes; then disarm the alarm "
    "(etcdctl alarm disarm)"
)

NO_CONNECTION, NO_ANSWER = "no connection: no answer", "no answer in time"
# Of an endpoint that said nothing at all.
SILENCE = (NO_CONNECTION, NO_ANSWER, "connection attempt timed out")

# What gRPC says of certificates, and what that means here; the first that fits.
_TLS = "TLS: "
_TLS_TEXTS = (
    (("Hostname Verification", "Peer name "), "its certificate is for other names than this address"),
    (("CERTIFICATE_VERIFY_FAILED",), "its certificate is not by [etcd] ca, or its time is over"),
    (
        ("ALERT_BAD_CERTIFICATE", "CERTIFICATE_REQUIRED", "ALERT_UNKNOWN_CA", "CERTIFICATE_EXPIRED", "Unwrap failed"),
        "it does not take [etcd] cert, or wants one and there is none",
    ),
    (("create security handshaker",), "[etcd] cert and key do not belong together, or are no certificate and key"),
    (("WRONG_VERSION_NUMBER",), "it speaks no TLS; write http:// before its address, or leave [etcd] ca out"),
    (("handshake failed", "SSL_ERROR"), "the handshake failed"),
)


def judge(error: aio.AioRpcError) -> tuple[Verdict, EtcdError]:
    """What the failure of a call to one endpoint means."""
    code, details = error.code(), error.details() or ""
    text = plain(details)
    for parts, verdict, meaning in _TEXTS:
        if any(part in details for part in parts):
            return verdict, meaning(text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Verdict.UNSURE, UnavailableError(NO_ANSWER)
    if code in _UNSURE:
        return Verdict.UNSURE, UnavailableError(text or code.name)
    return Verdict.FINAL, EtcdError(f"etcd: {text} ({code.name})")


_UNSURE = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
    )
)


def is_tls(text: str) -> bool:
    """Whether a text of `plain` is about certificates: waiting does not help, another file does."""
    return text.startswith(_TLS)


_SYSTEM = re.compile(
    r"Connection refused|Connection reset by peer|Connection timed out|No such file or directory|Network is unreachable"
    r"|No route to host|Host is unreachable|Broken pipe|ping timeout|connection attempt timed out"
)


def plain(text: str) -> str:
    """gRPC's or etcd's text without what says nothing to an operator."""
    for parts, meaning in _TLS_TEXTS:
        if any(part in text for part in parts):
            return f"{_TLS}{meaning} ({text.rpartition('OPENSSL_internal:')[2].removesuffix(': OK')})"
    # Who hangs up before it has read all that we sent resets the connection (unix(7), RFC 1122 4.2.2.13): the one or
    # the other, as it happens.
    if "failed to connect" in text and ("Socket closed" in text or "Connection reset by peer" in text):
        return "it closed the connection; does only one of the two sides speak TLS ([etcd] ca)?"
    if found := _SYSTEM.search(text):
        return "no answer to pings" if found[0] == "ping timeout" else found[0].lower()
    if "error from Core" in text:  # gRPC's words for a call whose connection went while it was being made
        return "the connection broke"
    text = text.removeprefix("etcdserver: ")
    if "last error: " in text:
        text = text.rpartition("last error: ")[2]
    return text.removeprefix("UNKNOWN: ").removeprefix("UNAVAILABLE: ").removesuffix(";")


_NO_USER = "etcd wants a user: set [etcd] user and password_file"


def _denied_text(text: str) -> str:
    if "permission denied" in text:
        return "etcd: permission denied: the user's role needs readwrite on the whole key prefix ([etcd] prefix)"
    return f"etcd: {text}: check [etcd] user and password_file"


def _too_large(text: str) -> EtcdError:
    return TooLargeError(f"etcd: {text} (etcd's --max-request-bytes and --max-txn-ops set its limits)")


# By the texts of etcd and gRPC, as the codes are not the same in all versions; the first that fits.
_TEXTS: tuple[tuple[tuple[str, ...], Verdict, Callable[[str], EtcdError]], ...] = (
    (("database space exceeded",), Verdict.FINAL, lambda _: QuotaError(QUOTA_TEXT)),
    (("has been compacted",), Verdict.FINAL, lambda _: CompactedError(0)),
    (
        ("invalid auth token", "auth store is old", "revision in header is old"),
        Verdict.TOKEN,
        lambda text: DeniedError(f"etcd refuses the token: {text}"),
    ),
    (("user name is empty",), Verdict.TOKEN, lambda _: DeniedError(_NO_USER)),
    (
        ("permission denied", "authentication failed", "user name not found"),
        Verdict.FINAL,
        lambda text: DeniedError(_denied_text(text)),
    ),
    (
        ("request is too large", "too many operations in txn", "message larger than max", "larger than max ("),
        Verdict.FINAL,
        _too_large,
    ),
    (
        ("no leader", "proposal dropped", "not capable", "not supported for learner", "too many requests"),
        Verdict.ELSEWHERE,
        UnavailableError,
    ),
    (("failed to connect to all addresses",), Verdict.ELSEWHERE, UnavailableError),
)
