"""The daemon: `python -m ipamd [--config FILE]`. Configuration, start, serving, and a clean stop on SIGTERM or SIGINT.

Start, in order: store (the lock on it says that no other daemon has it), rows into bitmaps, socket, release records,
and only then requests. Stop: no new connection, what was taken is answered, the store is closed, status 0.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence

from ipamd.config import Config, load, parse_arguments
from ipamd.errors import StartError
from ipamd.server import serve
from kernel.settings import ConfigError
from kernel.version import VERSION
from telemetry import log

_logger = logging.getLogger("ipamd")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; returns the exit status: 0 after a clean stop, 1 where it could not start."""
    arguments = parse_arguments(argv)
    try:
        config = load(arguments.config, arguments.overrides, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"ipamd: {error}\n")
        return 1
    if arguments.check:
        sys.stdout.write("the configuration is valid\n")
        return 0
    log.setup(config.log_level, config.log_format)
    try:
        asyncio.run(_run(config))
    except StartError as error:
        log.event(_logger, "error", "ipamd cannot start", error=str(error))
        return 1
    return 0


async def _run(config: Config) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(config, stop, version=VERSION)


if __name__ == "__main__":
    sys.exit(main())
