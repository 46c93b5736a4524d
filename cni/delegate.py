"""Call the IPAM plugin that a configuration names: in this process when it is ours, else by executing it.

A foreign plugin gets what the specification promises it: the request's environment with only CNI_COMMAND replaced, the
whole configuration on standard input, and the runtime's CNI_PATH to be found in. Its standard error is passed on.

Where it is older than the configuration (Debian's host-local knows nothing after 1.0.0), it is asked for its versions
and called again with the newest one that it knows; its result is read in that version. The reference plugins fail then.
A plugin that does not know GC or STATUS has nothing to say to them, which is no failure.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from cni import lease, registry, versions
from cni.config import decode_object
from cni.errors import CniError, Code, shown
from cni.request import Command, Request
from cni.result import Result
from cni.undo import Undo
from kernel.session import Session, Visit
from telemetry import trace

DEADLINE_S = 50.0  # below the minute that a runtime's request has as a whole
_DEADLINE_VARIABLE = "NETLOOM_DELEGATE_TIMEOUT"


def begin(request: Request, host: Session, inside: Visit, undo: Undo) -> Callable[[], Result]:
    """Ask for addresses, for the namespace `inside`; `undo` gives them back.

    Returns:
        What waits for the addresses, to be called once. Only ipamd lets something else be done meanwhile.

    Raises:
        CniError: the plugin's own, or 4 and 7 where there is no such plugin. So does what is returned.
    """
    wait = _begin(request, host, inside, undo)

    @trace.step("allocate")
    def finish() -> Result:
        result = wait()
        if not result.ips:
            raise CniError(Code.INTERNAL, f"IPAM plugin {request.ipam_type} returned no address")
        lease.check(result, request.ipam_type)
        return result

    return finish


@trace.step("allocate")
def _begin(request: Request, host: Session, inside: Visit, undo: Undo) -> Callable[[], Result]:
    if _is_ours(request.ipam_type):
        module = registry.load(request.ipam_type)
        if hasattr(module, "begin"):
            waiting: Callable[[], Result] = module.begin(request, inside, undo)
            return waiting
        result: Result = module.add(request, host, undo)
    else:
        stdout = _execute(request, Command.ADD)
        # Only after it succeeded: host-local refuses a second ADD, and a DEL would free what the first one got.
        undo.push(f"{request.ipam_type} DEL", lambda: _execute(request, Command.DEL))
        result = _result(request, stdout)
    return lambda: result


@trace.step("release")
def delete(request: Request, host: Session) -> None:
    """Give the addresses back."""
    if _is_no_ipam(request.ipam_type):
        return  # ADD was refused for it
    if _is_ours(request.ipam_type):
        registry.load(request.ipam_type).delete(request, host)
    else:
        _execute(request, Command.DEL)


@trace.step("ipam")
def check(request: Request, host: Session) -> None:
    """Let the plugin verify that it still knows the addresses."""
    if _is_ours(request.ipam_type):
        registry.load(request.ipam_type).check(request, host)
    else:
        _execute(request, Command.CHECK)


@trace.step("ipam")
def gc(request: Request, host: Session) -> None:
    """Forward GC."""
    if _is_ours(request.ipam_type):
        registry.load(request.ipam_type).gc(request, host)
    else:
        _optional(request, Command.GC)


@trace.step("ipam")
def status(request: Request, host: Session) -> None:
    """Forward STATUS."""
    if _is_ours(request.ipam_type):
        registry.load(request.ipam_type).status(request, host)
    else:
        _optional(request, Command.STATUS)


def execute(request: Request, kind: str, verb: Command) -> bytes:
    """Run an interface plugin that is not ours, with the request's standard input; what it printed.

    Raises:
        CniError: the plugin's own, or 7 where there is none.
    """
    return _run(_find_in_path(request, kind, "$.delegate.type"), request, verb, request.stdin)


def result_of(request: Request, kind: str, stdout: bytes) -> Result:
    """What an interface plugin printed, as a result of the request's version. Raises CniError."""
    return versions.decode(decode_object(stdout, f"result of plugin {kind}"), request.cni_version)


def _is_ours(kind: str) -> bool:
    entry = registry.PLUGINS.get(kind)
    return entry is not None and entry.kind == "ipam"


def _is_no_ipam(kind: str) -> bool:
    entry = registry.PLUGINS.get(kind)
    return entry is not None and entry.kind != "ipam"


def _optional(request: Request, verb: Command) -> None:
    try:
        _run(_find(request), request, verb, request.stdin)
    except CniError as error:
        if error.code == Code.INCOMPATIBLE_VERSION:
            return
        if error.code == Code.INVALID_ENVIRONMENT and "unknown CNI_COMMAND" in error.msg:
            return
        raise


