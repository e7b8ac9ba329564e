"""``python -m seqpar``: the ``seqpar`` command."""

import sys

from seqpar.cli import main

sys.exit(main())
