"""The documents are true where a program can tell: links, pointers into the code, keys, codes, options, examples.

Each test compares a document with the code in both directions where that makes sense: what the code has must be
written down, and what is written down must be there.
"""

import ast
import enum
import json
import re
import tomllib
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import click
import msgspec
import pytest

import libnetwork.__main__
from cli.app import netloom
from cli.failure import Status
from cni import registry, versions
from cni.chained import bandwidth, firewall, portmap, tuning
from cni.config import convert
from cni.errors import Code
from cni.interface import bridge, flannel, macvlan, ptp
from cni.interface import netloom as netloom_plugin
from cni.ipam import host_local, ipamd, ranges, routing, static
from cni.request import parse
from ipamd import config, errors
from libnetwork import options, reconcile
from telemetry.metrics import ClusterSample, IpamdMetrics

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_POINTER = re.compile(r"([\w./-]+\.py):([A-Za-z_][\w.]*)")
_ROOMS = "build|cli|cni|demo|docs|ipamd|kernel|protos|telemetry|tests|warm|bench"
_PATH = re.compile(rf"(?:{_ROOMS})/[\w./-]*|[\w-]+\.(?:md|toml)")
_PLANNED = frozenset({"cni/chained/"})  # named as where something is to go


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _prose(name: str) -> str:
    """Without code blocks."""
    return _FENCE.sub("", _text(name))


def _blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(_text(name)) if kind == language]


