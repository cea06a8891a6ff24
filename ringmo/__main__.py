"""`python -m ringmo` is the `ringmo` command."""

import sys

from ringmo.cli import main

if __name__ == "__main__":
    sys.exit(main())
