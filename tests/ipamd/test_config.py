"""ipamd's configuration: what is taken, and what every refusal says."""

import itertools
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import EtcdConfig
from ipamd import config
from ipamd.config import ClusterConfig, Config, load, parse_arguments
from kernel import settings
from kernel.settings import ConfigError


def _write(directory: Path, text: str | bytes) -> str:
    file = directory / "netloom.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def _refusal(directory: Path, text: str | bytes) -> str:
    """What is said of the file, without its path."""
    file = _write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load(file, {}, {})
    message = str(caught.value)
    assert message.startswith(file)
    assert "\n" not in message
    return message.removeprefix(file)


def test_defaults_where_the_default_file_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel.paths.CONFIG_FILE", str(tmp_path / "none.toml"))
    assert load(None, {}, {}) == Config(
        socket="/run/netloom/ipamd.sock",
        socket_mode=0o660,
        socket_owner=None,
        socket_group=None,
        node=os.uname().nodename,
        http_listen=None,
        http_allow_remote=False,
        store_kind="sqlite",
        store_path="/var/lib/netloom/ipamd.db",
        cooldown_s=30.0,
        reclaim_interval_s=60.0,
        reclaim_grace_s=60.0,
        release_dir="/run/netloom/releases",
        log_level="info",
        log_format="text",
    )


def test_every_key(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        """
        [ipamd]
        socket = "/x/../y/i.sock"
        socket_mode = "600"
        socket_owner = "root"
        socket_group = 7
        node = "n-1.example"
        http_listen = "0.0.0.0:9464"
        http_allow_remote = true
        [store]
        kind = "memory"
        path = "/s/i.db"
        [pools]
        cooldown_s = 0
        [reclaim]
        interval_s = 0.5
        grace_s = 5
        [log]
        level = "debug"
        format = "json"
        """,
    )
    assert load(file, {}, {"NETLOOM_RUN_DIR": "/r"}) == Config(
        socket="/y/i.sock",
        socket_mode=0o600,
        socket_owner=0,
        socket_group=7,
        node="n-1.example",
        http_listen="0.0.0.0:9464",
        http_allow_remote=True,
        store_kind="memory",
        store_path="/s/i.db",
        cooldown_s=0.0,
        reclaim_interval_s=0.5,
        reclaim_grace_s=5.0,
        release_dir="/r/releases",
        log_level="debug",
        log_format="json",
    )


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    """The example in the module's docstring, but for the group, which this machine may not have."""
    assert config.__doc__
    example = "\n".join(line[4:] for line in config.__doc__.splitlines() if line.startswith("    "))
    values = tomllib.loads(example)
    assert {table: tuple(content) for table, content in values.items()} == config._KEYS
    for name in ("etcd-ca.pem", "etcd.pem", "etcd-key.pem", "etcd-password"):
        (tmp_path / name).touch(0o600)
    example = example.replace('"netloom"', '"root"').replace("/etc/netloom", str(tmp_path))
    loaded = load(_write(tmp_path, example), {}, {})
    assert loaded.socket_group == 0
    assert loaded.cluster is None
    loaded = load(_write(tmp_path, example.replace('kind = "sqlite"', 'kind = "etcd"')), {}, {})
    assert loaded.cluster == ClusterConfig(
        EtcdConfig(
            ("10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"),
            ca=f"{tmp_path}/etcd-ca.pem",
            cert=f"{tmp_path}/etcd.pem",
            key=f"{tmp_path}/etcd-key.pem",
            user="root",
            password_file=f"{tmp_path}/etcd-password",
        ),
        lease_s=15,
        reclaim_nodes_after_s=0.0,
    )


