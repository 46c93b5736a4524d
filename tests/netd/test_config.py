"""netd's configuration: what is taken, and what every refusal says."""

from __future__ import annotations

import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from kernel.settings import ConfigError
from netd import config
from netd.config import load, parse_arguments
from netd.underlay import Choice
from netd.values import Network, Node, vtep_mac


def write(directory: Path, text: str) -> str:
    file = directory / "netloom.toml"
    file.write_text(text)
    return str(file)


def refusal(directory: Path, text: str) -> str:
    """What is said of the file, without its path."""
    file = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load(file, {}, {})
    message = str(caught.value)
    assert message.startswith(file)
    assert "\n" not in message
    return message.removeprefix(file)


def test_defaults(tmp_path: Path) -> None:
    found = load(write(tmp_path, '[netd]\nnode = "n"\n'), {}, {})
    assert found.socket == "/run/netloom/netd.sock"
    assert found.socket_mode == 0o600
    assert found.choice == Choice()
    assert found.node == Node("n", (), (), vtep_mac("n"))
    assert found.networks == (Network("default", (), "vxlan", 1, 4789, 0, True, False),)
    assert found.peers == ()
    assert found.resync_s == 60


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    """The example in the module's docstring, but for the group, which this machine may not have."""
    assert config.__doc__
    example = "\n".join(line[4:] for line in config.__doc__.splitlines() if line.startswith("    "))
    values = tomllib.loads(example)
    own = {table: keys for table, keys in config._KEYS.items() if table not in ("etcd", "cluster")}  # ipamd's tell all
    assert {table: tuple(values[table]) for table in own} == own
    assert {table: tuple(values[table][0]) for table in config._LISTS} == config._LISTS
    loaded = load(write(tmp_path, example.replace('"netloom"', '"root"')), {}, {})
    assert loaded.choice == Choice("eth0", "eth.*", ip_address("10.0.0.1"), (ip_address("10.0.0.11"),))
    assert [one.name for one in loaded.networks] == ["pods", "default"]
    assert [one.vni for one in loaded.networks] == [7, 1]
    assert loaded.peers == (
        Node("host-2", (ip_address("10.0.0.12"),), (ip_network("10.2.2.0/24"),), "02:00:00:00:00:02"),
    )


def test_the_file_may_name_this_host_as_a_peer_too(tmp_path: Path) -> None:
    text = """
        [netd]
        node = "a"
        subnets = ["10.2.9.0/24"]
        [[peer]]
        name = "a"
        address = "10.0.0.1"
        subnets = "10.2.1.0/24"
        [[peer]]
        name = "b"
        address = ["10.0.0.2", "fd00::2"]
    """
    found = load(write(tmp_path, text), {}, {})
    assert found.node.subnets == (ip_network("10.2.9.0/24"), ip_network("10.2.1.0/24"))
    assert found.choice == Choice(public_ip=(ip_address("10.0.0.1"),))
    assert [one.name for one in found.peers] == ["b"]
    chosen = load(write(tmp_path, text.replace("[netd]", '[netd]\ninterface = "eth7"')), {}, {})
    assert chosen.choice == Choice(interface="eth7"), "what is said of the link goes before"


def test_hyphens_are_taken_and_flags_win(tmp_path: Path) -> None:
    file = write(tmp_path, '[netd]\ninterface-regex = "eth.*"\npublic-ip = "10.0.0.9"\ncan-reach = "10.0.0.1"\n')
    assert load(file, {}, {}).choice == Choice("", "eth.*", ip_address("10.0.0.1"), (ip_address("10.0.0.9"),))
    arguments = parse_arguments(["--public-ip", "10.0.0.8", "--public-ip", "fd00::8", "--backend", "host-gw"])
    found = load(file, arguments.overrides, {})
    assert found.choice.public_ip == (ip_address("10.0.0.8"), ip_address("fd00::8"))
    assert found.networks[0].backend == "host-gw"


