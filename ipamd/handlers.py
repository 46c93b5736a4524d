"""What all handlers of the API have in common: how they are measured, and how an exception becomes a status code."""

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from grpc import aio

from ipamd.errors import IpamdError, OutOfRangeError
from ipamd.pool import Mode
from telemetry import log
from telemetry.metrics import IpamdMetrics

H = TypeVar("H", bound="Handlers")
Req = TypeVar("Req")
Resp = TypeVar("Resp")
Context = aio.ServicerContext[Any, Any]

_LONGEST_REQUEST_ID = 64
_LONGEST_DETAILS = 2000  # gRPC sends the text as a header, whose whole size is limited to 8 KiB

_logger = logging.getLogger("ipamd")


class Handlers:
    """A group of handlers.

    `in_hand`: how many requests they have yet to answer. `mode`: of named pools whose spec names none.
    """

    def __init__(self, metrics: IpamdMetrics) -> None:
        self.metrics = metrics
        self.in_hand = 0
        self.mode: Mode = "local"


def unary(
    handler: Callable[[H, Req, str], Awaitable[Resp]],
) -> Callable[[H, Req, Context], Awaitable[Resp]]:
    """Around a handler, which gets the request's id in place of the context: measures, and answers what it raises."""
    name = handler.__name__

    @functools.wraps(handler)
    async def answer(self: H, request: Req, context: Context) -> Resp:
        began = time.perf_counter()
        request_id = request_id_of(context)
        code = "CANCELLED"
        self.in_hand += 1
        try:
            response = await handler(self, request, request_id)
            code = "OK"
        except IpamdError as error:
            code = error.code
            log.event(_logger, "info" if code != "INTERNAL" else "error", "refused", method=name, code=code,
                      error=str(error), request_id=request_id)  # fmt: skip
            await abort(context, error)
        finally:
            self.in_hand -= 1
            self.metrics.request(name, code, time.perf_counter() - began)
        return response

    return answer


async def abort(context: Context, error: IpamdError) -> NoReturn:
    """Ends the call. The mark tells an UNAVAILABLE of ours from one that gRPC made of a lost connection."""
    text = str(error)[:_LONGEST_DETAILS]
    more = (("x-newest-revision", str(error.newest)),) if isinstance(error, OutOfRangeError) else ()
    await context.abort(grpc.StatusCode[error.code], text, (("x-answered-by", "ipamd"), *more))
    raise AssertionError("abort returned")  # its stub does not say that it never does


def request_id_of(context: Context) -> str:
    """The id that the client gave the request, "" for none."""
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id":
            return str(value)[:_LONGEST_REQUEST_ID]
    return ""
