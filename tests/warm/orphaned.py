"""A master that dies right after a fork, before its child has asked to be told of it."""

import os
import signal
import sys
import time

from warm import host

_end_with_master = host._end_with_master


def later(master: int) -> bool:
    os.kill(master, signal.SIGKILL)
    while os.getppid() == master:
        time.sleep(0.001)
    return _end_with_master(master)


if __name__ == "__main__":
    host._end_with_master = later
    sys.exit(host.main())