def _section(name: str, title: str) -> str:
    """What stands below a heading, up to the next one."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", _prose(name), re.MULTILINE | re.DOTALL)
    assert match, f"{name} has no heading {title!r}"
    return match[2]


def _rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, without heads and rules."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rules = [number for number, row in enumerate(rows) if all(set(cell) <= set("-: ") for cell in row)]
    return [row for number, row in enumerate(rows) if number not in rules and number + 1 not in rules]


def _first_code(cell: str) -> str:
    match = _CODE.search(cell)
    return match[1] if match else ""


# Links and pointers


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/errors.md"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in _LINK.findall(_prose(name)):
        assert "://" not in target, f"{name} leads out of the repository: {target}"
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_slug, headings), f"{name} links to {target}: there is no such heading"


def _names_of(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _names_of(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


@pytest.mark.parametrize("name", NAMES)
def test_pointers_into_the_code_exist(name: str) -> None:
    for span in _CODE.findall(_prose(name)):
        match = _POINTER.fullmatch(span)
        if match is None:
            continue
        path = ROOT / match[1]
        assert path.is_file(), f"{name} points to {span}: there is no such file"
        known = set(_names_of(ast.parse(path.read_text(encoding="utf-8")).body))
        assert match[2] in known, f"{name} points to {span}: the file has no such name"


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_repository_exist(name: str) -> None:
    for span in _CODE.findall(_prose(name)):
        file = span.partition(":")[0]
        if _PATH.fullmatch(file) and file not in _PLANNED and not file.endswith("netloom.toml"):
            beside = (ROOT / name).parent / file
            assert (ROOT / file).exists() or beside.exists(), f"{name} names {file}, which is not there"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", _text("Makefile"), re.MULTILINE))
    targets |= {
        f"test-{group}" for group in re.findall(r"^GROUPS := (.*)$", _text("Makefile"), re.MULTILINE)[0].split()
    }
    for name in NAMES:
        code = [*_CODE.findall(_prose(name)), *(body for _, body in _FENCE.findall(_text(name)))]
        for used in re.findall(r"^make ([a-z][a-z-]*)", "\n".join(code), re.MULTILINE):
            assert used in targets, f"{name} names make {used}"


# The protocol


def test_every_cni_code_is_documented() -> None:
    rows = _rows(_section("docs/errors.md", "CNI error codes"))
    documented = {int(row[0]): row[1] for row in rows}
    assert documented == {code.value: code.name for code in Code}


def test_the_translation_of_ipamds_refusals_is_documented() -> None:
    import grpc  # noqa: PLC0415 - only this test needs it

    from cni.request import Request  # noqa: PLC0415
    from ipamd.client import IpamError  # noqa: PLC0415

    request = msgspec.convert({**_REQUEST, "command": "ADD"}, Request)
    documented: dict[str, int] = {}
    for cell, code, *_ in _rows(_section("docs/errors.md", "How ipamd's refusals become CNI codes")):
        number = int(re.findall(r"\d+", code)[0])
        documented |= dict.fromkeys(cell.split(", "), number)
    other = documented.pop("any other")
    for status in grpc.StatusCode:
        if status is not grpc.StatusCode.OK:
            wanted = ipamd._error(request, IpamError(status, "no")).code
            assert wanted == documented.get(status.name, other), status


_REQUEST: dict[str, object] = {
    "plugin": "bridge",
    "container_id": "c1",
    "netns": "",
    "ifname": "eth0",
    "args": {},
    "ignore_unknown": False,
    "malformed_args": [],
    "path": [],
    "config": {},
    "stdin": b"",
    "network": "web",
    "cni_version": "1.1.0",
    "prev_result": None,
    "valid_attachments": [],
    "environment": {},
    "request_id": "0" * 16,
    "began_ns": 0,
}


def test_every_version_and_verb_is_documented() -> None:
    documented = re.findall(
        r"\d+\.\d+\.\d+", ",".join(row[0] for row in _rows(_section("docs/protocol.md", "Versions")))
    )
    assert sorted(documented) == sorted(versions.SUPPORTED)
    verbs = {row[0] for row in _rows(_section("docs/protocol.md", "Verbs"))}
    assert verbs == {"ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"}


# The plugins


def _keys(kind: type[msgspec.Struct]) -> dict[str, object]:
    """A configuration's keys as they are written, with their defaults."""
    keys: dict[str, object] = {}
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            keys[field.encode_name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            keys[field.encode_name] = field.default_factory()
        else:
            keys[field.encode_name] = "required"
    return keys


def _documented_default(cell: str) -> object:
    return "required" if cell == "required" else json.loads(_first_code(cell))


def _as_json(value: object) -> object:
    """As a person would write it; an object without content for a struct of defaults."""
    if isinstance(value, msgspec.Struct):
        return {}
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("title", "kind", "number"),
    [
        ("Keys of bridge", bridge.BridgeConf, 0),
        ("Keys of ptp", ptp.PtpConf, 0),
        ("Keys of macvlan", macvlan.MacvlanConf, 0),
        ("Keys of netloom", netloom_plugin.NetloomConf, 0),
        ("Keys of flannel", flannel.FlannelConf, 0),
        ("Keys of firewall", firewall.FirewallConf, 0),
        ("Keys of portmap", portmap.PortmapConf, 0),
        ("Keys of portmap", portmap.Mapping, 1),
        ("Keys of tuning", tuning.TuningConf, 0),
        ("Keys of bandwidth", bandwidth.BandwidthConf, 0),
        ("Keys of ipamd", ipamd.IpamConf, 0),
        ("Keys of ipamd", ranges.RangeConf, 1),
        ("Keys of ipamd", routing.RouteConf, 2),
        ("Keys of host-local", host_local.HostLocalConf, 0),
        ("Keys of static", static.StaticConf, 0),
    ],
)
def test_every_key_of_a_plugin_is_documented_with_its_default(
    title: str, kind: type[msgspec.Struct], number: int
) -> None:
    tables = re.split(r"\n\n(?!\|)", _section("docs/plugins.md", title))
    rows = [_rows(table) for table in tables if _rows(table)][number]
    documented = {_first_code(row[0]): _documented_default(row[2]) for row in rows}
    assert documented == {key: _as_json(default) for key, default in _keys(kind).items()}


def test_every_plugin_has_a_chapter() -> None:
    chapters = re.findall(r"^## (.*)$", _prose("docs/plugins.md"), re.MULTILINE)
    assert set(registry.PLUGINS) <= set(chapters)


# ipamd


def test_every_key_of_the_configuration_is_documented() -> None:
    documented = {
        _first_code(row[0]) for row in _rows(_section("docs/ipamd.md", "Configuration")) if "." in row[0].split("`")[1]
    }
    assert documented == {f"{table}.{key}" for table, keys in config._KEYS.items() for key in keys}


