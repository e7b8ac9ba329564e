"""Is it the same? Whole and cut runs of one model compared, and what this machine has."""
