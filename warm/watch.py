"""The helper process of the master: what has to be seen to whether or not a request comes.

- It tells ipamd which network namespaces live, so that the addresses of what died without a DEL come back. Only root
  sees them all, and ipamd is not root.
- It removes what such containers left in the kernel, once they were dead in every look for a while.
- It puts back what somebody took out of our nftables tables (`nft flush ruleset`, a reloaded firewall), from the
  attachment records, at once when the kernel tells of it, and at its own start.
- It puts back the rule that stands in front of another firewall's drops, when that one was loaded anew, and the sources
  that firewalld forgot. Of iptables-legacy no event tells: it is looked at from time to time.

A process of its own, because both may take long on a busy host and neither may hold up a request.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence

from cni.errors import CniError
from cni.living import boot_id
from cni.lock import AttachmentLock, attachment_lock
from cni.registry import PLUGINS
from ipamd.client import Client, IpamError
from kernel import firewalld, foreign, leftovers
from kernel.errors import KernelError
from kernel.events import Change, Events
from kernel.liveness import LiveNetns, observe
from kernel.record import Record, Records
from kernel.session import Session
from protos.ipam.v1 import ipam_pb2 as pb

NAME = "netloom-watch"
LIVENESS_S = 20.0  # ipamd's grace between two observations is a minute
_SETTLE_S = 0.05  # a reload comes as several transactions
_CALL_TIMEOUT_S = 10.0
_LOOKS = 3  # so many intervals long nobody has seen a namespace, before it is taken for gone
_LOCK_DEADLINE_S = 15.0  # a request of that attachment is under way: it will see to its own


class Watch:
    """See the module. `run` never returns."""

    def __init__(self, run_dir: str, ipamd_socket: str, liveness_s: float = LIVENESS_S) -> None:
        self._events = Events()
        self._session = Session()
        self._records = Records(run_dir)
        self._ipamd = Client(ipamd_socket, timeout_s=_CALL_TIMEOUT_S)
        self._liveness_s = liveness_s
        self._run_dir = run_dir
        self._dead: dict[Record, float] = {}  # since when
        self._complained: dict[str, str] = {}  # by what was attempted
        self._rewrote = False  # the last thing was writing the tables anew because events were missed

    def run(self) -> None:
        """Watch until the process ends."""
        self._rebuild("start")
        due = time.monotonic()
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + self._liveness_s
                self._attempt("report of living namespaces", self._look)
                if foreign.legacy_in_use():
                    self._let_pass("iptables-legacy")
            changes = [change for change in self._events.wait(due - time.monotonic()) if _concerns_us(change)]
            if changes:
                time.sleep(_SETTLE_S)
                self._see_to(changes + self._events.wait(0))
            else:
                self._rewrote = False

    def _see_to(self, changes: Sequence[Change]) -> None:
        """What came in a moment. The first is one of those that concern us."""
        others = [change for change in changes if not _is_ours(change)]
        why = f"change by {changes[0].process or 'somebody'} (process {changes[0].pid})"
        lost = any(change.lost for change in changes)
        if any(_takes_from_us(change) for change in changes):
            # What tells of all that is written anew may be too much to read again: once is enough, or it never ends.
            anew = any(change.structure and not (change.lost and self._rewrote) for change in others)
            self._rebuild(why, anew=anew)
            self._rewrote = lost and anew
        elif any(change.forward for change in others):
            self._let_pass(why)
        if any(change.firewalld for change in others):
            self._attempt("return of addresses to firewalld's zones", self._add_sources)

    def _rebuild(self, why: str, *, anew: bool = False) -> None:
        """`anew`: a chain or rule may be missing in a table that is there, which only writing them all again mends."""

        def rebuild() -> None:
            missing, stale = self._records.rebuild(self._session, anew=anew)
            if missing or stale or anew:
                and_rules = ", wrote all rules again" if anew else ""
                _say(f"{why}: put {missing} elements back into nftables, took {stale} out{and_rules}")

        self._attempt("repair of nftables", rebuild)

    def _let_pass(self, why: str) -> None:
        def let_pass() -> None:
            if self._records.let_pass(self._session):
                _say(f"{why}: put the rule that lets our packets pass back into iptables")

        self._attempt("return of the rule in front of another firewall's", let_pass)

    def _add_sources(self) -> None:
        wanted = [record for record in self._records.all() if record.firewalld_zone]
        if not wanted:
            return
        with firewalld.connected() as asked:
            if asked is not None:
                for record in wanted:
                    for source in leftovers.sources(record):
                        asked.add_source(record.firewalld_zone, source)
                _say(f"firewalld was loaded anew: its zones have the addresses of {len(wanted)} attachments again")

    def _look(self) -> None:
        at = pb.Instant(boot_id=boot_id(), boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        living = observe()
        self._attempt("removal of what dead containers left", lambda: self._sweep(living))
        live = [pb.LiveNetns(inode=one.inode, cookie=one.cookie) for one in living]
        for one in self._ipamd.report_liveness(at, live).released:
            held = ", ".join(address.cidr for address in one.addresses)
            _say(f"released {held} of {one.key.container_id} {one.key.ifname}: {one.reason}")

    def _sweep(self, living: Sequence[LiveNetns]) -> None:
        """An ADD that came after the look seems dead in this one, and alive in the next."""
        now = time.monotonic()
        failures: list[Exception] = []

        def sweep(*, dry_run: bool, only: Callable[[Record], bool]) -> list[Record]:
            return leftovers.sweep(
                self._session,
                self._records,
                self._lock,
                observe=lambda: living,
                dry_run=dry_run,
                only=only,
                failures=failures,
            )

        dead = sweep(dry_run=True, only=lambda _: True)
        self._dead = {record: self._dead.get(record, now) for record in dead}
        ripe = {record for record, since in self._dead.items() if now - since >= _LOOKS * self._liveness_s}
        gone = sweep(dry_run=False, only=ripe.__contains__) if ripe else []
        for record in gone:
            del self._dead[record]
            key = record.key
            _say(f"removed what {key.plugin} left of {key.container_id} {key.ifname}: its network namespace is gone")
        if gone:
            # An address may have a new holder already, whose elements were the same.
            self._records.rebuild(self._session)
        if failures:
            raise failures[0]

    def _lock(self, container_id: str, ifname: str) -> AttachmentLock:
        return attachment_lock(self._run_dir, container_id, ifname, NAME, _LOCK_DEADLINE_S)

    def _attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do it; a failure is told when it is another than the last time."""
        complaint = ""
        try:
            work()
        except (CniError, IpamError, KernelError, OSError) as error:
            complaint = f"{what}: {error}"
        if complaint and complaint != self._complained.get(what):
            _say(complaint)
        self._complained[what] = complaint


def _concerns_us(change: Change) -> bool:
    return _takes_from_us(change) or ((change.forward or change.firewalld) and not _is_ours(change))


def _takes_from_us(change: Change) -> bool:
    """Elements that one of ours took away were no longer wanted. Who of ours writes the tables anew has lost what was
    in them."""
    if change.pid == os.getpid():
        return False
    return change.structure or (change.elements and not _is_ours(change))


def _is_ours(change: Change) -> bool:
    """Workers (netloom-worker), cold plugins (netloom-cni, or the plugin's name)."""
    return change.process.startswith("netloom-") or change.process in PLUGINS


def _say(text: str) -> None:
    sys.stderr.write(f"{NAME}: {text}\n")
    sys.stderr.flush()
