"""What one device computes, measured: kernels compiled ahead of time, on a GPU, and torch on a CPU."""
