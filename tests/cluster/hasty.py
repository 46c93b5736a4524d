"""ipamd that takes any `cluster.reclaim_nodes_after_s` of four leases or more, so that a test can wait for it.

`python -m tests.cluster.hasty`, with ipamd's own arguments behind.
"""

from __future__ import annotations

import sys

from ipamd import __main__ as ipamd
from ipamd import config

if __name__ == "__main__":
    config._LEAST_RECLAIM_S = 0.0
    sys.exit(ipamd.main())
