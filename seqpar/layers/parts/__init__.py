"""What layers and decoders are made of: norms, feed-forward parts, positions, residual blocks."""
