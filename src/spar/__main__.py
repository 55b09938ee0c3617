"""`python -m spar` is the command `spar`."""

import sys

from spar.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
