"""Models of transformers as decoders of our own layers, and back: one file of rules a kind of family."""