_ETCD = '[store]\nkind = "etcd"\n[etcd]\nendpoints = ["10.0.0.1"]\n'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[store]\nkind = "etcd"\n', 'store.kind: found "etcd"; name its endpoints'),
        ('[etcd]\nendpoints = ["10.0.0.1:x"]\n', ":2: etcd.endpoints: wanted such as"),
        (_ETCD + "timeout_s = 0\n", ":5: etcd.timeout_s: wanted 0.1 to 600"),
        (_ETCD + 'prefix = ""\n', ":5: etcd.prefix: wanted 1 to 256 bytes"),
        (_ETCD + 'ca = "/nowhere/ca.pem"\n', "etcd.ca: found '/nowhere/ca.pem'; this file cannot be read"),
        (_ETCD + 'user = "u"\npassword_file = "OPEN"\n', "others may read this file (mode 0644)"),
        (_ETCD + 'password_file = "SECRET"\n', "etcd.user: wanted one where there is a password"),
        (_ETCD + "[cluster]\nlease_s = 1\n", "cluster.lease_s: found 1; wanted a whole number from 5"),
        (_ETCD + "[cluster]\nreclaim_nodes_after_s = 20\n", "wanted 0 (never), or at least 60 seconds"),
    ],
)
def test_a_cluster_that_cannot_be(tmp_path: Path, text: str, wanted: str) -> None:
    for name, mode in (("OPEN", 0o644), ("SECRET", 0o600)):
        file = tmp_path / name
        file.touch()
        file.chmod(mode)
        text = text.replace(name, str(file))
    assert wanted in _refusal(tmp_path, text)


def test_precedence_of_the_socket(tmp_path: Path) -> None:
    file = _write(tmp_path, '[ipamd]\nsocket = "/file.sock"\n')
    empty = str(tmp_path / "empty.toml")
    Path(empty).touch()
    environment = {"NETLOOM_IPAMD_SOCKET": "/environment.sock", "NETLOOM_RUN_DIR": "/r"}
    assert load(file, {"socket": "/flag.sock"}, environment).socket == "/flag.sock"
    assert load(file, {}, environment).socket == "/file.sock"
    assert load(empty, {}, environment).socket == "/environment.sock"
    assert load(empty, {}, {"NETLOOM_RUN_DIR": "/r"}).socket == "/r/ipamd.sock"


def test_places_follow_the_environment(tmp_path: Path) -> None:
    file = _write(tmp_path, "")
    loaded = load(None, {}, {"NETLOOM_CONFIG": file, "NETLOOM_STATE_DIR": "/s", "NETLOOM_RUN_DIR": "/r"})
    assert loaded.store_path == "/s/ipamd.db"
    assert loaded.release_dir == "/r/releases"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.toml")
    with pytest.raises(ConfigError, match=r"no\.toml: there is no such file"):
        load(missing, {}, {})
    with pytest.raises(ConfigError, match=r"no\.toml: there is no such file"):
        load(None, {}, {"NETLOOM_CONFIG": missing})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(str(tmp_path), {}, {})


def test_a_bad_variable_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"NETLOOM_RUN_DIR.*absolute"):
        load(None, {}, {"NETLOOM_RUN_DIR": "r", "NETLOOM_CONFIG": "/dev/null"})