def _execute(request: Request, verb: Command) -> bytes:
    """Run the plugin; its standard output. One that is too old gets the configuration in a version that it knows."""
    executable = _find(request)
    try:
        return _run(executable, request, verb, request.stdin)
    except CniError as error:
        if error.code != Code.INCOMPATIBLE_VERSION:
            raise
        version = _newest_common(executable, request)
        if not version:
            raise
    return _run(executable, request, verb, _in_version(request, version))


def _newest_common(executable: str, request: Request) -> str:
    """The newest version below the request's that the plugin speaks; "" where there is none."""
    stdin = msgspec.json.encode({"cniVersion": request.cni_version})
    answer = decode_object(_run(executable, request, Command.VERSION, stdin), "the delegate's versions")
    theirs = answer.get("supportedVersions")
    known = versions.SUPPORTED[: versions.SUPPORTED.index(request.cni_version)]
    common = [version for version in known if isinstance(theirs, list) and version in theirs]
    return common[-1] if common else ""


def _in_version(request: Request, version: str) -> bytes:
    document = decode_object(request.stdin, "network config")
    document["cniVersion"] = version
    if request.prev_result is not None:
        document["prevResult"] = versions.encode(request.prev_result, version)
    return msgspec.json.encode(document)


def _result(request: Request, stdout: bytes) -> Result:
    document = decode_object(stdout, f"result of IPAM plugin {request.ipam_type}")
    return versions.decode(document, request.cni_version)


def _find(request: Request) -> str:
    """The executable, in the first directory of CNI_PATH that has it."""
    if _is_no_ipam(request.ipam_type):
        # bridge under bridge would wait for its own caller's lock.
        raise CniError(
            Code.INVALID_CONFIG,
            f"invalid network config: $.ipam.type: {shown(request.ipam_type)} is no IPAM plugin",
            "want one that gives addresses, such as ipamd or host-local",
        )
    return _find_in_path(request, request.ipam_type, "$.ipam.type")


def _find_in_path(request: Request, kind: str, key: str) -> str:
    for directory in request.path:
        path = os.path.join(directory, kind)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise CniError(
        Code.INVALID_CONFIG,
        f"failed to find plugin {shown(kind)} in path {list(request.path)}",
        f"install it into a directory of CNI_PATH, or correct {key}",
    )


def _run(executable: str, request: Request, verb: Command, stdin: bytes) -> bytes:
    environment = {**request.environment, "CNI_COMMAND": verb.value}
    deadline_s = _deadline_s(request.environment)
    try:
        done = _communicate(executable, stdin, environment, deadline_s)
    except subprocess.TimeoutExpired as error:
        raise CniError(
            Code.TRY_AGAIN_LATER,
            f"plugin {executable} did not finish {verb} within {deadline_s:g} s and was killed",
            f"{_DEADLINE_VARIABLE} sets another limit",
        ) from error
    except OSError as error:
        raise CniError(Code.IO_FAILURE, f"failed to execute plugin {executable}: {error.strerror}") from error
    if done.stderr:
        sys.stderr.write(done.stderr.decode("utf-8", "backslashreplace"))
    if done.returncode != 0:
        raise _error(executable, verb, done.returncode, done.stdout)
    return done.stdout


def _communicate(
    executable: str, stdin: bytes, environment: Mapping[str, str], deadline_s: float
) -> subprocess.CompletedProcess[bytes]:
    """As subprocess.run, but what the plugin started ends with it when it is killed, for whatever reason."""
    process = subprocess.Popen(
        [executable],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        process_group=0,
    )
    with process:
        try:
            stdout, stderr = process.communicate(stdin, deadline_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess([executable], process.returncode, stdout, stderr)


def _deadline_s(environment: Mapping[str, str]) -> float:
    text = environment.get(_DEADLINE_VARIABLE, "")
    if not text:
        return DEADLINE_S
    try:
        deadline_s = float(text)
    except ValueError:
        deadline_s = 0.0
    if not 0 < deadline_s <= 3600:
        raise CniError(
            Code.INVALID_ENVIRONMENT, f"{_DEADLINE_VARIABLE}: wanted seconds between 0 and 3600, found {shown(text)}"
        )
    return deadline_s


def _error(executable: str, verb: Command, returncode: int, stdout: bytes) -> CniError:
    """The plugin's own error object; or, where it printed none, how it ended."""
    try:
        document = decode_object(stdout, "error")
        code, msg, details = document.get("code"), document.get("msg", ""), document.get("details", "")
    except CniError:
        code, msg, details = None, "", ""
    if isinstance(code, int) and isinstance(msg, str) and isinstance(details, str):
        return CniError(code, msg, details)
    ended = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    return CniError(Code.INTERNAL, f"plugin {executable} ended {verb} with {ended} and no error object")
