"""`python -m d2dmoe.cli` is the command `d2dmoe`."""

import sys

from .app import main

sys.exit(main())
