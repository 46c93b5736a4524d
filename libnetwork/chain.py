"""A network's plugins, executed as a CNI runtime does it: the launchers take each call to a warm worker.

ADD runs the plugins in order, each with the result of the one before; a failed one is followed by DEL of all, in
reverse. DEL goes on after a failure, so that one plugin's trouble leaks nothing of the others.

Source: CNI specification 1.1.0, sections 2 and 3.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from libnetwork.errors import DriverError

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
    ) -> dict[str, Any]:
        """Attach; the last plugin's result.

        Args:
            container_id: CNI_CONTAINERID.
            netns: path of the namespace.
            ifname: the interface in it.
            runtime: values of capabilities, for those plugins that declare them.
            previous: the result of earlier plugins, where these are only chained to them.
            args: CNI_ARGS.

        Raises:
            DriverError: with the plugin's words; nothing is left then.
        """
        result: dict[str, Any] = previous or {}
        try:
            for plugin in self.plugins:
                conf = self._conf(plugin, runtime, result or None)
                answer = self._execute("ADD", plugin, conf, container_id, netns, ifname, args)
                result = self._result(plugin, answer)
        except DriverError as error:
            for failure in self._delete(container_id, netns, ifname, runtime, previous, args):
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
        failures = self._delete(container_id, netns, ifname, runtime, result, args)
        if failures:
            raise DriverError("; ".join(failures))

    def _delete(
        self, container_id: str, netns: str, ifname: str, runtime: Mapping[str, Any], result: Any, args: str
    ) -> list[str]:
        failures = []
        for plugin in reversed(self.plugins):
            try:
                conf = self._conf(plugin, runtime, result)
                self._execute("DEL", plugin, conf, container_id, netns, ifname, args)
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
                self._execute("GC", plugin, conf, "", "", "", "")
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

    def _execute(
        self,
        verb: str,
        plugin: Plugin,
        conf: Mapping[str, Any],
        container_id: str,
        netns: str,
        ifname: str,
        args: str,
    ) -> bytes:
        kind = str(plugin.get("type", ""))
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            **{name: value for name, value in os.environ.items() if name.startswith("NETLOOM_")},
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": os.pathsep.join(self.path),
        }
        try:
            done = subprocess.run(
                [self._executable(kind)],
                input=msgspec.json.encode(conf),
                env=environment,
                capture_output=True,
                timeout=self.timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DriverError(f"network {self.name}: plugin {kind} ({verb.lower()}): {error}") from error
        if done.returncode != 0:
            raise DriverError(f"network {self.name}: plugin {kind} ({verb.lower()}): {_words(done)}")
        return done.stdout

    def _executable(self, kind: str) -> str:
        if kind and "/" not in kind:
            for directory in self.path:
                path = os.path.join(directory, kind)
                if os.access(path, os.X_OK):
                    return path
        raise DriverError(f"network {self.name}: plugin {kind!r} is in none of {', '.join(self.path)}; install it")


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    try:
        document = json.loads(done.stdout)
        words = ": ".join(str(document[key]) for key in ("msg", "details") if document.get(key))
    except (ValueError, AttributeError):
        words = ""
    return words or f"exit status {done.returncode}: {done.stderr.decode(errors='replace').strip()[-500:]}"
