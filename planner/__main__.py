"""``python -m planner``: what ``seqpar plan`` does."""

import sys

from planner.cli import main

sys.exit(main())
