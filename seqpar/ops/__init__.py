"""What one device computes: each op has its meaning in `reference.py` and, where it is hot, its speed in `kernel.py`."""
