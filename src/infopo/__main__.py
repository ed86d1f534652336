"""`python -m infopo`: the command line."""

import sys

from infopo.workers import end_with_input

if __name__ == "__main__":
    end_with_input()
    from infopo.cli import main

    sys.exit(main())
