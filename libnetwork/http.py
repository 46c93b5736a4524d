"""Docker's plugin protocol over HTTP: one POST per call, JSON in and out.

A refusal is status 200 with {"Err": text}, which Docker shows to whoever typed the command; the IPAM protocol reads
"Error" instead, so both are there. It is made here, once, from whatever a driver raises.

Source: https://docs.docker.com/engine/extend/plugin_api/
"""

import asyncio
import inspect
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

import msgspec
from aiohttp import web

from ipamd.client import IpamError
from kernel.errors import KernelError
from libnetwork.errors import DriverError
from telemetry import log

_logger = logging.getLogger("netloom-docker")
CONTENT_TYPE = "application/vnd.docker.plugins.v1.2+json"
_LARGEST = 4 << 20

Handler = Callable[[Any], Mapping[str, Any]]


def application(
    calls: Mapping[str, Handler],
    executor: Executor,
    immediate: Collection[str] = (),
    others: Iterable[web.RouteDef] = (),
) -> web.Application:
    """The HTTP side of the shim.

    Args:
        calls: "NetworkDriver.Join" → who answers it, in a thread of `executor`; the type that its parameter is
            annotated with is that of the message.
        executor: where the drivers work: they wait for plugins and for the kernel.
        immediate: the calls that wait for nothing, and are answered without a thread.
        others: what has its own way to read and to answer (libnetwork.authorization).
    """
    table = {name: (_message(handler), handler) for name, handler in calls.items()}

    async def serve(request: web.Request) -> web.Response:
        name = request.match_info["call"]
        found = table.get(name)
        if found is None:
            return _answer(_refusal(f"netloom-docker knows no call {name}"), status=404)
        kind, handler = found
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _answer(_refusal(f"{name}: a request of more than {_LARGEST} bytes"), status=413)
        began = time.monotonic()
        if name in immediate:
            answer = _call(name, kind, handler, body)
        else:
            answer = await asyncio.get_running_loop().run_in_executor(executor, _call, name, kind, handler, body)
        log.event(
            _logger,
            "warning" if "Err" in answer else "debug",
            name,
            took_ms=round((time.monotonic() - began) * 1000, 1),
            error=answer.get("Err", ""),
        )
        return _answer(answer)

    app = web.Application(client_max_size=_LARGEST)
    app.add_routes(others)
    app.router.add_post("/{call}", serve)
    return app


def _message(handler: Handler) -> type:
    """What a handler takes."""
    (parameter,) = inspect.signature(handler, eval_str=True).parameters.values()
    found: type = parameter.annotation
    return found


def _call(name: str, kind: type, handler: Handler, body: bytes) -> Mapping[str, Any]:
    try:
        return handler(_decode(name, kind, body))
    except DriverError as error:
        notes = "".join(f"; also: {note}" for note in getattr(error, "__notes__", ()))
        return _refusal(f"{error}{notes}")
    except IpamError as error:
        return _refusal(f"{name}: ipamd: {error.message}")
    except (KernelError, OSError) as error:
        return _refusal(f"{name}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, Docker must get an answer
        traceback.print_exc()
        return _refusal(f"{name}: a fault of netloom-docker: {error!r}; its log has more")


def _decode(name: str, kind: type, body: bytes) -> Any:
    """Raises DriverError where it is no such message."""
    if not body and kind.__struct_fields__:  # type: ignore[attr-defined]
        # So Docker repeats a call whose connection ended in the middle (moby, pkg/plugins/client.go): what it had to
        # say went with that. RequestPool would be answered with another pool than the one that was named.
        raise DriverError(f"{name}: it came without its arguments, after a connection that was cut; try again")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DriverError(f"{name}: {error}") from error


def _answer(answer: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type=CONTENT_TYPE)


def _refusal(text: str) -> dict[str, str]:
    return {"Err": text, "Error": text}