def test_tables_of_other_daemons_are_theirs(tmp_path: Path) -> None:
    text = "[netd]\nanything = 1\n[docker.x]\ny = [1]\n[cni]\n[ipamd]\nnode = 'n'\n"
    assert load(_write(tmp_path, text), {}, {}).node == "n"


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            '# one\n[ipamd]\nsoket = "/x"\n',
            ":3: ipamd.soket: there is no such key (its value: '/x'); did you mean socket?",
        ),
        (
            "[pools]\n\n\ncooldown = 30\n",
            ":4: pools.cooldown: there is no such key (its value: 30); did you mean cooldown_s?",
        ),
        ("[log]\nnode = 'n'\n", ":2: log.node: there is no such key (its value: 'n'); it belongs under [ipamd]"),
        ("[stores]\nkind = 'sqlite'\n", ":1: stores: there is no such key"),
        ("[pool]\n", ":1: pool: there is no such key (its value: {}); did you mean pools?"),
        ("node = 'n'\n", ":1: node: there is no such key (its value: 'n'); it belongs under [ipamd]"),
        ("\nlog = 'info'\n", ":2: log: found 'info'; wanted a table, written [log] on a line of its own"),
        ("[[log]]\nlevel = 'info'\n", ":1: log: found [{'level': 'info'}]; wanted a table"),
        (
            "[log]\nlevel = 'verbos'\n",
            ":2: log.level: found 'verbos'; wanted one of debug, info, warning, error, critical",
        ),
        ("[log]\nlevel = 'WARN'\n", "did you mean warning?"),
        ("log = {format = 'xml'}\n", ":1: log.format: found 'xml'; wanted one of json, text"),
        ("store.kind = 'zk'\n", ":1: store.kind: found 'zk'; wanted one of sqlite, memory, etcd"),
        ("[store]\nkind = 3\n", ":2: store.kind: found 3; wanted one of"),
        ("[store]\npath = 'relative.db'\n", ":2: store.path: found 'relative.db'; wanted the absolute path of a file"),
        ("[store]\npath = '/a/'\n", "wanted the absolute path of a file"),
        ("[ipamd]\nsocket = 1979-05-27\n", "wanted text in quotes, this is a date or time"),
        (
            "[ipamd]\nsocket_mode = 660\n",
            ":2: ipamd.socket_mode: found 660; wanted permission bits as three octal digits",
        ),
        ("[ipamd]\nsocket_mode = '0666'\n", ":2: ipamd.socket_mode: found '0666'; others would get rights"),
        ("[ipamd]\nsocket_mode = '0o660'\n", "three octal digits"),
        (
            "[ipamd]\nsocket_group = 'no-such-group'\n",
            ":2: ipamd.socket_group: found 'no-such-group'; this machine has no such group",
        ),
        ("[ipamd]\nsocket_owner = -1\n", "this machine has no such user"),
        ("[ipamd]\nsocket_owner = 4294967295\n", "wanted a user id below"),
        ("[ipamd]\nsocket_owner = true\n", "this is a boolean"),
        ("[ipamd]\nnode = ''\n", ":2: ipamd.node: found ''; wanted a node name"),
        ("[ipamd]\nnode = 'a/b'\n", "wanted a node name"),
        ("[ipamd]\nhttp_listen = '0.0.0.0:1'\n", "allow it explicitly with http_allow_remote = true"),
        ("[ipamd]\nhttp_listen = '9464'\n", "wanted an address and a port"),
        ("[ipamd]\noverlay_subnets = 10\n", ":2: ipamd.overlay_subnets: found 10; wanted text in quotes"),
        (
            "[ipamd]\noverlay_subnets = '10.0.0.0/8'\n",
            ":2: ipamd.overlay_subnets: found '10.0.0.0/8'; the length of its parts is missing: write",
        ),
        ("[ipamd]\nhttp_allow_remote = 'yes'\n", "wanted true or false without quotes, this is text"),
        ("[pools]\ncooldown_s = '30'\n", ":2: pools.cooldown_s: found '30'; wanted a number of seconds without quotes"),
        ("[pools]\ncooldown_s = true\n", ":2: pools.cooldown_s: found true; wanted a number of seconds"),
        ("[pools]\ncooldown_s = -1\n", "wanted seconds from 0 to 2592000"),
        ("[pools]\ncooldown_s = nan\n", "wanted seconds from 0 to 2592000"),
        (f"[pools]\ncooldown_s = {'9' * 400}\n", "wanted seconds from 0 to 2592000"),
        ("[reclaim]\ngrace_s = inf\n", "wanted seconds from 0 to 2592000"),
        ("[ipamd]\nnode = \n", ":2: this is not TOML: Invalid value"),
        ("[ipamd]\nnode = 'a'\nnode = 'b'\n", ":3: this is not TOML: Cannot overwrite a value"),
        ("[ipamd]\nnode = '''x\n\n", ":4: this is not TOML"),
        (b"[ipamd]\nnode = '\xff'\n", ":2: wanted UTF-8, found the byte 0xff"),
        ("[ipamd]\nnode = '" + "x" * 300 + "'\n", "…; wanted a node name"),
        ("x = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("#" * ((1 << 20) + 1), "found more than 1048576 bytes"),
        ('[ipamd]\n"a\\u001b[2J" = 1\n', ":2: ipamd.a\\x1b[2J: there is no such key"),
        ('["ipamd.node"]\n', ":1: ipamd.node: there is no such key"),
    ],
    ids=itertools.count(),  # the texts are no names
)
def test_refusals_name_the_line_the_key_the_value_and_the_remedy(
    tmp_path: Path, text: str | bytes, refusal: str
) -> None:
    message = _refusal(tmp_path, text)
    assert message.startswith(refusal) if refusal.startswith(":") else refusal in message, message


