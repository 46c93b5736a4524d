"""Two paths between network namespaces compared: the function behind each row that says what our set-up costs traffic.

    with ExitStack() as stack:
        ours = Way(space(stack, netns1), space(stack, netns2), "10.1.0.3")
        hand = Way(...)
        row = compared(stack, plan, spec, "stream", ours, hand)

`bench/pair.py` measures rounds; here is decided how many: at least those of the plan, then more until the interval in
which the median of the rounds' ratios lies (95 %) is narrow, or the row's time is over. Any two namespaces do, on one
host or on two.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.host import BenchError, Helper, Plan, finished
from bench.stats import Row, Spec, interval, median
from tests.hosts import Host, Netns

Do = Literal["stream", "trips"]
SCALE = {"stream": 8 / 1e9, "trips": 1.0}  # Gbit/s, 1/s

_WINDOWS = 80  # of each side in a round
_NARROW = 0.01
_FEWEST = 3  # also when the whole run is out of time: three take half a second
_ROW_S = 8.0  # within which rounds are added; a row of healthy paths needs two


@dataclass(frozen=True, slots=True)
class Way:
    """From a namespace to an address in another; namespaces as paths that every process of this machine can open."""

    source: str
    target: str
    address: str


def space(stack: ExitStack, one: Host | Netns) -> str:
    """A path to the namespace of a host or of a container, for every process, until the stack ends."""
    if isinstance(one, Host):
        return one.netns_path
    # The container's name is known in its host's mount namespace alone; a process in it is known everywhere.
    holder = one.popen(["sh", "-c", "echo ready; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(_end, holder)
    if holder.stdout is None or holder.stdout.readline() != "ready\n":
        raise BenchError(f"{one.host.name}: no process can be started in {one.path}")
    return f"/proc/{holder.pid}/ns/net"


def _end(holder: subprocess.Popen[str]) -> None:
    for stream in (holder.stdin, holder.stdout):
        if stream is not None:
            stream.close()
    holder.kill()
    holder.wait()


def measurer(stack: ExitStack, host: Host) -> Helper:
    """The process that measures; any host will do."""
    return stack.enter_context(Helper(host, [sys.executable, "-I", "-S", str(Path(__file__).with_name("pair.py"))]))


def compared(helper: Helper, plan: Plan, spec: Spec, do: Do, ours: Way, peer: Way) -> Row:
    """The row of `spec`. Raises BenchError where a path leads nowhere."""
    request: dict[str, Any] = {"do": do, "ours": asdict(ours), "peer": asdict(peer)}
    request["windows"] = plan.samples(_WINDOWS)
    end = time.monotonic() + _ROW_S
    rounds: list[dict[str, list[float]]] = []
    ratios: list[float] = []
    while True:
        rounds.append(helper.ask(request))
        ratios.append(_ratio(rounds[-1]))
        low, high = interval(ratios)
        if len(rounds) >= plan.rounds and (high - low <= _NARROW * median(ratios) or time.monotonic() > end):
            break
        if (plan.budget.over and len(rounds) >= _FEWEST) or time.monotonic() > end + _ROW_S / 2:
            break
    cpu = median([_ratio(one, "_cpu") for one in rounds])
    spec = spec.noted(
        f"its median lies within {low:.3f} and {high:.3f}, by {len(rounds)} rounds (95 %)",
        f"by processor time {cpu:.3f}",
    )
    return finished(plan, spec, *([_scaled(one[side], do) for one in rounds] for side in ("ours", "peer")))


def _ratio(one: dict[str, list[float]], kind: str = "") -> float:
    return median(one[f"ours{kind}"]) / median(one[f"peer{kind}"])


def _scaled(rates: list[float], do: Do) -> list[float]:
    return [rate * SCALE[do] for rate in rates]
