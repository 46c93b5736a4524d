"""The daemon: `python -m netd [--config FILE]`. Configuration, start, serving, and a clean stop on SIGTERM or SIGINT.

Start, in order: the kernel as it should be, socket, requests. SIGHUP: the configuration is read again. Stop: what was
taken is answered; routes and tunnels stay, so that nothing is lost while netd is away. `netd --remove` takes them away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ipamd.errors import StartError
from kernel.errors import KernelError
from kernel.settings import ConfigError
from kernel.version import VERSION
from netd.config import Config, load, parse_arguments
from netd.remove import remove
from netd.server import serve
from telemetry import log

_logger = logging.getLogger("netd")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; returns the exit status: 0 after a clean stop, 1 where it could not start."""
    arguments = parse_arguments(argv)

    def read() -> Config:
        return load(arguments.config, arguments.overrides, os.environ)

    try:
        config = read()
    except ConfigError as error:
        sys.stderr.write(f"netd: {error}\n")
        return 1
    if arguments.check:
        sys.stdout.write("the configuration is valid\n")
        return 0
    log.setup(config.log_level, config.log_format)
    try:
        if arguments.remove:
            sys.stdout.write(f"removed {remove(config.socket, config.run_dir)} routes and tunnels\n")
        else:
            asyncio.run(_run(config, read))
    except (StartError, KernelError) as error:
        log.event(_logger, "error", "netd cannot start", error=str(error))
        return 1
    return 0


async def _run(config: Config, read: Callable[[], Config]) -> None:
    stop, changed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, changed.set)
    await serve(config, read, stop, changed, version=VERSION)


if __name__ == "__main__":
    sys.exit(main())
