"""Softmax attention: keys and values travel."""