def test_the_line_is_found_behind_values_of_many_lines(tmp_path: Path) -> None:
    text = (
        '[netd]\ntext = """\n[ipamd]\nsocket = 1 \\"""\n"""\n'  # lines 1 to 5
        "raw = '''\n[log]\nlevel = \"x\"\n'''\n"  # 6 to 9
        "list = [ # ]\n  '[ipamd]', {a = ']'},\n[\n]]\n"  # 10 to 13
        "[ log ] # here\n\n  'level' = 'loud'\n"  # 14 to 16
    )
    assert _refusal(tmp_path, text).startswith(":16: log.level: found 'loud'")


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    message = _refusal(tmp_path, b"\xef\xbb\xbf[log]\r\n\r\nlevel = 'loud'\r\n")
    assert message.startswith(":3: log.level: found 'loud'")


_names = st.sampled_from(["a", "b-1", "'q.x'", '"d\\t#"', "c"])
_values = st.sampled_from(
    [
        "1",
        "'x'",
        '"""\n[a]\n"""',
        "'''\nb = 1\n'''",
        "[\n1, # ]\n2]",
        "{ a = [ 1 ] }",
        '"#"',
        "2020-01-01",
        '["]", "\\""]',
    ]
)


@given(st.lists(st.tuples(_names, _values, st.sampled_from(["", "  ", "\n", "# c = 1\n"])), max_size=8))
def test_lines_of_arbitrary_documents(entries: list[tuple[str, str, str]]) -> None:
    """Every key is found on the line on which the document was told to have it."""
    text, expected = "", {}
    for number, (name, value, before) in enumerate(entries):
        text += f"{before}[t{number}]\n"
        key = tuple(tomllib.loads(f"{name} = 1"))
        expected[f"t{number}", *key] = text.count("\n") + 1
        text += f"{name} = {value}\n"
    tomllib.loads(text)
    found = settings.key_lines(text)
    assert {key: line for key, line in found.items() if len(key) == 2} == expected


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = _write(tmp_path, "[ipamd]\nnode = 'file'\n[store]\nkind = 'memory'\n[log]\nlevel = 'error'\n")
    given_ = parse_arguments(
        (
            f"--config={file} --socket=s.sock --store=x.db --node=flag --log-level=debug "
            "--log-format=json --http-listen=[::1]:0 --check"
        ).split()
    )
    assert given_.check
    loaded = load(given_.config, given_.overrides, {})
    assert (loaded.socket, loaded.store_kind, loaded.store_path) == (f"{tmp_path}/s.sock", "sqlite", f"{tmp_path}/x.db")
    assert (loaded.node, loaded.log_level, loaded.log_format) == ("flag", "debug", "json")
    assert loaded.http_listen == "[::1]:0"


def test_flags_that_are_absent_override_nothing(tmp_path: Path) -> None:
    file = _write(tmp_path, "[ipamd]\nnode = 'file'\nhttp_listen = '127.0.0.1:1'\n[log]\nlevel = 'error'\n")
    arguments = parse_arguments(["--config", file])
    assert not arguments.check
    loaded = load(arguments.config, arguments.overrides, {})
    assert (loaded.node, loaded.log_level, loaded.http_listen) == ("file", "error", "127.0.0.1:1")
    assert load(file, parse_arguments(["--http-listen", ""]).overrides, {}).http_listen is None
    assert load(file, parse_arguments(["--store", "memory"]).overrides, {}).store_kind == "memory"


@pytest.mark.parametrize(
    ("argv", "refusal"),
    [
        (["--node", "a b"], "--node: found 'a b'; wanted a node name"),
        (["--log-level", "loud"], "--log-level: found 'loud'; wanted one of"),
        (["--http-listen", "10.0.0.1:80"], "--http-listen: found '10.0.0.1:80'; '10.0.0.1:80' can be reached"),
        (["--store", ""], "--store: found ''; wanted the absolute path of a file"),
        (["--socket", ""], "--socket: found ''; wanted the absolute path of a file"),
    ],
)
def test_a_wrong_flag_is_named_as_the_flag(tmp_path: Path, argv: list[str], refusal: str) -> None:
    file = _write(tmp_path, "[ipamd]\nnode = 'file'\n")
    with pytest.raises(ConfigError) as caught:
        load(file, parse_arguments(argv).overrides, {})
    assert str(caught.value).startswith(refusal)


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--nodes"])
    assert caught.value.code == 2
    assert "--nodes" in capsys.readouterr().err


def test_a_host_whose_name_cannot_name_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a b")
    file = _write(tmp_path, "")
    with pytest.raises(ConfigError, match="set node under"):
        load(file, {}, {})
    assert load(file, {"node": "n"}, {}).node == "n"
