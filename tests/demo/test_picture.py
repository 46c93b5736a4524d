"""The picture at the demo's end, character by character."""

from demo.picture import ASCII, UNICODE, Bridge, Container, alphabet, table, topology

BLUE = Container("blue", "/run/netns/blue", "eth0", "02:00:00:00:00:01", ("10.88.0.2/24", "fd00:88::2/64"), "veth0a")
GREEN = Container("green", "/run/netns/green", "eth0", "02:00:00:00:00:02", ("10.88.0.3/24", "fd00:88::3/64"), "veth0b")
BRIDGE = Bridge("br0", "02:00:00:00:00:09", ("10.88.0.1/24",))


def test_two_containers_on_a_bridge_in_ascii() -> None:
    assert topology([BLUE, GREEN], BRIDGE, ASCII) == [
        "+-------------------------+   +-------------------------+",
        "| blue  /run/netns/blue   |   | green  /run/netns/green |",
        "| eth0  02:00:00:00:00:01 |   | eth0  02:00:00:00:00:02 |",
        "|       10.88.0.2/24      |   |       10.88.0.3/24      |",
        "|       fd00:88::2/64     |   |       fd00:88::3/64     |",
        "+------------+------------+   +------------+------------+",
        "             | veth0a                      | veth0b",
        "-------------+-----------------------------+-------------",
        "bridge br0   10.88.0.1/24   02:00:00:00:00:09",
    ]


def test_lines_are_drawn_in_the_other_alphabet_too() -> None:
    lines = topology([BLUE], BRIDGE, UNICODE)
    assert lines[0] == "┌─────────────────────────┐"
    assert lines[-3:] == [
        "             │ veth0a",
        "─────────────┴─────────────",
        "bridge br0   10.88.0.1/24   02:00:00:00:00:09",
    ]


def test_the_alphabet_follows_the_locale() -> None:
    assert alphabet({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}) is ASCII
    assert alphabet({"LANG": "de_DE.UTF-8"}) is UNICODE
    assert alphabet({"LANG": "en_GB.utf8", "LC_ALL": ""}) is UNICODE
    assert alphabet({"LANG": "en_GB.utf8", "LC_CTYPE": "POSIX"}) is ASCII
    assert alphabet({}) is ASCII


def test_a_tables_first_column_stands_left_the_others_right() -> None:
    assert table(("verb", "ms"), [("ADD", "12.0"), ("CHECK", "7")]) == ["verb     ms", "ADD    12.0", "CHECK     7"]
