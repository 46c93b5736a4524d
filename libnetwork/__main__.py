"""The shim: `python -m libnetwork`. It listens where Docker looks for plugins, and serves both of its protocols."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ipamd.client import Client
from ipamd.errors import StartError
from ipamd.listen import SocketPlace
from kernel import paths, settings
from kernel.errors import KernelError
from kernel.session import Session
from libnetwork import authorization, conflist, docker, http, messages, reconcile, sticky
from libnetwork.errors import DriverError
from libnetwork.ipam_driver import DEFAULT_POOLS, IpamDriver
from libnetwork.network_driver import NetworkDriver
from libnetwork.sharing import DRIVER, Sharing
from libnetwork.staging import Staging
from libnetwork.state import Endpoint, State
from telemetry import log

SOCKET = "/run/docker/plugins/netloom.sock"
CNI_PATH = "/opt/cni/bin:/usr/lib/cni"
_THREADS = 32
_LISTEN_FDS_START = 3
_SWITCH_S = 0.0005
_IMMEDIATE = frozenset(
    (
        "NetworkDriver.GetCapabilities",
        "NetworkDriver.EndpointOperInfo",
        "NetworkDriver.Leave",
        "IpamDriver.GetCapabilities",
        "IpamDriver.GetDefaultAddressSpaces",
    )
)

_logger = logging.getLogger("netloom-docker")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM or SIGINT; 0 after a clean stop, 1 where it could not start."""
    parser = argparse.ArgumentParser(prog="netloom-docker", description="Docker's network and IPAM plugin of Netloom.")
    parser.add_argument("--socket", default=SOCKET, help=f"default: {SOCKET}")
    parser.add_argument("--cni-path", default=CNI_PATH, help=f"where the plugins are; default: {CNI_PATH}")
    parser.add_argument("--conf-dir", default=conflist.CONF_DIR, help=f"for -o conflist; default: {conflist.CONF_DIR}")
    parser.add_argument(
        "--default-pool",
        action="append",
        metavar="CIDR[,LENGTH]",
        help="of these, a network without --subnet gets the first that is free; with LENGTH, a part of CIDR with this "
        "prefix length; may be repeated; default: 172.17.0.0/16 to 172.31.0.0/16, then 192.168.0.0/16,20",
    )
    parser.add_argument("--docker", default=docker.SOCKET, help=f"Docker's own socket; default: {docker.SOCKET}")
    parser.add_argument(
        "--interval",
        type=float,
        default=reconcile.INTERVAL_S,
        metavar="SECONDS",
        help=f"between comparisons with what Docker has; default: {reconcile.INTERVAL_S:g}",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=reconcile.GRACE_S,
        metavar="SECONDS",
        help=f"how long Docker must not have a thing before it is removed; default: {reconcile.GRACE_S:g}",
    )
    parser.add_argument(
        "--sticky-overlays",
        action="store_true",
        help="addresses follow containers' names also in overlay networks that were made without -o sticky",
    )
    parser.add_argument("--log-level", choices=log.LEVELS, default="info", help="default: info")
    parser.add_argument("--log-format", choices=log.FORMATS, default="text", help="default: text")
    arguments = parser.parse_args(argv)
    log.setup(arguments.log_level, arguments.log_format)
    # What goes on after an answer must not keep another one waiting: by default a thread has the interpreter for 5 ms.
    sys.setswitchinterval(_SWITCH_S)
    try:
        asyncio.run(_run(arguments))
    except (StartError, DriverError, paths.PathError, KernelError, OSError) as error:
        log.event(_logger, "error", "netloom-docker cannot start", error=str(error))
        return 1
    return 0


