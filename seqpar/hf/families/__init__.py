"""What mixes tokens in models of transformers, besides softmax attention: one file for each family."""
