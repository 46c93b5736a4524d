"""`python -m warm`: the master."""

import sys

from warm.host import main

sys.exit(main())
