"""`python -m d2dmoe` is the command `d2dmoe`."""

import sys

from .cli import main

sys.exit(main())
