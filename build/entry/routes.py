"""netd."""

import sys

import environment

environment.restore()

from netd.__main__ import main  # noqa: E402 - the environment first: it may be read at import

sys.exit(main())
