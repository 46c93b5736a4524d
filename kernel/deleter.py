"""Delete links without waiting until the kernel has freed them.

The kernel acknowledges RTM_DELLINK only after RCU callbacks ran, 10 to 20 ms later and more on a busy host. All that
anybody could notice happens in the first millisecond, under the rtnl lock: the link is closed, taken out of every list
and its name is free (net/core/dev.c, unregister_netdevice_many_notify; the wait is in netdev_run_todo, after the lock).
A long-lived process therefore lets a thread wait for the acknowledgement, and goes on as soon as the link is gone:
looking a link up takes the same lock, so the answer that there is none comes after all of it.

Rules of this file
- `delete` returns when the link is gone, or raises what the kernel said: the promise is that of `link.delete`.
- A thread does nothing but wait in the kernel, in the namespace of the host, where it was started. It has no signals.
- When so many threads wait already, the caller waits itself: the kernel frees no faster than it can.
"""

from __future__ import annotations

import queue
import signal
import threading
import time

from kernel import link, netlink
from kernel.errors import NotFound
from kernel.link import Link
from kernel.netlink import Socket
from kernel.session import Door, Session, Visit

MOST = 16  # threads; in a burst four workers have as many links on their way out as the kernel frees at once
_FIRST_PAUSE_S = 0.00005
_LONGEST_PAUSE_S = 0.005


def delete(door: Session | Visit, found: Link) -> None:
    """Delete a link, by the session's deleter where it has one. One that went meanwhile is no error."""
    if door.deleter is None:
        link.delete(door, found.name)
    else:
        door.deleter.delete(door, found.index, door.another_socket() if isinstance(door, Visit) else None)


class _Task:
    """One link to delete, through a socket in its namespace. `error` counts once `done`."""

    __slots__ = ("done", "error", "index", "socket")

    def __init__(self, index: int, socket: Socket | None) -> None:
        self.index = index
        self.socket = socket
        self.error: Exception | None = None
        self.done = False

    def run(self) -> None:
        """In a thread, at home: a socket for each task, as many threads would hold many."""
        try:
            if self.socket is None:
                self.socket = Socket(netlink.ROUTE)
            self.socket.execute([link.delete_message(self.index)])
        except Exception as error:  # noqa: BLE001 - whoever asked is to know
            self.error = error
        finally:
            self.done = True
            if self.socket is not None:
                self.socket.close()


class Deleter:
    """Threads that wait for the kernel. Made after every fork; used by one thread, in the namespace of the host."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()

    @property
    def waiting(self) -> int:
        """How many threads wait for the kernel now."""
        return self._threads - self._idle

    def delete(self, door: Door, index: int, socket: Socket | None = None) -> None:
        """Delete a link and what goes with it, such as a veth's other end. One that is gone is no error.

        Args:
            door: the namespace in which the link is.
            index: the link's.
            socket: another one of that namespace where it is not home; closed when the kernel is done.

        Raises:
            KernelError: the kernel refused.
        """
        task = _Task(index, socket)
        if not self._hand_over(task):
            task.run()
        pause_s = _FIRST_PAUSE_S
        while not task.done:
            # A moment for the thread to get the lock first.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            try:
                link.by_index(door, index)
            except NotFound:
                return
        if task.error is not None and not isinstance(task.error, NotFound):
            raise task.error

    def _hand_over(self, task: _Task) -> bool:
        """Whether a thread has it now."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif self._threads < self._most:
                if not self._start():
                    return False
            else:
                return False
        self._tasks.put(task)
        return True

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._work, name="deleter", daemon=True).start()
        except RuntimeError:  # no more threads for this process
            return False
        self._threads += 1
        return True

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            self._tasks.get().run()
            with self._lock:
                self._idle += 1
