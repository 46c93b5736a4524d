"""`netloom trace`: where the time of the last requests went, whoever served them.

Reads what telemetry/trace.py wrote; asks nobody. The request ids are those of ipamd's log and of a plugin's errors.
"""

import os
from datetime import UTC, datetime
from typing import TypedDict

import click

from cli import output
from cli.failure import EPILOG, Failure, Status
from cli.options import Choices, common, pass_choices
from kernel import paths
from telemetry import traces
from telemetry.traces import Trace, Traces

_LAST = 20
_SHOWN_NS = 5_000  # a shorter step is left out of a row, which would say 0.00
_COLUMNS = ("TIME", "REQUEST", "VERB", "PLUGIN", "NETWORK", "CONTAINER", "INTERFACE", "WAY", "OUTCOME", "MS", "STEPS")


class StepDocument(TypedDict):
    step: str
    ns: int


class TraceDocument(TypedDict):
    time: str  # RFC 3339, of its begin
    request_id: str
    verb: str
    plugin: str
    network: str
    container_id: str
    ifname: str
    way: str  # warm, cold
    pid: int
    outcome: str  # done, failed, undelivered
    code: int  # the CNI error's, 0 where there is none
    error: str
    total_ns: int
    steps: list[StepDocument]


@click.command("trace", epilog=EPILOG, short_help="Where the time of the last requests went.")
@click.option(
    "--last", type=click.IntRange(min=1), default=_LAST, show_default=True, metavar="N", help="So many requests."
)
@click.option("--id", "request_id", metavar="ID", default="", help="The request whose id begins so.")
@click.option("--container", metavar="ID", default="", help="Only of containers whose id begins so.")
@click.option("--slowest", is_flag=True, help="The slowest of all that are kept, slowest first.")
@common
@pass_choices
def trace(choices: Choices, last: int, request_id: str, container: str, slowest: bool) -> None:
    """Show the last requests of the plugins, newest last: who served them, how they ended, and the time of each step.

    The last few thousand are kept, until the host restarts. Needs root.
    """
    kept = _read()
    found = [one for one in kept.requests if one.id.startswith(request_id) and one.container.startswith(container)]
    if request_id and not found:
        raise Failure(
            f"no request that is kept has the id {request_id}; there are {len(kept.requests)}, "
            "and 'netloom trace --last N' lists them"
        )
    found = sorted(found, key=lambda one: -one.total_ns)[:last] if slowest else found[-last:]
    if choices.as_json:
        output.document({"requests": [_document(one) for one in found], "unreadable": kept.unreadable})
        return
    if request_id and len(found) == 1:
        _print_one(found[0])
    elif found:
        output.table(_COLUMNS, [_row(one) for one in found], ("MS",))
    else:
        output.line("no request is kept")
    if kept.unreadable:
        output.line(f"lines that cannot be read: {kept.unreadable}")


def _read() -> Traces:
    try:
        return traces.read(paths.run_dir(os.environ))
    except paths.PathError as error:
        raise Failure(str(error), Status.USAGE) from None
    except PermissionError as error:
        raise Failure(
            f"cannot read {error.filename}: only root may; run this with sudo", Status.NOT_PERMITTED
        ) from None
    except OSError as error:
        raise Failure(f"cannot read the traces: {error}") from None


def _time(one: Trace) -> str:
    try:
        at = datetime.fromtimestamp(one.at_ns / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        return ""
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z"


def _document(one: Trace) -> TraceDocument:
    return TraceDocument(
        time=_time(one),
        request_id=one.id,
        verb=one.verb,
        plugin=one.plugin,
        network=one.network,
        container_id=one.container,
        ifname=one.ifname,
        way=one.way,
        pid=one.pid,
        outcome=one.outcome,
        code=one.code,
        error=one.error,
        total_ns=one.total_ns,
        steps=[StepDocument(step=name, ns=spent) for name, spent in one.steps.items()],
    )


def _outcome(one: Trace) -> str:
    return f"error {one.code}" if one.outcome == "failed" else one.outcome


def _row(one: Trace) -> tuple[str, ...]:
    steps = " ".join(f"{_hyphened(name)}={ns / 1e6:.2f}" for name, ns in one.steps.items() if ns >= _SHOWN_NS)
    return (
        _time(one),
        one.id,
        one.verb,
        one.plugin,
        one.network,
        one.container,
        one.ifname,
        one.way,
        _outcome(one),
        f"{one.total_ns / 1e6:.2f}",
        steps,
    )


def _hyphened(name: str) -> str:
    """One word, so that awk sees one."""
    return name.replace(" ", "-")


def _print_one(one: Trace) -> None:
    facts = [
        ("request", one.id),
        ("time", _time(one)),
        ("verb", one.verb),
        ("plugin", one.plugin),
        ("network", one.network),
        ("container", one.container),
        ("interface", one.ifname),
        ("served", f"{one.way}, by process {one.pid}"),
        ("outcome", _outcome(one)),
        ("error", one.error),
        ("total", f"{one.total_ns / 1e6:.3f} ms"),
    ]
    output.facts([(name, value) for name, value in facts if value])
    output.line("")
    rows = [
        (name, f"{ns / 1e6:.3f}", f"{100 * ns / one.total_ns:.0f}%" if one.total_ns > 0 else "")
        for name, ns in one.steps.items()
    ]
    output.table(("STEP", "MS", "SHARE"), rows, ("MS", "SHARE"))
