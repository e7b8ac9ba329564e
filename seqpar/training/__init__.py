"""Training with the sequence cut: the decorator, loss, gradients, plans and swapping."""
