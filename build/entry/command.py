"""The netloom command."""

import sys

import environment

environment.restore()

from cli.app import main  # noqa: E402 - the environment first: it may be read at import

sys.exit(main())
