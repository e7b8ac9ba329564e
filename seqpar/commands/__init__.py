"""The ``seqpar`` command: one file for each subcommand, and its report. Parsers need no torch."""