def test_the_documented_defaults_are_the_ones_that_hold(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    loaded = config.load(str(empty), {"node": "n"}, {})
    held = {
        "ipamd.socket_mode": f"{loaded.socket_mode:04o}",
        "store.kind": loaded.store_kind,
        "store.path": loaded.store_path,
        "pools.cooldown_s": f"{loaded.cooldown_s:g}",
        "reclaim.interval_s": f"{loaded.reclaim_interval_s:g}",
        "reclaim.grace_s": f"{loaded.reclaim_grace_s:g}",
        "log.level": loaded.log_level,
        "log.format": loaded.log_format,
        "ipamd.http_allow_remote": str(loaded.http_allow_remote).lower(),
    }
    rows = {_first_code(row[0]): row[1] for row in _rows(_section("docs/ipamd.md", "Configuration"))}
    assert {key: _first_code(rows[key]).strip('"') for key in held} == held
    assert loaded.socket in rows["ipamd.socket"]


def test_every_flag_of_ipamd_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    documented = {
        flag for row in _rows(_section("docs/ipamd.md", "Configuration")) for flag in re.findall("--[a-z-]+", row[0])
    }
    assert documented == flags


def test_every_status_code_of_ipamd_is_documented() -> None:
    codes = {
        kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.IpamdError)
    }
    assert {row[0] for row in _rows(_section("docs/errors.md", "gRPC status codes of ipamd"))} == codes


def test_every_method_is_documented() -> None:
    methods = set(re.findall(r"rpc (\w+)\(", _text("protos/ipam/v1/ipam.proto")))
    documented = {name for row in _rows(_section("docs/ipamd.md", "API")) for name in row[0].split(", ")}
    assert documented == methods


def test_every_metric_is_documented() -> None:
    metrics = IpamdMetrics("1", "n")
    metrics.watch_pools(list)
    metrics.watch_cluster(lambda: ClusterSample(reachable=True, joined=True, draining=False, unpublished=0))
    names = set()
    for family in metrics.registry.collect():
        if family.name.startswith("netloom_"):
            names.add(family.name + {"counter": "_total", "info": "_info"}.get(family.type, ""))
    assert {_first_code(row[0]) for row in _rows(_section("docs/ipamd.md", "Metrics"))} == names


# The command


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def test_every_command_and_option_is_documented() -> None:
    commands = dict(_commands(netloom, "netloom"))
    headings = set(re.findall(r"^## (netloom .*)$", _prose("docs/cli.md"), re.MULTILINE))
    assert headings == set(commands)
    for name, command in commands.items():
        section = _section("docs/cli.md", name)
        for option in command.params:
            if isinstance(option, click.Option) and option.opts[0] not in ("--socket", "--json", "--help"):
                assert option.opts[0] in section, f"{name} has {option.opts[0]}, which docs/cli.md does not"


def _statuses(title: str) -> set[int]:
    return {int(number) for row in _rows(_section("docs/errors.md", title)) for number in re.findall(r"\d+", row[0])}


def test_exit_statuses_are_documented() -> None:
    assert issubclass(Status, enum.IntEnum)
    assert _statuses("netloom") - {130} == {status.value for status in Status}
    assert _statuses("ipamd") == {0, 1, 2}


# The Docker shim


def test_every_option_of_a_docker_network_is_documented() -> None:
    documented = {_first_code(row[0]) for row in _rows(_section("docs/docker.md", "Networks"))}
    assert documented == set(options._NAMES)


