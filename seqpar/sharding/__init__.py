"""Which tokens are mine, and where I stand: shards, cuts, states, re-laying, agreement."""
