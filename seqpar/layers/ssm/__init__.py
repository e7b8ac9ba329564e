"""State-space models: selective, gated and time-invariant."""
