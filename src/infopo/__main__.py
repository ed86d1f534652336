"""`python -m infopo`: the command line."""

import sys

from infopo.cli import main

sys.exit(main())
