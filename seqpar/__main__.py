"""``python -m seqpar``: the ``seqpar`` command."""

import sys

from seqpar.commands.main import command

sys.exit(command())
