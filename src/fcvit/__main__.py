"""`python -m fcvit` is the command `fcvit`."""

import sys

from fcvit.cli import main

sys.exit(main())
