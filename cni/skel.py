"""From (environment, standard input) to (standard output, exit status), for every plugin. Makes all that is printed.

Rules of this file
- Standard output is a result (ADD), a version object (VERSION), an error object, or nothing; the log goes to standard
  error. Exit status 1 goes with an error object.
- Whatever a plugin raises becomes an error object: CniError as it is, anything else as code 999 with the traceback on
  standard error.
- An ADD counts when its result was delivered, and is committed only then. Where the plugin fails, the result cannot be
  expressed in the asked version, or the caller cannot deliver it, it is undone before anybody else gets the
  attachment's lock.
- Where the time went is written down after the answer (telemetry/trace.py); VERSION, and a call without a verb, leave
  nothing behind.
- Nothing heavy is imported here: a cold process pays for each import in every request.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from cni import config, registry, versions
from cni.errors import CniError, Code
from cni.lock import attachment_lock
from cni.request import Command, Request, check_environment, command, parse
from cni.result import Result
from cni.undo import Undo
from kernel.paths import PathError, run_dir
from kernel.version import VERSION
from telemetry import trace

if TYPE_CHECKING:
    from kernel.session import Session


class Plugin(Protocol):
    """What the module of a plugin has. Each function raises CniError, or anything else for a bug."""

    def add(self, request: Request, host: "Session", undo: Undo) -> Result:
        """Attach, pushing the inverse of each step."""

    def delete(self, request: Request, host: "Session") -> None:
        """Detach; succeed where there is nothing to detach."""

    def check(self, request: Request, host: "Session") -> None:
        """Raise for whatever is not as ADD left it."""

    def gc(self, request: Request, host: "Session") -> None:
        """Remove what belongs to no attachment of request.valid_attachments."""

    def status(self, request: Request, host: "Session") -> None:
        """Raise where an ADD could not be served."""


class Outcome(msgspec.Struct, frozen=True):
    """What the process prints, and its exit status."""

    stdout: bytes
    stderr: bytes = b""
    status: int = 0


Deliver = Callable[[Outcome], None]


def run(
    plugin: str,
    environment: Mapping[str, str],
    read_stdin: Callable[[], bytes],
    open_host: Callable[[], "Session"],
    load: Callable[[str], Plugin] = registry.load,
    deliver: Deliver | None = None,
) -> Outcome:
    """Serve one request.

    Args:
        plugin: a type of cni.registry.
        environment: the runtime's.
        read_stdin: called at most once, and not at all where the environment alone decides. May stop reading as soon
            as it has more than config.LIMIT bytes.
        open_host: a Session in the host's namespace; called after the request was checked. Who opens it closes it.
        load: the plugin's module by its type.
        deliver: hands the outcome to whoever asked and raises where that fails. Called exactly once; for an ADD while
            the attachment's lock is held, and an ADD is undone when it raises. None: the return value is enough.

    Returns:
        The outcome that was delivered; where delivery failed, one that says so, with exit status 1.
    """
    service = _Service(plugin, environment, open_host, load, deliver)
    outcome = _served(service, read_stdin)
    service.remember()
    return outcome


def _served(service: "_Service", read_stdin: Callable[[], bytes]) -> Outcome:
    """The outcome, delivered."""
    try:
        outcome = service.serve(read_stdin)
    except _Undelivered as failure:
        return failure.outcome
    except BaseException as error:  # noqa: BLE001 - the one place where everything becomes an answer
        outcome = service.failed(error)
    if service.deliver is None or service.delivered:
        return outcome
    try:
        with trace.step("deliver"):
            service.deliver(outcome)
    except BaseException as error:  # noqa: BLE001
        service.ended = ("undelivered", service.ended[1], str(error) or type(error).__name__)
        return _undelivered(outcome, error)
    return outcome


class _Undelivered(Exception):  # noqa: N818 - never leaves this file
    """Delivery of an ADD failed, and everything that follows from it is done."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class _Service:
    """One request on its way; keeps what an error object needs to know."""

    def __init__(
        self,
        plugin: str,
        environment: Mapping[str, str],
        open_host: Callable[[], "Session"],
        load: Callable[[str], Plugin],
        deliver: Deliver | None,
    ) -> None:
        self.plugin = plugin
        self.environment = environment
        self.open_host = open_host
        self.load = load
        self.deliver = deliver
        self.stdin = b""
        self.delivered = False
        self.log = b""
        self.ended = ("done", 0, "")  # as telemetry.trace.end has it
        self.traced = False

    def remember(self) -> None:
        """Write down where the time went."""
        if self.traced:
            # A run directory that is none was the reason to fail, and has no place for it either.
            with contextlib.suppress(PathError):
                trace.end(run_dir(self.environment), *self.ended)
        trace.drop()

    def serve(self, read_stdin: Callable[[], bytes]) -> Outcome:
        """The outcome of a request that went well; raises for any other."""
        began_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        entry = registry.PLUGINS[self.plugin]
        supported = versions.supported_from(entry.oldest)
        if not self.environment.get("CNI_COMMAND"):
            return _about(self.plugin, supported)
        verb = command(self.environment)
        if verb is Command.VERSION:
            # The specification wants the input's cniVersion here. The reference does not read standard input, so that
            # a terminal or an open pipe cannot block it, and answers with the newest version that it knows, whatever
            # the input; runtimes look at supportedVersions only.
            answer = {"cniVersion": versions.CURRENT, "supportedVersions": supported}
            return Outcome(msgspec.json.encode(answer) + b"\n")
        request_id = os.urandom(8).hex()
        self.traced = True
        trace.mark("parse")
        trace.about(
            id=request_id,
            plugin=self.plugin,
            verb=verb,
            container=self.environment.get("CNI_CONTAINERID", ""),
            ifname=self.environment.get("CNI_IFNAME", ""),
        )
        check_environment(verb, self.environment)
        self.stdin = _read(read_stdin)
        request = parse(
            self.environment,
            self.stdin,
            plugin=self.plugin,
            supported=supported,
            request_id=request_id,
            began_ns=began_ns,
        )
        trace.about(network=request.network)
        if verb in (Command.GC, Command.STATUS):
            return self._call(request)
        if entry.kind == "ipam":
            # Under its caller's lock, where there is one; its namespace is its caller's affair too.
            return self._call(request)
        holder = f"({self.plugin} {verb}, request {request.request_id})"
        trace.mark("lock")
        with attachment_lock(run_dir(self.environment), request.container_id, request.ifname, holder):
            trace.mark("namespace")
            outcome = self._call(self._with_checked_netns(request))
            trace.mark("unlock")
            return outcome

    def _call(self, request: Request) -> Outcome:
        trace.mark("load")
        module = self.load(self.plugin)
        host = self.open_host()
        trace.mark(self.plugin)
        match request.command:
            case Command.ADD:
                return self._add(module, request, host)
            case Command.DEL:
                module.delete(request, host)
            case Command.CHECK:
                module.check(request, host)
            case Command.GC:
                module.gc(request, host)
            case Command.STATUS:
                module.status(request, host)
        return Outcome(b"", self.log)

    def _add(self, module: Plugin, request: Request, host: "Session") -> Outcome:
        undo = Undo()
        try:
            result = module.add(request, host, undo)
            trace.mark("result")
            outcome = Outcome(_pretty(versions.encode(result, request.cni_version)), self.log)
        except BaseException:
            self._unwind(undo)
            raise
        if self.deliver is not None:
            try:
                with trace.step("deliver"):
                    self.deliver(outcome)
            except BaseException as error:
                self.ended = ("undelivered", 0, str(error) or type(error).__name__)
                self._unwind(undo)
                raise _Undelivered(_undelivered(Outcome(b"", self.log), error)) from error
            self.delivered = True
        undo.commit()
        return outcome

    def _unwind(self, undo: Undo) -> None:
        """Take an ADD back. What goes wrong here is logged only: the first cause is what the caller gets to know."""
        with trace.step("undo"):
            failures = undo.unwind()
        for failure in failures:
            self.log += f"netloom: undoing the ADD: {failure}\n".encode("utf-8", "backslashreplace")

    def _with_checked_netns(self, request: Request) -> Request:
        """The request, if its namespace is one, and (ADD) not ours.

        The reference compares after the work is done, and leaves it done; here nothing has happened yet. On DEL a
        namespace that is gone, is none, or is ours is no namespace: what was in the container's is gone with it, and
        deleting the interface of that name from the host's would take the host off its network.
        """
        if not request.netns:
            return request
        from kernel import netns  # noqa: PLC0415 - ctypes and more, which VERSION and every refusal do without
        from kernel.errors import KernelError, NotFound  # noqa: PLC0415

        deleting = request.command is Command.DEL
        try:
            theirs = netns.identify(request.netns)
        except (KernelError, ValueError) as error:
            if deleting:
                # Gone is what DEL may expect, and nothing to report.
                return self._without_netns(request, "" if isinstance(error, NotFound) else str(error))
            raise CniError(
                Code.INVALID_NETNS,
                f"failed to open netns {request.netns!a}",
                f"{error}; CNI_NETNS must be the path of a network namespace, such as /run/netns/NAME",
            ) from error
        if request.command is Command.CHECK or request.netns_override or theirs != netns.own():
            return request
        if deleting:
            return self._without_netns(request, "it is the plugin's own")
        raise CniError(
            Code.INVALID_NETNS,
            "plugin's netns and netns from CNI_NETNS should not be the same",
            f"CNI_NETNS is {request.netns!a}; CNI_NETNS_OVERRIDE=1 allows it",
        )

    def _without_netns(self, request: Request, reason: str) -> Request:
        if reason:
            note = f"netloom: DEL goes on without CNI_NETNS {request.netns!a}: {reason}\n"
            self.log += note.encode("utf-8", "backslashreplace")
        return msgspec.structs.replace(request, netns="")

    def failed(self, error: BaseException) -> Outcome:
        """The error object for anything that was raised."""
        if isinstance(error, CniError):
            return self._refused(error)
        if _is_kernel_error(error):
            # The kernel refused: its words are the diagnosis, a traceback would hide them.
            return self._refused(CniError(Code.INTERNAL, str(error)))
        if isinstance(error, PathError):
            return self._refused(CniError(Code.INVALID_ENVIRONMENT, str(error)))
        text = str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            text = f"interrupted by a signal{': ' + str(error) if str(error) else ''}"
        elif isinstance(error, SystemExit):
            text = f"the plugin ended with exit status {error.code}"
        return self._refused(CniError(Code.INTERNAL, text), _traceback(error))

    def _refused(self, error: CniError, more: bytes = b"") -> Outcome:
        self.ended = ("failed", error.code, str(error))
        return Outcome(_pretty(error.document(_error_version(self.stdin))), self.log + more, 1)


