"""What crosses the cuts: keys and values, states, neighbours, sums and maxima; ``Here`` binds them to a layer."""
