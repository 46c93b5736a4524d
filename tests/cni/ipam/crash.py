"""Runs our host-local in this process and kills it before its n-th call to the kernel: `python -m … N`.

Standard input and environment are a runtime's. Ends by SIGKILL, or with exit status 0 where there are fewer calls.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from typing import Any, cast

from cni import skel
from cni.ipam import address_index, host_local
from kernel.session import Session

_FILES = (
    "open",
    "close",
    "read",
    "write",
    "pwrite",
    "ftruncate",
    "link",
    "unlink",
    "rename",
    "mkdir",
    "utime",
    "fstat",
)
_INDEX = ("take", "free", "hold", "drop", "commit", "save")


def main() -> None:
    left = [int(sys.argv[1])]
    stdin = sys.stdin.buffer.read()
    assert host_local.DATA_DIR

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def watched(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(owner, name, watched)

    for name in _FILES:
        watch(os, name)
    for name in _INDEX:
        watch(address_index.AddressIndex, name)
    outcome = skel.run("host-local", dict(os.environ), lambda: stdin, lambda: cast("Session", None))
    sys.exit(outcome.status)


if __name__ == "__main__":
    main()
