"""containerd on a host of the tests, with its CRI and with ctr."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.hosts import CNI_BIN, Netns, wait_until
from tests.runtimes import cgroups, images
from tests.runtimes.cri import Cri, CriError
from tests.runtimes.runtime_host import NET_D, RuntimeHost

PAUSE = "docker.io/local/pause:1"
_SOCKET = "/run/containerd/containerd.sock"
# restrict_oom_score_adj, because the machine may lack CAP_SYS_RESOURCE.
# disable_cgroup: the CRI gives every pod a share of the processor, and a hierarchy of version 2 on a machine that also
# has version 1 lacks that controller.
_CONFIG = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
disable_cgroup = %s
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_BIN}"
conf_dir = "{NET_D}"
"""


class Containerd(RuntimeHost):
    """A host where containerd has one image: a web server, `PAUSE`."""

    def __init__(self, launcher: Path, cgroup2: bool = False, liveness_s: float = 3600) -> None:
        super().__init__("containerd", launcher, cgroup2, liveness_s)
        self.cri: Cri
        self._process: subprocess.Popen[str] | None = None
        self._pods = 0
        self._complaint = ""

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.host.path("/etc/containerd/config.toml").write_text(
                _CONFIG % json.dumps(self.cgroup2), encoding="utf-8"
            )
            self.begin()
            for namespace in ("k8s.io", "default"):
                archive = images.docker_archive(images.SERVE, PAUSE)
                self.run(["ctr", "-n", namespace, "image", "import", "-"], input=archive)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._process is not None:
                self.end()
        finally:
            super().__exit__(*error)

    def reboot(self) -> None:
        """As ever; containerd is to be started then."""
        self.cri.close()
        self._process = None
        super().reboot()

    def begin(self) -> None:
        """Starts containerd; returns when its CRI answers."""
        with (self.host.directory / "containerd.log").open("a", encoding="utf-8") as log:
            self._process = self.host.popen(
                ["containerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd="/"
            )
        self.cri = Cri(self.host.path(_SOCKET))
        wait_until(self._answers, "containerd", lambda: f"{self._complaint}\n{self.log()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends containerd. Pods go on."""
        process, self._process = self._process, None
        assert process is not None
        self.cri.close()
        process.send_signal(number)
        process.wait(60)

    def log(self) -> str:
        return (self.host.directory / "containerd.log").read_text(encoding="utf-8", errors="replace")[-6000:]

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        if not self.host.path(_SOCKET).exists():
            return False
        try:
            self.cri.call("Version")
        except CriError as error:
            self._complaint = str(error)
            return False
        return True

    def network(self, name: str, plugins: Sequence[Mapping[str, Any]], version: str = "1.0.0") -> None:
        """Makes this the network of all pods; returns when containerd has read it.

        Written in place: containerd's watch of the directory does not see a file that is moved in.
        """
        self.conflist(name, plugins, version, file="10-pods")
        wanted = json.dumps(list(plugins), sort_keys=True)

        def read() -> bool:
            networks = json.loads(self.cri.call("Status", {"verbose": True})["info"]["cniconfig"])["Networks"] or []
            found = [network["Config"] for network in networks if network["Config"]["Name"] == name]
            return any(
                json.dumps([json.loads(plugin["Source"]) for plugin in config["Plugins"]], sort_keys=True) == wanted
                for config in found
            )

        wait_until(read, f"containerd to have read the network {name}", self.log)

    def config(self, name: str, **more: Any) -> dict[str, Any]:
        """A PodSandboxConfig, as a kubelet fills it in."""
        self._pods += 1
        return {
            "metadata": {"name": name, "uid": f"uid-{self._pods}", "namespace": "ns1", "attempt": 0},
            "hostname": name,
            "log_directory": "",
            "linux": {"cgroup_parent": cgroups.parent()},
            **more,
        }

    def pod(self, name: str, **more: Any) -> str:
        """Runs one; its id."""
        return self.cri.run_pod(self.config(name, **more))

    def remove(self, *pods: str) -> None:
        """As a kubelet does."""
        for pod in pods:
            self.cri.stop_pod(pod)
            self.cri.remove_pod(pod)

    def address(self, pod: str) -> str:
        return str(self.cri.status(pod)["network"]["ip"])

    def state(self, pod: str) -> str:
        """SANDBOX_READY, which is also what an answer without a state means, or SANDBOX_NOTREADY."""
        return str(self.cri.status(pod).get("state", "SANDBOX_READY"))

    def pid(self, pod: str) -> int:
        """Of the pod's own container."""
        info = self.cri.call("PodSandboxStatus", {"pod_sandbox_id": pod, "verbose": True})["info"]["info"]
        return int(json.loads(info)["pid"])

    def netns(self, pod: str) -> Netns:
        """The pod's namespace, as the ADD of its eth0 named it."""
        path = next(one.netns for one in self.requests(pod, "ADD") if one.ifname == "eth0")
        there = Netns(self.host, Path(path).name)
        there.path = path
        return there

    def ctr(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(["ctr", *arguments], **options)

    def ctr_run(self, name: str, *options: str, command: Sequence[str] = images.SERVE, **more: Any) -> Any:
        """`ctr run --cni`: the command itself runs the plugins."""
        return self.ctr("run", *self.ctr_options(name), *options, PAUSE, name, *command, **more)

    def ctr_options(self, name: str) -> list[str]:
        """What all of them have. No share of the processor, for the reason at `_CONFIG`."""
        return ["--cni", "--cgroup", f"{cgroups.parent()}/{name}", *(["--cpu-shares", "0"] if self.cgroup2 else [])]
