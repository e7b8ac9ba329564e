"""Linear attention and its kin: one decayed state per head travels."""
