"""Long sequences, cut over many GPUs, trained to the same numbers as one device."""
