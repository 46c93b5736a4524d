"""The cold entry of every plugin: a launcher executes it, with the plugin's path as argv[0], when no worker serves.

Such a process lives for one request, so it collects no garbage and does not tidy up at its end: the kernel does, and
both together are a tenth of its life.
"""

import gc
import os
import sys

gc.disable()

import environment  # noqa: E402 - that it costs less than a collection is the point

environment.restore()

from cni.__main__ import main  # noqa: E402 - the environment first: it may be read at import

status = 1
try:
    status = main()
except Exception:  # noqa: BLE001 - os._exit shows no traceback
    sys.excepthook(*sys.exc_info())
finally:
    sys.stderr.flush()
    os._exit(status)
