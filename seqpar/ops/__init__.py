"""One device, one folder per op: the meaning in `reference.py`, and where it is hot its speed in `kernel.py`."""