async def _run(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    state = State(os.path.join(paths.state_dir(os.environ), "docker"))
    staging = Staging(paths.run_dir(os.environ))
    staging.recover({endpoint.staging for endpoint in state.all(Endpoint)})
    own = _ThreadsOwn(settings.ipamd_socket(os.environ))

    def await_releases() -> None:
        ipam.await_releases()  # which is made last

    sharing = Sharing(state, own.client, arguments.docker, await_releases)
    flights = sticky.Flights(state, arguments.docker, arguments.sticky_overlays)
    judge = authorization.Authorization(sharing, flights, own.client, arguments.docker)
    path = tuple(arguments.cni_path.split(os.pathsep))
    network = NetworkDriver(state, staging, own.session, path, arguments.conf_dir, sharing, flights)
    pools = arguments.default_pool or DEFAULT_POOLS
    ipam = IpamDriver(state, own.client, own.session, pools, network.settle_address, flights.who, flights.given)
    with contextlib.suppress(DriverError):  # ipamd may start after us
        await asyncio.to_thread(ipam.recover)

    def look() -> docker.Truth:
        found = docker.look(arguments.docker, DRIVER)
        flights.tell()
        return found

    reconciler = reconcile.Reconciler(look, network, ipam, arguments.interval, arguments.grace)
    with ThreadPoolExecutor(_THREADS, "netloom-call") as executor, contextlib.ExitStack() as stack:
        stack.callback(state.close)
        stack.callback(ipam.close)
        stack.callback(network.close)
        stack.callback(judge.close)
        stack.callback(flights.close)
        runner = web.AppRunner(
            http.application(_calls(network, ipam, reconciler, sharing, flights), executor, _IMMEDIATE, judge.routes()),
            access_log=None,
            shutdown_timeout=30,
        )
        await runner.setup()
        inherited = _inherited()
        if inherited is not None:
            await web.SockSite(runner, inherited).start()
        else:
            place = stack.enter_context(SocketPlace(arguments.socket, "netloom-docker"))
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(place.address)
            await web.SockSite(runner, listening).start()
            place.publish(0o600, None, None)
        network.end()
        reconciler.start()
        sharing.start()
        log.event(_logger, "info", "serving Docker", socket=arguments.socket)
        await stop.wait()
        await asyncio.to_thread(sharing.stop)
        await asyncio.to_thread(reconciler.stop)
        await runner.cleanup()


def _calls(
    network: NetworkDriver,
    ipam: IpamDriver,
    reconciler: reconcile.Reconciler,
    sharing: Sharing,
    flights: sticky.Flights,
) -> dict[str, http.Handler]:
    def activate(_: messages.Empty) -> dict[str, Any]:
        ipam.activate()
        flights.activate()
        sharing.wake()
        # The last one is of no effect but where dockerd was told to ask (libnetwork.authorization).
        return {"Implements": ["NetworkDriver", "IpamDriver", authorization.IMPLEMENTS]}

    def ignore(_: messages.Empty) -> dict[str, Any]:
        return {}

    return {
        "Plugin.Activate": activate,
        "NetworkDriver.GetCapabilities": network.capabilities,
        "NetworkDriver.CreateNetwork": network.create_network,
        "NetworkDriver.DeleteNetwork": network.delete_network,
        "NetworkDriver.CreateEndpoint": network.create_endpoint,
        "NetworkDriver.DeleteEndpoint": network.delete_endpoint,
        "NetworkDriver.EndpointOperInfo": network.operational_info,
        "NetworkDriver.Join": network.join,
        "NetworkDriver.Leave": network.leave,
        "NetworkDriver.ProgramExternalConnectivity": network.program,
        "NetworkDriver.RevokeExternalConnectivity": network.revoke,
        "NetworkDriver.DiscoverNew": ignore,
        "NetworkDriver.DiscoverDelete": ignore,
        "IpamDriver.GetCapabilities": ipam.capabilities,
        "IpamDriver.GetDefaultAddressSpaces": ipam.address_spaces,
        "IpamDriver.RequestPool": ipam.request_pool,
        "IpamDriver.ReleasePool": ipam.release_pool,
        "IpamDriver.RequestAddress": ipam.request_address,
        "IpamDriver.ReleaseAddress": ipam.release_address,
        "Netloom.Collect": reconciler.collect,
    }


class _ThreadsOwn:
    """What each thread of the executor has for itself: neither may be shared."""

    def __init__(self, ipamd_socket: str) -> None:
        self._local = threading.local()
        self._socket = ipamd_socket

    def session(self) -> Session:
        """The thread's door to the kernel."""
        if not hasattr(self._local, "session"):
            self._local.session = Session()
        found: Session = self._local.session
        return found

    def client(self) -> Client:
        """The thread's connection to ipamd."""
        if not hasattr(self._local, "client"):
            self._local.client = Client(self._socket)
        found: Client = self._local.client
        return found


def _inherited() -> socket.socket | None:
    """The socket that systemd listens on for us (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    return socket.socket(fileno=_LISTEN_FDS_START)


if __name__ == "__main__":
    sys.exit(main())
