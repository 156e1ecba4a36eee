"""`python -m tools.checkpoint_convert`."""

import sys

from tools.checkpoint_convert.cli import main

if __name__ == "__main__":
    sys.exit(main())
