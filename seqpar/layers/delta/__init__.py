"""Layers with the delta rule: a state travels, and the matrix that it passes through."""
