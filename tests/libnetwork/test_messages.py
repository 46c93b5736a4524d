"""Requests as docker.io 20.10 sends them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from libnetwork import messages
from libnetwork.messages import PortBinding

PORTMAP = [
    {"Proto": 6, "IP": "", "Port": 80, "HostIP": "127.0.0.1", "HostPort": 8080, "HostPortEnd": 8080},
    {"Proto": 17, "IP": "", "Port": 9000, "HostIP": "", "HostPort": 0, "HostPortEnd": 0},
]


def decode(kind: type, text: str) -> Any:
    return msgspec.json.decode(text, type=kind)


def test_create_network() -> None:
    found = decode(
        messages.CreateNetwork,
        """{"NetworkID": "n", "Options": {"com.docker.network.enable_ipv6": false,
        "com.docker.network.generic": {"k": "v"}}, "IPv4Data": [{"AddressSpace": "netloom",
        "Gateway": "10.200.0.1/24", "Pool": "10.200.0.0/24", "AuxAddresses": {"router": "10.200.0.9/24"}}],
        "IPv6Data": []}""",
    )
    assert found.network_id == "n"
    assert found.options["com.docker.network.generic"] == {"k": "v"}
    (data,) = found.ipv4_data
    assert (data.pool, data.gateway) == ("10.200.0.0/24", "10.200.0.1/24")
    assert data.aux_addresses == {"router": "10.200.0.9/24"}
    assert found.ipv6_data == ()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (messages.CreateNetwork, '{"NetworkID": "n", "Options": null, "IPv4Data": null, "IPv6Data": null}'),
        (messages.CreateNetwork, '{"NetworkID": "n", "IPv4Data": [{"Pool": "10.0.0.0/8", "AuxAddresses": null}]}'),
        (messages.CreateEndpoint, '{"NetworkID": "n", "EndpointID": "e", "Interface": null, "Options": null}'),
        (messages.Join, '{"NetworkID": "n", "EndpointID": "e", "SandboxKey": "/x", "Options": null}'),
        (messages.ProgramExternal, '{"NetworkID": "n", "EndpointID": "e", "Options": null}'),
        (messages.EndpointRef, '{"NetworkID": "n", "EndpointID": "e"}'),
        (messages.NetworkRef, '{"NetworkID": "n"}'),
        (messages.RequestPool, '{"AddressSpace": "a", "Pool": "", "SubPool": "", "Options": null, "V6": false}'),
        (messages.RequestAddress, '{"PoolID": "p", "Address": "", "Options": null}'),
        (messages.ReleaseAddress, '{"PoolID": "p", "Address": "10.0.0.1"}'),
        (messages.PoolRef, '{"PoolID": "p"}'),
        (messages.Empty, "{}"),
    ],
)
def test_nulls_and_keys_of_newer_dockers(kind: type, text: str) -> None:
    assert decode(kind, text) == decode(kind, f'{text[:-1]}{", " if text != "{}" else ""}"Newer": [1, {{}}]}}')


def test_a_pool_with_everything() -> None:
    text = '{"AddressSpace": "a", "Pool": "10.0.0.0/8", "SubPool": "10.1.0.0/16", "Options": {"a": "1"}, "V6": true}'
    assert decode(messages.RequestPool, text) == messages.RequestPool(
        "a", "10.0.0.0/8", "10.1.0.0/16", {"a": "1"}, True
    )


def test_port_mappings() -> None:
    assert msgspec.convert(PORTMAP, tuple[PortBinding, ...]) == (
        PortBinding(6, 80, "127.0.0.1", 8080, 8080),
        PortBinding(17, 9000),
    )


@pytest.mark.parametrize("text", ["{}", '{"NetworkID": null}', '{"NetworkID": 7}', "[]", "null", '{"NetworkID"'])
def test_what_lacks_an_id_is_none(text: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(messages.NetworkRef, text)
