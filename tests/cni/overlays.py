"""What tests of overlay networks need on one host: an ipamd that knows such networks without a cluster, and somebody
who does netd's part.

The addresses are a real ipamd's. A relay in front of it says of a network that it is an overlay, and keeps what SetMac
was asked; everything else it passes on as it is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, cast

import grpc

from ipamd.client import Client
from protos.ipam.v1 import ipam_pb2 as pb
from tests.cni.lab import Lab
from tests.hosts import IPV6, Host, wait_until

SOCKET = "/run/netloom/relay.sock"
FABRIC = "/run/netloom/fabric.json"
MTU = 1450


@dataclass(frozen=True)
class Overlay:
    """An overlay network as ipamd is to know it."""

    name: str
    vni: int
    all_subnets: tuple[str, ...]
    internal: bool = False
    no_masquerade: bool = False

    @property
    def subnets(self) -> list[str]:
        return [subnet for subnet in self.all_subnets if IPV6 or ":" not in subnet]

    @property
    def gateways(self) -> list[str]:
        return [f"{ip_network(subnet)[1]}/{ip_network(subnet).prefixlen}" for subnet in self.subnets]

    @property
    def bridge(self) -> str:
        return f"nl-{self.name}"

    @property
    def device(self) -> str:
        return f"nl-vx{self.vni}"


def mac_of(address: str) -> str:
    """Written out once more, so that it is not what the code under test says: of an IPv4 address."""
    return "02:42:" + ":".join(f"{byte:02x}" for byte in ip_address(address.partition("/")[0]).packed)


class Relay(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """In front of ipamd, at `SOCKET` of the host."""

    def __init__(self, target: str) -> None:
        self.overlays: dict[str, Overlay] = {}
        self.macs: list[tuple[str, str, str]] = []  # pool, address, MAC: as SetMac was asked
        self.asked: list[str] = []  # methods, in order
        self.refuse_macs = ""
        self._channel = grpc.insecure_channel(f"unix:{target}")

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = details.method
        name = method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.asked.append(name)
            if name == "SetMac":
                return self._set_mac(pb.SetMacRequest.FromString(request), context)
            try:
                found = self._passed_on(method, request)
            except grpc.RpcError as error:
                context.set_trailing_metadata((("x-answered-by", "ipamd"),))
                call = cast("grpc.Call", error)  # what a call raises is a call too; the stubs do not know
                context.abort(call.code(), call.details() or "")
            return self._as_overlay(found) if name == "GetNetwork" else found

        return grpc.unary_unary_rpc_method_handler(answer)

    def _passed_on(self, method: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        found: bytes = call(request, timeout=30)
        return found

    def _set_mac(self, request: pb.SetMacRequest, context: grpc.ServicerContext) -> bytes:
        if self.refuse_macs:
            context.set_trailing_metadata((("x-answered-by", "ipamd"),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuse_macs)
        self.macs.append((request.pool, request.address, request.mac))
        return pb.SetMacResponse().SerializeToString()

    def _as_overlay(self, answer: bytes) -> bytes:
        network = pb.Network.FromString(answer)
        known = self.overlays.get(network.name)
        if known is not None:
            network.type, network.vni, network.internal = "overlay", known.vni, known.internal
            network.gateways.extend(known.gateways)
        return network.SerializeToString()

    def close(self) -> None:
        self._channel.close()


@contextlib.contextmanager
def relaying(lab: Lab, *overlays: Overlay) -> Iterator[Relay]:
    """The overlays exist for the duration of the block; nobody may use them at its end."""
    target = str(lab.host.path(lab.ipamd.socket))
    relay = Relay(target)
    server = grpc.server(ThreadPoolExecutor(4), handlers=[relay])
    server.add_insecure_port(f"unix:{lab.host.path(SOCKET)}")
    server.start()
    try:
        with Client(target, timeout_s=30) as client:
            for one in overlays:
                network = pb.Network(name=one.name, subnets=one.subnets, no_masquerade=one.no_masquerade)
                client.create_network(pb.CreateNetworkRequest(network=network))
                relay.overlays[one.name] = one
            yield relay
            for one in overlays:
                client.delete_network(one.name)
    finally:
        server.stop(None).wait()
        relay.close()


def conf_of(network: Overlay | str, version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
    name = network if isinstance(network, str) else network.name
    return {"cniVersion": version, "name": name, "type": "netloom", "socket": SOCKET, **keys}


def static(*addresses: str | tuple[str, str], **more: Any) -> dict[str, Any]:
    """An `ipam` object; each an address with its length, or that and a gateway."""
    pairs = [(one, "") if isinstance(one, str) else one for one in addresses]
    written = [{"address": address, **({"gateway": gateway} if gateway else {})} for address, gateway in pairs]
    return {"ipam": {"type": "static", "addresses": written, **more}}


@dataclass
class FakeNetd:
    """Does as netd does: writes fabric.json, puts each network's device into its bridge as soon as that is there, and
    brings it up."""

    host: Host
    overlays: tuple[Overlay, ...]
    extra: Mapping[str, str] = field(default_factory=dict)  # options of the devices: "local"

    def __enter__(self) -> FakeNetd:
        write_fabric(self.host, {one.name: {"mtu": MTU} for one in self.overlays})
        for one in self.overlays:
            make_device(self.host, one, **self.extra)
        # One that tells of each link that comes, for as long as the block runs.
        self._monitor = self.host.popen(
            ["ip", "-o", "monitor", "link"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        wait_until(self._is_heard, "who listens for links")
        return self

    def _is_heard(self) -> bool:
        self.host.run(["ip", "link", "add", "heard", "type", "bridge"])
        self.host.run(["ip", "link", "delete", "heard"])
        return self._listens.wait(0.2)

    def _watch(self) -> None:
        done: set[str] = set()
        assert self._monitor.stdout is not None
        for line in self._monitor.stdout:
            self._listens.set()
            for one in self.overlays:
                if f": {one.bridge}:" in line and "Deleted" not in line and one.bridge not in done:
                    done.add(one.bridge)
                    for words in (["master", one.bridge], ["up"]):
                        self.host.run(["ip", "link", "set", one.device, *words], check=False)
                elif f": {one.bridge}:" in line and line.startswith("Deleted"):
                    done.discard(one.bridge)

    def __exit__(self, *_: object) -> None:
        self._monitor.kill()
        self._monitor.wait()
        self._thread.join()
        assert self._monitor.stdout is not None
        self._monitor.stdout.close()
        for one in self.overlays:
            self.host.run(["ip", "link", "delete", one.device], check=False)
        self.host.path(FABRIC).unlink(missing_ok=True)


def write_fabric(host: Host, networks: Mapping[str, Mapping[str, object]]) -> None:
    host.path(FABRIC).write_text(json.dumps({"node": "here", "networks": networks}), encoding="ascii")


def make_device(host: Host, one: Overlay, alias: str = "netloom netd", **options: str) -> None:
    """A VXLAN device as netd's, down."""
    words = [word for pair in options.items() for word in pair]
    vxlan = ["type", "vxlan", "id", str(one.vni), "dstport", "4789", "nolearning", *words]
    host.run(["ip", "link", "add", one.device, "mtu", str(MTU), *vxlan])
    if alias:
        host.run(["ip", "link", "set", one.device, "alias", alias])
