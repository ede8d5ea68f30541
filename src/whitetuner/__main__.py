"""`python -m whitetuner` is the command line."""

import sys

from whitetuner.cli import main

sys.exit(main())
