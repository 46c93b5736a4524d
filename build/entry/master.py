"""The master of the warm workers.

An upgrade (SIGHUP) executes sys.executable with sys.orig_argv. The bootloader resolves links, so both would name this
build and not the one that is installed by then; the link beside the builds leads there.
"""

import os
import sys

import environment

environment.restore()

build = os.path.dirname(sys.executable)
installed = os.path.join(os.path.dirname(build), os.path.basename(sys.executable))
if os.path.islink(installed):
    sys.executable = installed
sys.orig_argv = [sys.executable, *sys.argv[1:]]

from warm.host import main  # noqa: E402 - the environment first: it may be read at import

sys.exit(main())
