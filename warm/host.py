"""The master of the warm workers: imports everything, opens nothing, forks.

Rules of this file
- Before a fork there is one task and no descriptor but the listening socket and two pipes: a worker opens its own
  netlink sockets and its own gRPC channel.
- Workers wait in accept(2) on the one listening socket. Nobody hands requests out, so nobody can lose one.
- When every worker is busy and somebody waits, another is forked, up to a limit; it goes when it was not needed for a
  while. But not beyond what the processors can make use of: more workers at work than that serve a burst slower. Those
  that have held one request for long wait for somebody else, and count for nothing here.
- A worker that holds one request far beyond its deadline is killed.
- SIGTERM drains: each worker finishes what it has in hand. Who still waits in the queue goes the cold way.
- SIGHUP is an upgrade: this process executes the program on disk in its own place, keeps the listening socket and its
  process id, and stops the old workers once new ones wait for requests. The queue is served without a pause.
"""

import argparse
import contextlib
import errno
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import NoReturn

from cni import registry
from kernel import paths
from warm import worker as workers
from warm.board import Board
from warm.watch import LIVENESS_S, NAME, Watch
from warm.worker import DEADLINE_S, NotAtHome, Settings

WORKERS = 4
MAX_WORKERS = 32
_BACKLOG = 4096  # the kernel takes the smaller of this and net.core.somaxconn
_FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)
_OLD_WORKERS = "NETLOOM_OLD_WORKERS"  # from the program before an upgrade: its workers' process ids,
_OLD_LISTENER = "NETLOOM_OLD_LISTENER"  # and its listening socket's descriptor
_HELD_S = 0.1  # one request for so long: it waits for something
_CROWDED_S = 0.02  # all busy and somebody waiting for so long: one more worker
_IDLE_S = 30.0  # more than WORKERS and not all needed for so long: one less
_UNDO_GRACE_S = 60.0  # after a request's deadline, before its worker is killed
_LONGEST_BACKOFF_S = 10.0
_WATCH_PAUSE_S = 5.0  # between two starts of the helper
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

# What a request may need beyond the plugins themselves; a cold process imports each when it is needed.
_MODULES = (
    "hashlib",
    "traceback",
    "subprocess",
    "cni.reference",
    "grpc",
    "ipamd.client",
    "kernel.liveness",
    "kernel.nft",
    "kernel.nft_write",
    "kernel.record",
    "protos.ipam.v1.ipam_pb2",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    socket: str
    workers: int = WORKERS
    max_workers: int = MAX_WORKERS
    deadline_s: float = DEADLINE_S
    ipamd_socket: str = ""
    liveness_s: float = LIVENESS_S


@dataclass(slots=True)
class _Child:
    slot: int
    began: float
    stopping: bool = False


@dataclass(slots=True)
class _State:
    children: dict[int, _Child] = field(default_factory=dict)  # by process id
    old: set[int] = field(default_factory=set)  # workers of the program before an upgrade
    crowded_since: float = 0.0
    spare_since: float = 0.0
    watch: int = 0  # process id of the helper
    watch_not_before: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    announced: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Its exit status: 0 after SIGTERM, 1 where it could not start."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    old = _take_old_workers()
    try:
        listener = inherited() or listen(options.socket)
    except OSError as error:
        sys.stderr.write(f"netloom-cni: cannot listen on {options.socket}: {error.strerror or error}\n")
        return 1
    preload()
    return Master(options, listener, old).run()


def parse(arguments: Sequence[str]) -> Options:
    """The options. Leaves the process where they are wrong."""
    parser = argparse.ArgumentParser(prog="netloom-cni", description="Warm workers for the CNI plugins.")
    parser.add_argument("--socket", default=f"{paths.run_dir(os.environ)}/cni.sock", help="where launchers connect")
    parser.add_argument("--workers", type=int, default=WORKERS, help="how many are kept (default: %(default)s)")
    parser.add_argument("--max-workers", type=int, default=MAX_WORKERS, help="at most (default: %(default)s)")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_S, help="seconds for a request (default: %(default)g)"
    )
    parser.add_argument("--ipamd-socket", default=paths.ipamd_socket(os.environ), help="connected at start")
    parser.add_argument("--liveness-interval", type=float, default=LIVENESS_S, help="in s (default: %(default)g)")
    given = parser.parse_args(arguments)
    if not 1 <= given.workers <= given.max_workers <= 256:
        parser.error(f"wanted 1 <= workers <= max-workers <= 256, found {given.workers} and {given.max_workers}")
    if not 0 < given.deadline <= 3600:
        parser.error(f"wanted a deadline of up to 3600 s, found {given.deadline:g}")
    if not 0 < given.liveness_interval <= 3600:
        parser.error(f"wanted a liveness interval of up to 3600 s, found {given.liveness_interval:g}")
    return Options(
        given.socket,
        given.workers,
        given.max_workers,
        given.deadline,
        given.ipamd_socket,
        given.liveness_interval,
    )


