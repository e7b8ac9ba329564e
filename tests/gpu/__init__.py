"""Kernels, streams and cut sequences on a GPU: `pytest -m gpu`, or `make gpu`.

Without a GPU the same tests run small, with kernels in Triton's interpreter: so the tests are tested, too.
"""
