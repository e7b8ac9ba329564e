"""Which activations stay, leave or are computed again. Empty so far."""
