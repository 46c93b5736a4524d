"""`netloom topology`: a picture of the hosts and the ways between them, as this host sees them."""

import textwrap
from xml.sax.saxutils import escape

import click

from cli import netd, output, overlays
from cli.failure import Failure
from cli.netd import NetdDocument, PeerDocument
from cli.options import Choices, common, pass_choices
from cli.overlays import OverlayDocument

_EPILOG = "Exit status: 0 done, 1 the file cannot be written, 2 wrong usage, 3 netd cannot be reached."
_BOX, _GAP, _WIDTH, _LINE = 250, 170, 700, 16
_COLOURS = {"up": "#2a7d46", "silent": "#b8860b", "refused": "#b22222"}


@click.command("topology", epilog=_EPILOG, short_help="A picture of the hosts and the ways between them.")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Write the picture as SVG; - is stdout.")
@common
@pass_choices
def topology(choices: Choices, svg: str | None) -> None:
    """Draw the hosts that netd knows, and how packets get from this one to each."""
    with netd.connected() as node:
        found = netd.document(node.status(), netd.socket_path())
    if svg is not None:
        _write(svg, drawing(found))
    elif choices.as_json:
        output.document(
            {
                "node": found["node"],
                "public": found["public"],
                "underlay": found["underlay"],
                "networks": found["networks"],
                "peers": found["peers"],
                "overlays": found["overlays"],
            }
        )
    else:
        for line in picture(found):
            output.line(line)


def picture(found: NetdDocument) -> list[str]:
    """For a terminal: lines of ASCII."""
    own = [subnet for network in found["networks"] for subnet in network["own_subnets"]]
    lines = [f"[{found['node']}]  {' '.join(found['public'])}  (this host, {found['underlay'] or 'no underlay'})"]
    lines.append(f" |  {' '.join(own) or 'no subnets'}")
    ways = [_way(found, peer) for peer in found["peers"]]
    width = max(map(len, ways), default=0)
    for number, (peer, way) in enumerate(zip(found["peers"], ways, strict=True)):
        last = number == len(ways) - 1
        lines.append(" |")
        state = "" if peer["state"] == "up" else f"  {peer['state'].upper()}"
        missing = peer["wanted"] - peer["present"]
        gap = f"  {missing} OF {peer['wanted']} ENTRIES MISSING" if missing else ""
        lines.append(f" +--{way:-<{width}}--> [{peer['name']}]  {' '.join(peer['addresses'])}{state}{gap}")
        lines.append(f" {' ' if last else '|'}  {'':{width}}      {' '.join(peer['subnets']) or 'no subnets'}")
    for one in found["overlays"]:
        lines += ["", f"({one['name']})  {_about(one)}", *(f" +-- {line}" for line in _members(one))]
    return lines


def drawing(found: NetdDocument) -> str:
    """The same as SVG: this host on the left, the others on the right."""
    boxes = [_lines_of(peer["name"], peer["addresses"], peer["subnets"]) for peer in found["peers"]]
    own = _lines_of(
        found["node"], found["public"], [s for network in found["networks"] for s in network["own_subnets"]]
    )
    heights = [_height(box) for box in boxes]
    bottom = max(sum(heights) + 20 * (len(boxes) + 1), _height(own) + 40)
    bands = [[one["name"], _about(one), *_members(one)] for one in found["overlays"]]
    height = bottom + sum(_height(band) + 20 for band in bands)
    middle = bottom // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        f"<title>{escape('Hosts, as ' + found['node'] + ' sees them')}</title>",
    ]
    top = 20
    right = 15 + _BOX + _GAP
    for peer, box, size in zip(found["peers"], boxes, heights, strict=True):
        colour = _COLOURS.get(peer["state"], "#555") if peer["present"] == peer["wanted"] else "#b22222"
        dash = ' stroke-dasharray="6 3"' if any(link != found["underlay"] for link in peer["links"]) else ""
        y = top + size // 2
        parts.append(
            f'<line x1="{15 + _BOX}" y1="{middle}" x2="{right}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        label = escape(_way(found, peer).strip("- "))
        parts.append(f'<text x="{right - 8}" y="{y - 6}" text-anchor="end" fill="{colour}">{label}</text>')
        parts += _box(right, top, box, colour)
        top += size + 20
    parts += _box(15, middle - _height(own) // 2, own, "#1f4e79")
    for one, band in zip(found["overlays"], bands, strict=True):
        parts += _box(15, bottom, band, _colour(one), 2 * _BOX + _GAP)
        bottom += _height(band) + 20
    return "\n".join([*parts, "</svg>"]) + "\n"


def _way(found: NetdDocument, peer: PeerDocument) -> str:
    """A word for the way: a tunnel's end, a plain route, nothing."""
    tunnels = [link for link in peer["links"] if link != found["underlay"]]
    if peer["problems"]:
        return " no way "
    plain = [" route "] if found["underlay"] in peer["links"] else []
    nothing = " nothing made " if peer["subnets"] else " nothing to route "
    return "+".join([*(f" tunnel {link} " for link in tunnels), *plain]) or nothing


def _about(one: OverlayDocument) -> str:
    """An overlay in a line."""
    number = overlays.counted(one["containers"]) if one["known"] else overlays.state(one)
    return f"overlay, VNI {one['vni']}, {' '.join(one['subnets'])}: {number}"


def _members(one: OverlayDocument) -> list[str]:
    """A line for each host that is on it, and one for what is missing here."""
    lines = []
    for host in one["hosts"]:
        where = f"by {one['device']} to {host['outer']}" if host["outer"] else "NO WAY"
        state = "" if host["state"] in ("here", "up") else f"  {host['state'].upper()}"
        way = "this host" if host["state"] == "here" else where
        lines.append(f"[{host['name']}]  {overlays.counted(host['containers'])}, {way}{state}")
    if one["present"] < one["wanted"]:
        lines.append(f"{one['wanted'] - one['present']} OF {one['wanted']} ENTRIES MISSING")
    return lines


def _colour(one: OverlayDocument) -> str:
    if not one["here"]:
        return "#555"
    well = one["known"] and one["present"] == one["wanted"] and not one["problems"]
    return _COLOURS["up" if well else "refused"]


def _lines_of(name: str, addresses: list[str], subnets: list[str]) -> list[str]:
    lines = [name]
    for text in (" ".join(addresses), " ".join(subnets)):
        lines += textwrap.wrap(text, 38, break_on_hyphens=False)[:6]
    return lines


def _height(lines: list[str]) -> int:
    return 14 + _LINE * len(lines)


def _box(x: int, y: int, lines: list[str], colour: str, width: int = _BOX) -> list[str]:
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{_height(lines)}" rx="6" fill="#fff" stroke="{colour}"'
        ' stroke-width="2"/>'
    ]
    for number, line in enumerate(lines):
        weight = ' font-weight="bold"' if number == 0 else ""
        parts.append(f'<text x="{x + 10}" y="{y + 18 + _LINE * number}"{weight}>{escape(line)}</text>')
    return parts


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text, nl=False)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {error.strerror}") from None