def preload() -> None:
    """Import all that a request can need, so that workers share it and import nothing.

    A plugin that cannot be imported fails its own requests, and no others.
    """
    for plugin in registry.PLUGINS:
        try:
            registry.load(plugin)
        except ImportError as error:
            sys.stderr.write(f"netloom-cni: plugin {plugin} cannot be loaded: {error}\n")
    for name in _MODULES:
        import_module(name)
    gc.collect()
    gc.freeze()  # or the first collection in a worker would copy every page that objects are on


def inherited() -> socket.socket | None:
    """The listening socket that the program before an upgrade, or systemd (sd_listen_fds(3)), left us."""
    kept = os.environ.pop(_OLD_LISTENER, "")
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if kept:
        descriptor = int(kept)
    elif pid == str(os.getpid()) and count == "1":
        descriptor = _FIRST_DESCRIPTOR
    else:
        return None
    os.set_inheritable(descriptor, False)
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(True)
    return listener


def listen(path: str) -> socket.socket:
    """A new listening socket of mode 0600; what a dead master left under that name is removed.

    Raises:
        OSError: EADDRINUSE where somebody listens there.
    """
    directory, name = os.path.split(os.path.abspath(path))
    os.makedirs(directory, 0o755, exist_ok=True)
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    lock_fd = os.open(f"{directory}/.{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        # Through the directory's descriptor, as a socket's path ends after 107 bytes (unix(7)).
        address = f"/proc/self/fd/{directory_fd}/{name}"
        if _somebody_listens(address):
            raise OSError(errno.EADDRINUSE, "another master serves it; stop that one, or name another --socket")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
        return listener
    finally:
        os.close(lock_fd)
        os.close(directory_fd)


def _somebody_listens(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True  # and its queue is full
        return True


def _take_old_workers() -> set[int]:
    """The workers of the program before an upgrade: children of this process."""
    return {int(pid) for pid in os.environ.pop(_OLD_WORKERS, "").split(",") if pid.isdigit()}


class Master:
    """Keeps the workers. `run` returns when all have ended."""

    def __init__(self, options: Options, listener: socket.socket, old: set[int] | None = None) -> None:
        self._options = options
        self._listener = listener
        self._board = Board(options.max_workers)
        self._state = _State(old=old or set())
        self._wake_read, self._wake_write = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._useful = max(options.workers, 2 * len(os.sched_getaffinity(0)))
        self._draining = False
        self._upgrade = False

    def run(self) -> int:
        """Serve until SIGTERM."""
        for number in _SIGNALS:
            signal.signal(number, self._signalled)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        while True:
            self._reap()
            if self._upgrade:
                self._upgrade = False
                self._become_the_next()
            if self._draining:
                self._kill_the_stuck(time.monotonic())
                if not self._state.children and not self._state.old and not self._state.watch:
                    return 0
                self._stop_all()
            else:
                self._keep()
            self._wait()

    def _signalled(self, number: int, _frame: object) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._draining = True
        elif number == signal.SIGHUP:
            self._upgrade = True

    def _wait(self) -> None:
        """Sleep until a signal comes, a worker says that all are busy, or something is due."""
        state = self._state
        due = [10.0]
        if state.crowded_since:
            due.append(_CROWDED_S)
        if state.spare_since:
            due.append(1.0)
        if state.not_before:
            due.append(max(0.0, state.not_before - time.monotonic()))
        if self._wants_watch:
            due.append(max(0.0, state.watch_not_before - time.monotonic()))
        if not state.announced:
            due.append(0.005)
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.poll(min(due) * 1000)
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass

    # The workers

    def _keep(self) -> None:
        """As many workers as are needed now."""
        state = self._state
        now = time.monotonic()
        active = [child for child in state.children.values() if not child.stopping]
        if now >= state.not_before:
            state.not_before = 0.0
            for _ in range(len(active), self._options.workers):
                self._fork_worker()
        if self._wants_watch and now >= state.watch_not_before:
            state.watch_not_before = now + _WATCH_PAUSE_S
            state.watch = self._fork(self._be_watch)
        self._grow_or_shrink(now)
        self._kill_the_stuck(now)
        if not state.announced and any(self._board.is_ready(child.slot) for child in state.children.values()):
            state.announced = True
            notify(f"READY=1\nMAINPID={os.getpid()}")
        if state.old and all(self._board.is_ready(child.slot) for child in state.children.values()):
            _signal_all(state.old)

    @property
    def _wants_watch(self) -> bool:
        """Whether the helper is missing. That of the program before an upgrade ends when a worker of ours is ready;
        side by side each would write the nftables of its own version, in answer to the other, without end."""
        return not self._state.watch and (self._state.announced or not self._state.old)

    def _grow_or_shrink(self, now: float) -> None:
        state = self._state
        active = [child for child in state.children.values() if not child.stopping]
        since_ns = [self._board.busy_since_ns(child.slot) for child in active]
        busy = sum(1 for since in since_ns if since)
        if one_more_helps(since_ns, now, self._useful) and self._somebody_waits():
            state.crowded_since = state.crowded_since or now
            if now - state.crowded_since >= _CROWDED_S and len(state.children) < self._options.max_workers:
                state.crowded_since = now
                self._fork_worker()
        else:
            state.crowded_since = 0.0
        if len(active) > self._options.workers and busy < len(active):
            state.spare_since = state.spare_since or now
            if now - state.spare_since >= _IDLE_S:
                state.spare_since = now
                idle = [pid for pid, child in state.children.items() if not self._board.busy_since_ns(child.slot)]
                self._stop(idle[-1], state.children[idle[-1]])
        else:
            state.spare_since = 0.0

    def _somebody_waits(self) -> bool:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        return bool(poll.poll(0))

    def _kill_the_stuck(self, now: float) -> None:
        limit_s = self._options.deadline_s + _UNDO_GRACE_S
        for pid, child in self._state.children.items():
            since_ns = self._board.busy_since_ns(child.slot)
            if since_ns and now - since_ns / 1e9 > limit_s:
                sys.stderr.write(f"netloom-cni: worker {pid} has had one request for {limit_s:g} s; killing it\n")
                os.kill(pid, signal.SIGKILL)

    def _stop_all(self) -> None:
        for pid, child in self._state.children.items():
            self._stop(pid, child)
        _signal_all(self._state.old | ({self._state.watch} - {0}))

    def _stop(self, pid: int, child: _Child) -> None:
        """Let a worker finish what it has in hand, and end."""
        if not child.stopping:
            child.stopping = True
            _signal_all({pid})

    def _reap(self) -> None:
        state = self._state
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                state.old.clear()
                return
            if pid == 0:
                return
            state.old.discard(pid)
            if pid == state.watch:
                state.watch = 0
                if not self._draining:
                    sys.stderr.write(f"netloom-cni: {NAME} ended: {_how(status)}\n")
            child = state.children.pop(pid, None)
            if child is None:
                continue
            never_ready = not self._board.is_ready(child.slot)
            self._board.clear(child.slot)
            if child.stopping or os.waitstatus_to_exitcode(status) == 0:
                continue
            sys.stderr.write(f"netloom-cni: worker {pid} ended: {_how(status)}\n")
            state.failures = state.failures + 1 if never_ready else 0
            if state.failures:
                backoff_s = min(0.05 * 2**state.failures, _LONGEST_BACKOFF_S)
                state.not_before = time.monotonic() + backoff_s

    def _fork_worker(self) -> None:
        taken = {child.slot for child in self._state.children.values()}
        slot = next(slot for slot in range(self._board.size) if slot not in taken)
        self._state.children[self._fork(lambda: self._be_worker(slot))] = _Child(slot, time.monotonic())

    def _fork(self, work: Callable[[], None]) -> int:
        """Do the work in a new process, which ends with it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            master = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._be_child(master, work)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _be_child(self, master: int, work: Callable[[], None]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGHUP, signal.SIGINT):
                # The master decides what they mean. A handler, because what is ignored stays so in an executed plugin.
                signal.signal(number, lambda *_: None)
            self._wake_read.close()
            if _end_with_master(master):
                work()
            status = 0
        except NotAtHome as error:
            sys.stderr.write(f"netloom-cni: worker {os.getpid()} is not at home and ends: {error}\n")
            status = 70
        except BaseException:  # noqa: BLE001 - nothing may go on from a fork into the master's code
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)

    def _be_worker(self, slot: int) -> None:
        _call_this_process("netloom-worker")
        settings = Settings(self._options.deadline_s, self._options.ipamd_socket)
        worker = workers.Worker(self._listener.fileno(), self._board, slot, settings, self._crowd_check(slot))
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        worker.run()

    def _be_watch(self) -> None:
        _call_this_process(NAME)
        self._listener.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        Watch(paths.run_dir(os.environ), self._options.ipamd_socket, self._options.liveness_s).run()

    def _crowd_check(self, own: int) -> Callable[[], None]:
        """What a worker does when it got a connection: wake the master if it was the last free one."""

        def check() -> None:
            board = self._board
            if all(board.busy_since_ns(slot) or not board.is_ready(slot) for slot in range(board.size) if slot != own):
                with contextlib.suppress(OSError):
                    self._wake_write.send(b"b", socket.MSG_DONTWAIT)

        return check

    # Upgrade

    def _become_the_next(self) -> None:
        """Execute the program on disk in this process."""
        # Until the next program has its handlers: the mask survives execve(2), handlers do not. What came before is
        # handled when this returns, and the next program would not know of it; what comes later waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if self._draining:
                return
            pids = [str(pid) for pid in (*self._state.children, *self._state.old, self._state.watch) if pid]
            environment = {**os.environ, _OLD_WORKERS: ",".join(pids), _OLD_LISTENER: str(self._listener.fileno())}
            if getattr(sys, "frozen", False):
                # Or the new bundle takes itself for a child of the old.
                environment["PYINSTALLER_RESET_ENVIRONMENT"] = "1"
            os.set_inheritable(self._listener.fileno(), True)
            notify("RELOADING=1")
            os.execve(sys.executable, _command_line(), environment)  # noqa: S606 - itself, by its own arguments
        except OSError as error:
            os.set_inheritable(self._listener.fileno(), False)
            sys.stderr.write(f"netloom-cni: cannot execute {sys.executable}: {error}; going on with this version\n")
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def one_more_helps(since_ns: Sequence[int], now: float, useful: int) -> bool:
    """Whether those who wait would be served faster by one worker more.

    Args:
        since_ns: for each worker, when it got the connection that it has; 0: it has none. CLOCK_MONOTONIC.
        now: the same clock, in seconds.
        useful: how many at work the processors can make use of.
    """
    return all(since_ns) and sum(1 for since in since_ns if now - since / 1e9 < _HELD_S) < useful


def _command_line() -> list[str]:
    """What started this program: an interpreter with a module, or a bundle."""
    return [sys.executable, *sys.argv[1:]] if getattr(sys, "frozen", False) else sys.orig_argv


def _end_with_master(master: int) -> bool:
    """SIGTERM to this worker when its master dies (prctl(2), PR_SET_PDEATHSIG); an execve does not count.

    False: it is dead already, and nobody will tell.
    """
    import ctypes  # noqa: PLC0415 - loaded long ago

    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl PR_SET_PDEATHSIG")
    return os.getppid() == master


def _call_this_process(name: str) -> None:
    """For ps and top."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def _signal_all(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"signal {-code}"


def notify(message: str) -> None:
    """Tell systemd, where it asked for that (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.connect(address)
        sender.send(message.encode())


if __name__ == "__main__":
    sys.exit(main())
