"""Who shares which sequence: the planner. Empty so far; it imports no torch."""
