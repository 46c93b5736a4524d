"""A network's plugins, called as a CNI runtime does it. Where one is our launcher, a warm worker is asked straight away
(`libnetwork.handoff`); any other is executed.

ADD runs the plugins in order, each with the result of the one before; a failed one is followed by DEL of all, in
reverse. DEL goes on after a failure, so that one plugin's trouble leaks nothing of the others.

Source: CNI specification 1.1.0, sections 2 and 3.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import msgspec

from cni.wire import Response
from libnetwork import handoff
from libnetwork.errors import DriverError, PluginError

VERSION = "1.0.0"
Plugin = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chain:
    """A network configuration list and where its executables are.

    Attributes:
        name: the network's.
        plugins: each as in a `.conflist`.
        path: directories of executables.
        timeout_s: of one execution.
    """

    name: str
    plugins: tuple[Plugin, ...]
    path: tuple[str, ...]
    version: str = VERSION
    timeout_s: float = 60.0

    def add(
        self,
        container_id: str,
        netns: str,
        ifname: str,
        runtime: Mapping[str, Any],
        previous: Any = None,
        args: str = "",
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Attach; the last plugin's result.

        Args:
            container_id: CNI_CONTAINERID.
            netns: path of the namespace.
            ifname: the interface in it.
            runtime: values of capabilities, for those plugins that declare them.
            previous: the result of earlier plugins, where these are only chained to them.
            args: CNI_ARGS.
            meanwhile: to be done once the first plugin has made the interface, and beside the second one, which has
                no part in it. May raise DriverError.

        Raises:
            DriverError: with the plugin's words; nothing is left then.
        """
        result: dict[str, Any] = previous or {}
        call = Call("ADD", container_id, netns, ifname, args)
        try:
            for number, plugin in enumerate(self.plugins):
                with self._begun(call, plugin, self._conf(plugin, runtime, result or None)) as begun:
                    if number == 1 and meanwhile is not None:
                        meanwhile()
                    answer = begun.end()
                result = self._result(plugin, answer)
            if len(self.plugins) == 1 and meanwhile is not None:
                meanwhile()
        except DriverError as error:
            for failure in self._delete(replace(call, verb="DEL"), runtime, previous):
                error.add_note(failure)
            raise
        return result

    def _result(self, plugin: Plugin, answer: bytes) -> dict[str, Any]:
        try:
            return msgspec.json.decode(answer, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            shown = answer[:100].decode(errors="replace")
            raise DriverError(
                f"network {self.name}: plugin {plugin.get('type')} (add): wanted a result, found {shown!r}: {error}"
            ) from error

    def delete(
        self, container_id: str, netns: str, ifname: str, runtime: Mapping[str, Any], result: Any, args: str = ""
    ) -> None:
        """Detach. Raises DriverError with the first failure, after all were tried."""
        failures = self._delete(Call("DEL", container_id, netns, ifname, args), runtime, result)
        if failures:
            raise DriverError("; ".join(failures))

    def _delete(self, call: "Call", runtime: Mapping[str, Any], result: Any) -> list[str]:
        failures = []
        for plugin in reversed(self.plugins):
            try:
                with self._begun(call, plugin, self._conf(plugin, runtime, result)) as begun:
                    begun.end()
            except DriverError as error:
                failures.append(str(error))
        return failures

    def gc(self, valid: Sequence[tuple[str, str]]) -> None:
        """Have each plugin remove what belongs to none of the attachments (container id, interface).

        Raises DriverError with the failures, after all were asked.
        """
        failures = []
        attachments = [{"containerID": container_id, "ifname": ifname} for container_id, ifname in valid]
        for plugin in self.plugins:
            conf = {**self._conf(plugin, {}, None), "cniVersion": "1.1.0"}
            conf |= {"cni.dev/valid-attachments": attachments, "cni.dev/attachments": attachments}
            try:
                with self._begun(Call("GC"), plugin, conf) as begun:
                    begun.end()
            except DriverError as error:
                failures.append(str(error))
        if failures:
            raise DriverError("; ".join(failures))

    def _conf(self, plugin: Plugin, runtime: Mapping[str, Any], result: Any) -> dict[str, Any]:
        conf = {**plugin, "name": self.name, "cniVersion": self.version}
        declared = plugin.get("capabilities", {})
        wanted = {key: value for key, value in runtime.items() if declared.get(key)}
        if wanted:
            conf["runtimeConfig"] = wanted
        if result is not None:
            conf["prevResult"] = result
        return conf

    def _begun(self, call: "Call", plugin: Plugin, conf: Mapping[str, Any]) -> "_Begun":
        kind = str(plugin.get("type", ""))
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            **{name: value for name, value in os.environ.items() if name.startswith("NETLOOM_")},
            "CNI_COMMAND": call.verb,
            "CNI_CONTAINERID": call.container_id,
            "CNI_NETNS": call.netns,
            "CNI_IFNAME": call.ifname,
            "CNI_ARGS": call.args,
            "CNI_PATH": os.pathsep.join(self.path),
        }
        what = f"network {self.name}: plugin {kind} ({call.verb.lower()})"
        return _Begun(what, self._executable(kind), environment, msgspec.json.encode(conf), self.timeout_s)

    def _executable(self, kind: str) -> str:
        if kind and "/" not in kind:
            for directory in self.path:
                path = os.path.join(directory, kind)
                if os.access(path, os.X_OK):
                    return path
        raise DriverError(f"network {self.name}: plugin {kind!r} is in none of {', '.join(self.path)}; install it")


@dataclass(frozen=True, slots=True)
class Call:
    """What the plugins are asked."""

    verb: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: str = ""


class _Begun:
    """One plugin's call. A worker of ours begins when this is made; any other plugin runs within `end`."""

    def __init__(
        self, what: str, executable: str, environment: Mapping[str, str], stdin: bytes, timeout_s: float
    ) -> None:
        self._what = what
        self._executable = executable
        self._environment = environment
        self._stdin = stdin
        self._timeout_s = timeout_s
        self._asked: handoff.Asked | None = None
        if handoff.is_launcher(executable):
            self._asked = handoff.ask(os.path.basename(executable), environment, stdin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._asked is not None:
            self._asked.close()

    def end(self) -> bytes:
        """What the plugin printed.

        Raises:
            DriverError: it failed, or there is no telling.
        """
        try:
            done = self._asked.answer() if self._asked is not None else None
            if done is None:
                done = self._executed()
        except (OSError, subprocess.TimeoutExpired, handoff.LostError) as error:
            raise DriverError(f"{self._what}: {error}") from error
        if done.status != 0:
            words, code = _refusal(done)
            raise PluginError(f"{self._what}: {words}", code)
        return done.stdout

    def _executed(self) -> Response:
        done = subprocess.run(
            [self._executable],
            input=self._stdin,
            env=self._environment,
            capture_output=True,
            timeout=self._timeout_s,
            check=False,
        )
        return Response(done.stdout, done.stderr, done.returncode)


def _refusal(done: Response) -> tuple[str, int]:
    """The plugin's words, and its code."""
    try:
        document = json.loads(done.stdout)
        words = ": ".join(str(document[key]) for key in ("msg", "details") if document.get(key))
        code = int(document.get("code", 0))
    except (ValueError, TypeError, AttributeError):
        words, code = "", 0
    return words or f"exit status {done.status}: {done.stderr.decode(errors='replace').strip()[-500:]}", code
