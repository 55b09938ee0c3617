"""`python -m spar` is the command `spar`."""

import sys

from spar.cli import main

if __name__ == "__main__":
    sys.exit(main())
