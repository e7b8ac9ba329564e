"""Activations that leave the device and come back: hooks, lanes, tiers."""