def _about(plugin: str, supported: tuple[str, ...]) -> Outcome:
    """Called by hand, without CNI_COMMAND: who this is. Exit status 0, as the reference."""
    text = f"CNI {plugin} plugin v{VERSION} (netloom)\nCNI protocol versions supported: {', '.join(supported)}\n"
    return Outcome(b"", text.encode())


def _read(read_stdin: Callable[[], bytes]) -> bytes:
    try:
        return read_stdin()
    except OSError as error:
        raise CniError(Code.IO_FAILURE, f"error reading from stdin: {error.strerror or error}") from error


def _error_version(stdin: bytes) -> str:
    """The version for an error object: the configuration's where there is one that we know."""
    try:
        version = config.decode_object(stdin, "network config").get("cniVersion")
    except CniError:
        return versions.CURRENT
    return version if isinstance(version, str) and version in versions.SUPPORTED else versions.CURRENT


def _undelivered(outcome: Outcome, error: BaseException) -> Outcome:
    why = f"netloom: the answer could not be delivered: {error or type(error).__name__}\n"
    return Outcome(b"", outcome.stderr + why.encode("utf-8", "backslashreplace"), 1)


def _pretty(document: dict[str, object]) -> bytes:
    """Four spaces, no newline at the end: as the reference prints."""
    return msgspec.json.format(msgspec.json.encode(document), indent=4)


def _is_kernel_error(error: BaseException) -> bool:
    from kernel.errors import KernelError  # noqa: PLC0415 - loaded already where one was raised

    return isinstance(error, KernelError)


def _traceback(error: BaseException) -> bytes:
    import traceback  # noqa: PLC0415 - 9 ms, for bugs only

    return "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace")