def test_every_flag_of_the_shim_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        libnetwork.__main__.main(["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    rows = {_first_code(row[0]): row[1] for row in _rows(_section("docs/docker.md", "Options of netloom-docker"))}
    assert set(rows) == flags
    assert str(reconcile.INTERVAL_S).removesuffix(".0") in rows["--interval"]
    assert str(reconcile.GRACE_S).removesuffix(".0") in rows["--grace"]
    assert f"`{libnetwork.__main__.SOCKET}`" == rows["--socket"]


# Examples


def _documents_in(name: str) -> list[dict[str, object]]:
    found = []
    for block in _blocks(name, "json"):
        document = json.loads(block)
        assert isinstance(document, dict)
        found.append(document)
    return found


def _plugin_objects(document: dict[str, object]) -> list[dict[str, object]]:
    """What a runtime would hand to each plugin of a configuration list, or to the one of a single configuration."""
    if isinstance(plugins := document.get("plugins"), list):
        return [{**plugin, "cniVersion": document["cniVersion"], "name": document["name"]} for plugin in plugins]
    return [document] if "type" in document and "name" in document else []


@pytest.mark.parametrize("name", [name for name in NAMES if _blocks(name, "json")])
def test_examples_are_what_the_plugins_take(name: str) -> None:
    for document in _documents_in(name):
        for plugin in _plugin_objects(document):
            if plugin["type"] in registry.PLUGINS:
                _take(plugin)
        if document.get("type") in _IPAM_KEYS:
            _take({"cniVersion": "1.1.0", "name": "example", "type": "bridge", "ipam": document})


_INTERFACE_KEYS: dict[str, type[msgspec.Struct]] = {
    "bridge": bridge.BridgeConf,
    "ptp": ptp.PtpConf,
    "macvlan": macvlan.MacvlanConf,
}
_IPAM_KEYS: dict[str, type[msgspec.Struct]] = {
    "ipamd": ipamd.IpamConf,
    "host-local": host_local.HostLocalConf,
    "static": static.StaticConf,
}


def _take(plugin: dict[str, object]) -> None:
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/opt/cni/bin"}
    request = parse(
        environment,
        json.dumps({**plugin, "cniVersion": "1.1.0"}).encode(),
        plugin=str(plugin["type"]),
        supported=versions.SUPPORTED,
        request_id="0" * 16,
        began_ns=0,
    )
    known = {"cniVersion", "name", "type", "ipam", "capabilities"}
    if (kind := _INTERFACE_KEYS.get(str(plugin["type"]))) is not None:
        registry.load(str(plugin["type"])).parse(request)
        assert set(plugin) - known <= set(_keys(kind))
    ipam = plugin.get("ipam", {})
    assert isinstance(ipam, dict)
    if (kind := _IPAM_KEYS.get(ipam.get("type", ""))) is not None:
        registry.load(ipam["type"]).parse(request)
        assert set(ipam) - {"type"} <= set(_keys(kind))
        inner = {key for range_set in ipam.get("ranges", []) for one in range_set for key in one}
        assert inner <= set(_keys(ranges.RangeConf))


def test_the_example_of_an_attachment_record_is_one() -> None:
    from kernel.record import Record  # noqa: PLC0415 - only this test needs it

    (block,) = _blocks("docs/architecture.md", "json")
    record = convert(json.loads(block), Record)
    assert record.key.plugin in registry.PLUGINS
    assert set(json.loads(block)) == set(Record.__dataclass_fields__)


@pytest.mark.parametrize("name", [name for name in NAMES if _blocks(name, "toml")])
def test_toml_examples_are_toml(name: str) -> None:
    for block in _blocks(name, "toml"):
        tomllib.loads(block)


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    (block,) = _blocks("docs/ipamd.md", "toml")
    file = tmp_path / "netloom.toml"
    file.write_text(block)
    assert config.load(str(file), {}, {}).node == "host-1"


# What has no place in them

_ABSOLUTE = re.compile(r"(?<![\w.}>*~/:`-])/[a-z]\w*")
_PLACES = frozenset({"/run", "/var", "/etc", "/opt", "/proc", "/sys", "/dev", "/usr", "/tmp", "/metrics", "/healthz"})
_PLACES |= {"/netloom", "/coreos"}  # where keys in etcd begin, ours and flannel's
_TRACKER = re.compile(r"(?i)\bissue \d|(?<![\w&])#\d+")
_HOSTS = re.compile(r"https?://([\w.-]+)")


@pytest.mark.parametrize("name", NAMES)
def test_documents_speak_of_the_software_alone(name: str) -> None:
    """No paths of somebody's machine, no trackers' numbers, no hosts."""
    text = _text(name)
    prose = _prose(name)
    assert not _TRACKER.findall(text)
    # In labs: a container's name, and addresses of nobody in the world.
    for host in _HOSTS.findall(text):
        assert "." not in host or ip_address(host).is_private, host
    # Inside code only: prose has "and/or", and paths of ours are written as code.
    for span in [*_CODE.findall(prose), *(body for _, body in _FENCE.findall(text))]:
        strange = {found for found in _ABSOLUTE.findall(span) if found not in _PLACES}
        assert not strange, f"{name}: {strange} in {span!r}"


@pytest.mark.parametrize("name", NAMES)
def test_lines_end_cleanly(name: str) -> None:
    text = _text(name)
    assert text.endswith("\n")
    assert not re.findall(r"[ \t]+$", _prose(name), re.MULTILINE)
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
