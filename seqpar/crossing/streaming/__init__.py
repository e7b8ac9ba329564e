"""What :mod:`seqpar.crossing.stream` is made of: the stretches of a leg, and what runs a cell over one of them."""
