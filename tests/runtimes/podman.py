"""podman with its CNI backend on a host of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.hosts import CNI_BIN, Netns
from tests.runtimes import cgroups, images
from tests.runtimes.runtime_host import NET_D, RuntimeHost

# The ulimits are there because the machine may lack CAP_SYS_RESOURCE; no limit of processes, because a hierarchy of
# version 2 on a machine that also has version 1 lacks that controller.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
pids_limit = 0

[network]
network_backend = "cni"
cni_plugin_dirs = {plugins}
network_config_dir = "{net_d}"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
# conmon has podman clean up behind a container: those requests know the same cold way.
conmon_env_vars = [{environment}]
"""


class Podman(RuntimeHost):
    """A host where podman has one image, `images.NAME`."""

    def __init__(self, launcher: Path, cgroup2: bool = False) -> None:
        super().__init__("podman", launcher, cgroup2)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.use_plugins(CNI_BIN)
            policy = '{"default": [{"type": "insecureAcceptAnything"}]}'
            self.host.path("/etc/containers/policy.json").write_text(policy, encoding="utf-8")
            self.podman("import", "-", images.NAME, input=images.root_tar())
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def use_plugins(self, *directories: str) -> None:
        """Where podman looks for plugins, from its next command on."""
        environment = ", ".join(json.dumps(f"{name}={value}") for name, value in self.environment.items())
        conf = CONTAINERS_CONF.format(plugins=json.dumps(directories), net_d=NET_D, environment=environment)
        self.host.path("/etc/containers/containers.conf").write_text(conf, encoding="utf-8")

    def podman(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(["podman", *arguments], **options)

    def start(self, name: str, *options: str, command: Sequence[str] = images.SERVE) -> str:
        """`podman run -d`; the container's id."""
        where = ["--cgroup-parent", cgroups.parent(), "--hostname", name, "--name", name]
        return self.podman("run", "-d", *where, *options, images.NAME, *command).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found = json.loads(self.podman("inspect", name).stdout)[0]
        assert isinstance(found, dict)
        return found

    def address(self, name: str, network: str) -> str:
        """As podman tells it."""
        return str(self.inspect(name)["NetworkSettings"]["Networks"][network]["IPAddress"])

    def netns(self, name: str) -> Netns:
        """The container's namespace."""
        there = Netns(self.host, name)
        there.path = self.inspect(name)["NetworkSettings"]["SandboxKey"]
        return there
