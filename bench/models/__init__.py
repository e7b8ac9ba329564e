"""What models cost and learn: scaling, layers, learning, swapping."""
