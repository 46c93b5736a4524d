"""cni.request: environment and configuration, checked."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import versions
from cni.errors import CniError, Code
from cni.request import Attachment, Command, Request, parse
from cni.result import DNS, Interface, IPConfig, Result

ENVIRONMENT = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin:/usr/lib/cni",
}
ATTACHMENT_VERBS = ("ADD", "CHECK", "DEL")
VERBS = (*ATTACHMENT_VERBS, "GC", "STATUS")


def request(
    verb: str = "ADD", *, stdin: bytes | None = None, env: dict[str, str] | None = None, **conf: Any
) -> Request:
    """A request; `env` on top of ENVIRONMENT ("" takes a variable away), `conf` on top of a minimal configuration."""
    environment = {"CNI_COMMAND": verb, **ENVIRONMENT, **(env or {})}
    document = {"cniVersion": "1.1.0", "name": "net", "type": "bridge", **conf}
    if verb == "GC":
        document.setdefault("cni.dev/valid-attachments", [])
    return parse(
        {key: value for key, value in environment.items() if value},
        json.dumps(document).encode() if stdin is None else stdin,
        plugin="bridge",
        supported=versions.SUPPORTED,
        request_id="0123456789abcdef",
        began_ns=1,
    )


def refusal(verb: str = "ADD", **arguments: Any) -> CniError:
    with pytest.raises(CniError) as caught:
        request(verb, **arguments)
    return caught.value


def test_what_a_request_holds() -> None:
    got = request(args={"cni": {}}, env={"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web"})
    assert got.command is Command.ADD
    assert (got.plugin, got.container_id, got.netns, got.ifname) == ("bridge", "c1", "/run/netns/x", "eth0")
    assert got.args == {"IgnoreUnknown": "1", "K8S_POD_NAME": "web"}
    assert got.ignore_unknown
    assert got.path == ("/opt/cni/bin", "/usr/lib/cni")
    assert (got.network, got.cni_version, got.prev_result) == ("net", "1.1.0", None)
    assert json.loads(got.stdin)["name"] == "net"
    assert (got.request_id, got.began_ns) == ("0123456789abcdef", 1)
    with pytest.raises(AttributeError):
        got.netns = ""  # type: ignore[misc]


# --- environment ---


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        ("ADD", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
        ("CHECK", "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH"),
        ("DEL", "CNI_CONTAINERID,CNI_IFNAME,CNI_PATH"),
        ("GC", "CNI_PATH"),
        ("STATUS", "CNI_PATH"),
    ],
)
def test_missing_variables_are_listed_in_the_references_order(verb: str, missing: str) -> None:
    error = refusal(verb, env=dict.fromkeys(ENVIRONMENT, ""))
    assert (error.code, error.msg) == (4, f"required env variables [{missing}] missing")


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_one_missing_variable(variable: str) -> None:
    assert refusal("ADD", env={variable: ""}).msg == f"required env variables [{variable}] missing"


def test_a_malformed_value_is_reported_before_missing_ones() -> None:
    error = refusal(env={"CNI_CONTAINERID": "", "CNI_IFNAME": "a/b"})
    assert error.msg == "interface name contains / or : or whitespace characters"


def test_gc_and_status_do_not_look_at_the_attachment() -> None:
    for verb in ("GC", "STATUS"):
        assert request(verb, env={"CNI_CONTAINERID": "../x", "CNI_IFNAME": "a/b"}).command == verb


@pytest.mark.parametrize("verb", ["add", "Add", "UPDATE", "ADD ", "ADD\n", "\uff21DD"])
def test_unknown_verbs(verb: str) -> None:
    error = refusal(verb)
    assert (error.code, error.msg) == (4, f"unknown CNI_COMMAND: {verb}")


HOSTILE_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    ".hidden",
    "-rf",
    "a/b",
    "a\\b",
    "a;reboot",
    "$(reboot)",
    "`reboot`",
    "a|b",
    "a&b",
    "a b",
    "a\tb",
    "a\n",
    "\na",
    "a\0b",
    "a'b",
    'a"b',
    "a*",
    "a?",
    "a{b}",
    "größe",
    "\u0661\u0662",  # digits to \d, not to us
    "\uff11",
    "\uff41",
    "\u017f",
    "a\u202eb",
    "a\udcff",
    "%n%s",
]


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_container_ids(verb: str, name: str) -> None:
    error = refusal(verb, env={"CNI_CONTAINERID": name})
    assert (error.code, error.msg) == (4, "invalid characters in containerID")
    assert "CNI_CONTAINERID" in error.details
    assert error.details.isascii()
    assert error.details.isprintable()


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a_b-c.d", "a..", "A" * 300, "3f" * 32])
def test_good_container_ids(name: str) -> None:
    assert request(env={"CNI_CONTAINERID": name}).container_id == name


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if name != ".hidden"] + ["eth%d", "eth0:1", "#", "!"])
def test_hostile_interface_names(verb: str, name: str) -> None:
    error = refusal(verb, env={"CNI_IFNAME": name})
    assert error.code == 4
    assert error.msg.startswith("interface name ")
    assert "CNI_IFNAME" in error.details


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 16, "interface name is too long"),
        ("é" * 8, "interface name is too long"),
        (".", "interface name is . or .."),
        ("..", "interface name is . or .."),
        ("a/b", "interface name contains / or : or whitespace characters"),
        ("a:b", "interface name contains / or : or whitespace characters"),
        ("a b", "interface name contains / or : or whitespace characters"),
        ("a\u00a0b", "interface name contains / or : or whitespace characters"),
    ],
)
def test_interface_names_in_the_references_words(name: str, text: str) -> None:
    assert refusal(env={"CNI_IFNAME": name}).msg == text


@pytest.mark.parametrize("name", ["eth0", "a" * 15, "net1.100", "veth-a_b", "eth0@if3", "...", "+x"])
def test_good_interface_names(name: str) -> None:
    assert request(env={"CNI_IFNAME": name}).ifname == name


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if name.isprintable()] + ["a\n", "a\0b", "a\u202eb"])
def test_hostile_network_names(verb: str, name: str) -> None:
    error = refusal(verb, name=name)
    assert (error.code, error.msg) == (7, "invalid characters found in network name")
    assert error.details.isascii()


@pytest.mark.parametrize("verb", VERBS)
def test_network_name_is_needed(verb: str) -> None:
    for name in ("", None):
        error = refusal(verb, name=name)
        assert (error.code, error.msg) == (7, "missing network name")


@pytest.mark.parametrize("name", [5, [], {}, True])
def test_network_name_of_a_wrong_type(name: object) -> None:
    error = refusal(name=name)
    assert error.code == 6
    assert "$.name: expected str" in error.msg


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "\udcff" not in name])
def test_hostile_plugin_types(name: str) -> None:
    conf: dict[str, Any]
    for place, conf in (("$.type", {"type": name}), ("$.ipam.type", {"ipam": {"type": name}})):
        error = refusal(**conf)
        assert error.code == 7
        assert f"{place}: invalid characters found in plugin type" in error.msg


@pytest.mark.parametrize(
    ("conf", "place"),
    [
        ({"type": 5}, "$.type"),
        ({"ipam": []}, "$.ipam"),
        ({"ipam": "x"}, "$.ipam"),
        ({"ipam": {"type": 5}}, "$.ipam.type"),
    ],
)
def test_plugin_types_of_a_wrong_type(conf: dict[str, Any], place: str) -> None:
    error = refusal(**conf)
    assert error.code == 7
    assert f"{place}: expected" in error.msg


def test_ipam_type() -> None:
    assert request(ipam={"type": "host-local"}).ipam_type == "host-local"
    nothing: list[dict[str, Any]] = [{}, {"ipam": None}, {"ipam": {}}, {"ipam": {"type": ""}}]
    for conf in nothing:
        assert request(**conf).ipam_type == ""


def test_empty_elements_of_the_path_are_not_the_working_directory() -> None:
    assert request(env={"CNI_PATH": ":/opt/cni/bin::"}).path == ("/opt/cni/bin",)


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("TRUE", True), ("true", True), ("0", False), ("yes", False)]
)
def test_netns_override(value: str, expected: bool) -> None:
    assert request(env={"CNI_NETNS_OVERRIDE": value}).netns_override is expected


# --- version ---


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_every_verb_at_every_version(verb: str, version: str) -> None:
    since = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}.get(verb, "0.1.0")
    if versions.at_least(version, since):
        assert request(verb, cniVersion=version).cni_version == version
        return
    error = refusal(verb, cniVersion=version)
    assert (error.code, error.msg) == (1, f"config version does not allow {verb}")


@pytest.mark.parametrize("version", ["", None])
def test_no_version_is_0_1_0(version: str | None) -> None:
    assert request(cniVersion=version).cni_version == "0.1.0"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("version", ["0.0.1", "0.5.0", "1.2.0", "99.0.0", "1.1", "1.1.0\n", "x", "1.1.0; reboot"])
def test_unknown_versions_name_theirs_and_ours(verb: str, version: str) -> None:
    error = refusal(verb, cniVersion=version)
    assert (error.code, error.msg) == (1, "incompatible CNI versions")
    assert error.details == (
        f'config is {json.dumps(version)}, plugin supports ["0.1.0" "0.2.0" "0.3.0" "0.3.1" "0.4.0" "1.0.0" "1.1.0"]'
    )


def test_a_version_that_the_plugin_does_not_speak() -> None:
    with pytest.raises(CniError) as caught:
        parse(
            {"CNI_COMMAND": "ADD", **ENVIRONMENT},
            b'{"name": "net", "cniVersion": "0.3.1"}',
            plugin="firewall",
            supported=versions.supported_from("0.4.0"),
            request_id="",
            began_ns=0,
        )
    assert caught.value.details == 'config is "0.3.1", plugin supports ["0.4.0" "1.0.0" "1.1.0"]'


@pytest.mark.parametrize("version", [1, 1.1, [], {}, False])
def test_a_version_of_a_wrong_type_is_code_6(version: object) -> None:
    assert refusal(cniVersion=version).code == 6


# --- CNI_ARGS ---


def test_known_arguments() -> None:
    got = request(env={"CNI_ARGS": "MAC=02:00:00:00:00:01;IP=10.0.0.5"})
    assert got.arguments("MAC", "IP", "GATEWAY") == {"MAC": "02:00:00:00:00:01", "IP": "10.0.0.5"}
    assert request().arguments("MAC") == {}
    # IgnoreUnknown itself is known to all.
    assert request(env={"CNI_ARGS": "IgnoreUnknown=0;MAC=x"}).arguments("MAC") == {"MAC": "x"}


@pytest.mark.parametrize("flag", ["1", "true", "True", "TRUE"])
def test_unknown_arguments_can_be_ignored(flag: str) -> None:
    got = request(env={"CNI_ARGS": f"FOO=BAR;IgnoreUnknown={flag};MAC=x"})
    assert got.arguments("MAC") == {"MAC": "x"}
    assert got.args["FOO"] == "BAR"


@pytest.mark.parametrize("flag", ["", ";IgnoreUnknown=0", ";IgnoreUnknown=false", ";ignoreunknown=1"])
def test_unknown_arguments_are_refused(flag: str) -> None:
    with pytest.raises(CniError) as caught:
        request(env={"CNI_ARGS": f"FOO=BAR;mac=x{flag}"}).arguments("MAC")
    assert caught.value.code == 4
    assert caught.value.msg.startswith('CNI_ARGS: unknown args ["FOO=BAR" "mac=x"')


@pytest.mark.parametrize("pair", ["FOO", "A=B=C", "IgnoreUnknown=maybe", "IgnoreUnknown=", "", "$(reboot)"])
def test_malformed_pairs_are_refused_by_whoever_reads_arguments(pair: str) -> None:
    got = request(env={"CNI_ARGS": f"IgnoreUnknown=1;{pair};MAC=x"})
    with pytest.raises(CniError) as caught:
        got.arguments("MAC")
    assert (caught.value.code, caught.value.msg) == (4, f'invalid CNI_ARGS pair "{pair}"')


def test_del_takes_what_it_can_read() -> None:
    assert request("DEL", env={"CNI_ARGS": "X;FOO=BAR;MAC=x"}).arguments("MAC") == {"MAC": "x"}


def test_of_a_repeated_argument_the_last_counts() -> None:
    assert request(env={"CNI_ARGS": "MAC=a;MAC=b"}).arguments("MAC") == {"MAC": "b"}


# --- precedence ---

RUNTIME: dict[str, Any] = {"runtimeConfig": {"MAC": "02:00:00:00:00:01", "ips": ["10.0.0.1/24"]}}
ARGS: dict[str, Any] = {"args": {"cni": {"mac": "02:00:00:00:00:02", "ips": ["10.0.0.2"]}}}
CNI_ARGS = {"CNI_ARGS": "IgnoreUnknown=1;MAC=02:00:00:00:00:03;IP=10.0.0.3,FD00::3/64"}


@pytest.mark.parametrize(
    ("conf", "env", "mac", "ips"),
    [
        (RUNTIME | ARGS, CNI_ARGS, ("02:00:00:00:00:01", "$.runtimeConfig.mac"), ("10.0.0.1/24",)),
        (ARGS, CNI_ARGS, ("02:00:00:00:00:02", "$.args.cni.mac"), ("10.0.0.2",)),
        ({}, CNI_ARGS, ("02:00:00:00:00:03", "CNI_ARGS: MAC"), ("10.0.0.3", "fd00::3/64")),
        ({}, {}, ("", ""), ()),
        (
            {"runtimeConfig": {"mac": "", "ips": []}, **ARGS},
            {},
            ("02:00:00:00:00:02", "$.args.cni.mac"),
            ("10.0.0.2",),
        ),
    ],
)
def test_precedence(conf: dict[str, Any], env: dict[str, str], mac: tuple[str, str], ips: tuple[str, ...]) -> None:
    got = request(env=env, **conf)
    assert got.mac() == mac
    assert got.ips() == ips


@pytest.mark.parametrize(
    ("conf", "place"),
    [
        ({"runtimeConfig": {"mac": 5, "ips": 5}}, "$.runtimeConfig."),
        ({"runtimeConfig": {"mac": 5, "ips": ["x"]}}, "$.runtimeConfig."),
        ({"runtimeConfig": {"mac": 5, "ips": ["10.0.0.1/64"]}}, "$.runtimeConfig."),
        ({"runtimeConfig": "x"}, "$.runtimeConfig:"),
        ({"args": {"cni": 5}}, "$.args.cni:"),
        ({"args": {"cni": {"mac": [], "ips": {}}}}, "$.args.cni."),
    ],
)
def test_what_was_asked_for_is_checked(conf: dict[str, Any], place: str) -> None:
    got = request(**conf)
    for method in (got.mac, got.ips):
        with pytest.raises(CniError) as caught:
            method()
        assert caught.value.code == 7
        assert place in caught.value.msg


def test_mac_and_ips_refuse_unknown_arguments_unless_told() -> None:
    got = request(env={"CNI_ARGS": "MAC=x;FOO=BAR"}, **RUNTIME)
    with pytest.raises(CniError, match="unknown args"):
        got.mac()
    assert got.mac("FOO")[0] == "02:00:00:00:00:01"
    with pytest.raises(CniError, match="unknown args"):
        got.ips("FOO")


def test_malformed_ip_argument_is_code_4() -> None:
    with pytest.raises(CniError) as caught:
        request(env={"CNI_ARGS": "IP=10.0.0.256"}).ips()
    assert caught.value.code == 4
    assert "CNI_ARGS: IP" in caught.value.msg


def test_capability_and_convention() -> None:
    got = request(runtimeConfig={"Bandwidth": {"IngressRate": 5}}, args={"cni": {"labels": [{"key": "a"}]}})
    assert got.capability("bandwidth", dict[str, int]) == {"ingressRate": 5}
    assert got.capability("portMappings", list[object]) is None
    assert got.convention("labels", list[dict[str, str]]) == [{"key": "a"}]
    with pytest.raises(CniError, match=r"\$\.args\.cni\.labels\[0\]"):
        got.convention("labels", list[int])


# --- prevResult ---

PREVIOUS = Result((Interface("eth0", sandbox="/run/netns/x"),), (IPConfig("10.0.0.5/24", "10.0.0.1", 0),), (), DNS())


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_prev_result_is_read_in_the_configurations_version(verb: str, version: str) -> None:
    document = versions.encode(PREVIOUS, version)
    expected = versions.decode(document, version)
    if verb == "CHECK" and not versions.at_least(version, "0.4.0"):
        return
    assert request(verb, cniVersion=version, prevResult=document).prev_result == expected
    del document["cniVersion"]
    assert request(verb, cniVersion=version, prevResult=document).prev_result == expected


@pytest.mark.parametrize(
    ("config", "result", "allowed"),
    [
        ("1.0.0", "1.1.0", True),
        ("1.1.0", "1.0.0", True),
        ("0.3.0", "0.4.0", True),
        ("0.4.0", "0.3.1", True),
        ("0.1.0", "0.2.0", True),
        ("1.0.0", "0.4.0", False),
        ("0.4.0", "1.0.0", False),
        ("1.1.0", "0.2.0", False),
        ("0.2.0", "0.3.0", False),
    ],
)
def test_prev_result_of_another_version(config: str, result: str, allowed: bool) -> None:
    document = versions.encode(PREVIOUS, result)
    expected = versions.decode(document, result)
    assert request("DEL", cniVersion=config, prevResult=document).prev_result == expected
    if allowed:
        assert request("ADD", cniVersion=config, prevResult=document).prev_result == expected
        return
    error = refusal("ADD", cniVersion=config, prevResult=document)
    assert error.code == 7
    assert "$.prevResult.cniVersion" in error.msg
    assert f'"{result}"' in error.msg
    assert config in error.msg


@pytest.mark.parametrize("verb", ATTACHMENT_VERBS)
def test_no_prev_result(verb: str) -> None:
    assert request(verb).prev_result is None
    assert request(verb, prevResult=None).prev_result is None


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (5, "$.prevResult:"),
        ({"ips": [{"address": "x"}]}, "$.prevResult.ips[0].address"),
        ({"cniVersion": "9.0.0"}, "$.prevResult.cniVersion"),
    ],
)
def test_malformed_prev_result(document: object, place: str) -> None:
    for verb in ("ADD", "CHECK"):
        error = refusal(verb, prevResult=document)
        assert error.code == 7
        assert place in error.msg
    assert request("DEL", prevResult=document).prev_result is None
    assert request("STATUS", prevResult=document).prev_result is None


# --- GC ---

LIST = [{"containerID": "c1", "ifname": "eth0"}, {"containerid": "c2", "ifName": "net1"}]
ATTACHMENTS = (Attachment("c1", "eth0"), Attachment("c2", "net1"))


def gc(**conf: object) -> Request:
    return request("GC", stdin=json.dumps({"name": "net", "cniVersion": "1.1.0", **conf}).encode())


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({"cni.dev/valid-attachments": LIST}, ATTACHMENTS),
        ({"cni.dev/attachments": LIST}, ATTACHMENTS),
        ({"cni.dev/valid-attachments": LIST, "cni.dev/attachments": []}, ATTACHMENTS),
        ({"cni.dev/valid-attachments": None, "cni.dev/attachments": LIST}, ATTACHMENTS),
        ({"cni.dev/valid-attachments": []}, ()),
        ({"cni.dev/valid-attachments": None, "cni.dev/attachments": None}, ()),
    ],
)
def test_valid_attachments(conf: dict[str, object], expected: tuple[Attachment, ...]) -> None:
    assert gc(**conf).valid_attachments == expected


def test_gc_without_a_list_frees_nothing() -> None:
    with pytest.raises(CniError) as caught:
        gc()
    assert caught.value.code == Code.INVALID_CONFIG
    assert "cni.dev/valid-attachments" in caught.value.msg
    assert "nothing was freed" in caught.value.details


@pytest.mark.parametrize(
    "value",
    [
        {},
        "x",
        [None],
        ["c1"],
        [{"containerID": "c1"}],
        [{"ifname": "eth0"}],
        [{"containerID": "", "ifname": "eth0"}],
        [{"containerID": 5, "ifname": "eth0"}],
        [{"containerID": "c1", "ifname": None}],
    ],
)
def test_a_malformed_list_frees_nothing(value: object) -> None:
    with pytest.raises(CniError) as caught:
        gc(**{"cni.dev/valid-attachments": value})
    assert caught.value.code == Code.INVALID_CONFIG
    assert "cni.dev/valid-attachments" in caught.value.msg


def test_other_verbs_need_no_list() -> None:
    assert request("STATUS").valid_attachments == ()


# --- anything ---

words = st.text(max_size=6) | st.sampled_from(["net", "1.1.0", "bridge", "mac", "ips", "cni", "type", "eth0", "c1"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from(
    [
        "cniVersion",
        "type",
        "ipam",
        "dns",
        "runtimeConfig",
        "args",
        "prevResult",
        "cni.dev/valid-attachments",
        "capabilities",
    ]
)


@given(verb=st.sampled_from(VERBS), conf=st.dictionaries(keys, values, max_size=5), args=words)
def test_any_configuration_is_a_request_or_a_cni_error(verb: str, conf: dict[str, Any], args: str) -> None:
    stdin = json.dumps({"name": "net", **conf}).encode("utf-8", "surrogatepass")
    try:
        got = request(verb, stdin=stdin, env={"CNI_ARGS": args})
        got.ips()
        got.mac()
    except CniError as error:
        assert error.code in (1, 4, 6, 7)
