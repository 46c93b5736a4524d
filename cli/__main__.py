"""`python -m cli`: the netloom command."""

import sys

from cli.app import main

sys.exit(main())