def test_one_host_has_one_name(tmp_path: Path) -> None:
    assert load(write(tmp_path, '[ipamd]\nnode = "given"\n'), {}, {}).node.name == "given"
    assert load(write(tmp_path, '[ipamd]\nnode = "given"\n[netd]\nnode = "own"\n'), {}, {}).node.name == "own"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[netd]\nbackend = "vxlam"\n', ":2: netd.backend: found 'vxlam'; wanted one of vxlan, host-gw, direct, none;"),
        ("[netd]\nvni = 0\n", ":2: netd.vni: found 0; wanted a whole number from 1 to 16777215"),
        ("[netd]\nvni = true\n", ":2: netd.vni: found true; wanted a whole number without quotes, this is a boolean"),
        ("[netd]\nport = 65536\n", ":2: netd.port: found 65536; wanted a whole number from 1 to 65535"),
        ("[netd]\nmtu = 1000\n", ":2: netd.mtu: found 1000; wanted 0, or at least 1280, which IPv6 needs"),
        ('[netd]\ncan-reach = "router"\n', ":2: netd.can_reach: found 'router'; wanted an IPv4 or IPv6 address"),
        ('[netd]\npublic_ip = ["10.0.0.1", "10.0.0.2"]\n', ":2: netd.public_ip: found"),
        ('[netd]\ninterface_regex = "("\n', ":2: netd.interface_regex: found '('; wanted a regular expression"),
        ('[netd]\nsubnets = ["10.2.1.5/24"]\n', "10.2.1.5/24 is an address in one; did you mean 10.2.1.0/24?"),
        ('[netd]\nsubnets = ["10.2.1.0"]\n', "did you mean 10.2.1.0/32?"),
        ('[netd]\nsubnets = ["0.0.0.0/0"]\n', "wanted a network that containers may have"),
        ('[netd]\ninterfac = "x"\n', ":2: netd.interfac: there is no such key (its value: 'x'); did you mean"),
        ('[netd]\nname = "x"\n', ":2: netd.name: there is no such key (its value: 'x'); it belongs under [[peer]]"),
        ('[netd]\ncan-reach = "1.1.1.1"\ncan_reach = "1.1.1.1"\n', "it is there twice, once with a hyphen"),
        ('[peer]\nname = "b"\n', ":1: peer: found {'name': 'b'}; wanted tables, each written [[peer]] on a line"),
        ('[[peer]]\naddress = "10.0.0.2"\n', ":1: peer.1: a peer needs a name"),
        ('[[peer]]\nname = "b"\n', ":1: peer.1: b needs an address of the underlay"),
        ('[[peer]]\nname = "b c"\naddress = "10.0.0.2"\n', ":2: peer.1.name: found 'b c'; wanted a node name"),
        (
            '[[peer]]\nname = "b"\naddress = "10.0.0.2"\n[[peer]]\nname = "b"\naddress = "10.0.0.3"\n',
            ":5: peer.2.name: found 'b' twice",
        ),
        (
            '[[peer]]\nname = "b"\naddress = "10.0.0.2"\n[[peer]]\nname = "c"\naddress = "10.0.0.2"\n',
            ":6: peer.2.address: c and b both have 10.0.0.2; correct one",
        ),
        (
            '[[peer]]\nname = "b"\naddress = "10.0.0.2"\nsubnets = "10.2.1.0/24"\n'
            '[[peer]]\nname = "c"\naddress = "10.0.0.3"\nsubnets = "10.2.1.0/24"\n',
            ":8: peer.2.subnets: c and b both have 10.2.1.0/24; correct one",
        ),
        ('[[peer]]\nname = "b"\naddress = "10.0.0.2"\nmac = "01:00:00:00:00:01"\n', ":4: peer.1.mac: found"),
        ('[[network]]\nname = "x"\n', ":1: network.1: a network needs a name and subnets"),
        ('[[network]]\nname = "default"\nsubnets = "10.2.0.0/16"\n', ":1: network: the name default is for subnets"),
        (
            '[[network]]\nname = "x"\nsubnets = "10.2.0.0/16"\n[[network]]\nname = "y"\nsubnets = "10.2.7.0/24"\n',
            ":6: network.2.subnets: 10.2.7.0/24 overlaps a subnet of x",
        ),
        ('[[network]]\nname = "x"\nsubnets = "10.2.0.0/16"\nopen = 1\n', ":4: network.1.open: found 1"),
        (
            '[[network]]\nname = "x"\nsubnets = "10.2.0.0/16"\nport = 9999\n',
            "default and x share vni 1, but not port and checksums; give one of them another vni",
        ),
    ],
)  # fmt: skip
def test_refusals_name_line_key_value_and_remedy(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_who_may_reach_a_network(tmp_path: Path) -> None:
    for words, wanted in (("", False), ("open = false\n", False), ("open = true\n", True)):
        file = write(tmp_path, f'[[network]]\nname = "x"\nsubnets = "10.2.0.0/16"\n{words}')
        assert [one.open for one in load(file, {}, {}).networks] == [wanted, False]


def test_a_flag_is_named_where_it_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--backend: found 'x'; wanted one of"):
        load(write(tmp_path, ""), parse_arguments(["--backend", "x"]).overrides, {})


def test_ipamd_leaves_our_tables_alone_and_we_its(tmp_path: Path) -> None:
    from ipamd.config import load as load_ipamd  # noqa: PLC0415 - of this test alone

    file = write(
        tmp_path,
        '[ipamd]\nnode = "a"\n[store]\nkind = "memory"\n[netd]\nvni = 3\n[[peer]]\nname = "b"\naddress = "10.0.0.2"\n'
        '[[network]]\nname = "x"\nsubnets = "10.2.0.0/16"\n',
    )
    assert load_ipamd(file, {}, {}).node == "a"
    assert load(file, {}, {}).networks[0].vni == 3
