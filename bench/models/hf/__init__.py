"""How exactly models of transformers train cut: all of them, shrunk."""
