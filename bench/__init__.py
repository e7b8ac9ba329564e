"""Scaling benchmarks: what cutting a sequence costs and gains, measured in one run on the machine at hand."""
