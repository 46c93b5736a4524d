"""Endpoints of a network, made and ended as dockerd does it, without containers.

endpoints.py make NETWORK POOL COUNT prints their addresses; endpoints.py end NETWORK POOL ADDRESSES takes them. Runs on
the host whose shim is asked, by itself: nothing of ours is imported. Several calls are under way at a time.
"""

import http.client
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_SOCKET = "/run/docker/plugins/netloom.sock"
_AT_ONCE = 4


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """One POST. Raises RuntimeError with what was refused."""
    connection = http.client.HTTPConnection("plugin", timeout=120)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.connect(_SOCKET)
        connection.request("POST", f"/{name}", body=json.dumps(arguments))
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    if answer.get("Err"):
        raise RuntimeError(f"{name}: {answer['Err']}")
    return answer


def make(network: str, pool: str, number: int) -> str:
    """Its address."""
    address = str(call("IpamDriver.RequestAddress", PoolID=pool, Address="", Options=None)["Address"])
    ids = {"NetworkID": network, "EndpointID": identity(number)}
    interface = {"Address": address, "AddressIPv6": "", "MacAddress": ""}
    call("NetworkDriver.CreateEndpoint", **ids, Interface=interface, Options={})
    call("NetworkDriver.Join", **ids, SandboxKey="/run/docker/netns/none", Options={})
    return address.partition("/")[0]


def end(network: str, pool: str, number: int, address: str) -> None:
    ids = {"NetworkID": network, "EndpointID": identity(number)}
    call("NetworkDriver.Leave", **ids)
    call("NetworkDriver.DeleteEndpoint", **ids)
    call("IpamDriver.ReleaseAddress", PoolID=pool, Address=address)


def identity(number: int) -> str:
    """64 digits; the first twelve of them are in the interface's name."""
    return f"{number:012x}".ljust(64, "0")


def main(verb: str, network: str, pool: str, *rest: str) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        if verb == "make":
            print(json.dumps(list(executor.map(lambda number: make(network, pool, number), range(int(rest[0]))))))
        else:
            addresses = enumerate(json.loads(rest[0]))
            list(executor.map(lambda one: end(network, pool, *one), addresses))


if __name__ == "__main__":
    main(*sys.argv[1:])
